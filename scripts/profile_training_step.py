"""Where a training step of HKT-small spends its time, before and after the polyphase backend; and the data's share.

Writes `results/training_step.json`. "flat" is the flat twin, "hkt:sdpa" HKT on lifted queries and keys, "hkt" the
default. The data are IMDB bytes, from the Hub or from files:
    python scripts/profile_training_step.py --data.train_file train.parquet --data.test_file test.parquet
"""

import argparse
import shlex
import statistics
import sys
from pathlib import Path

import torch

from hkt_hf.benchmark.profiling import profile_training_step, seconds_of_batches
from hkt_hf.benchmark.registry import ModelSizes
from hkt_hf.config import load_experiment
from hkt_hf.environment import environment
from hkt_hf.files import write_json


def main() -> None:
    """Measure, print a table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=1024, help="T")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=10, help="measured turns")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).resolve().parent.parent / "results/training_step.json"
    )
    arguments, data_overrides = parser.parse_known_args()
    sizes = ModelSizes(arguments.length, arguments.batch_size)
    config = load_experiment(
        "imdb-hkt-small",
        [
            *("--training.per_device_train_batch_size", str(arguments.batch_size)),
            *("--tokenizer.max_length", str(arguments.length)),
            *data_overrides,
        ],
    )
    batches = seconds_of_batches(config)
    models = profile_training_step(("flat", "hkt:sdpa", "hkt"), sizes, repeats=arguments.repeats)
    result = {
        "models": models,
        "seconds_of_a_batch": {
            "experiment": "imdb-hkt-small",
            "median": statistics.median(batches),
            "number": len(batches),
        },
        "settings": {"length": arguments.length, "batch_size": arguments.batch_size, "repeats": arguments.repeats},
        "threads": torch.get_num_threads(),
        "command": f"python scripts/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}".strip(),
        **environment(),
    }
    write_json(arguments.output, result)
    print(f"{'':84s}" + "".join(f"{name:>11s}" for name in models))
    print(f"{'step, ms':84s}" + "".join(f"{1e3 * model['seconds']:11.1f}" for model in models.values()))
    for part in models["flat"]["parts"]:
        print(f"{part:84s}" + "".join(f"{1e3 * model['parts'][part]:11.1f}" for model in models.values()))
    print(f"a batch of IMDB bytes takes {1e3 * result['seconds_of_a_batch']['median']:.2f} ms")


if __name__ == "__main__":
    main()
