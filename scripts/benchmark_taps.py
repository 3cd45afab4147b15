"""What more taps of the downsampling cost in a training step of HKT-small; writes `results/taps.json`.

Batch 1, float32; flat attention, two taps and four take turns in one run.
"""

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from hkt_hf import HKTForSequenceClassification, preset
from hkt_hf.benchmark.measurement import summary, take_turns
from hkt_hf.environment import environment
from hkt_hf.files import write_json


VOCAB_SIZE = 512
MODELS = {
    "flat": {"num_levels": 1},
    "two_taps": {"downsample_kernel_size": 2},
    "four_taps": {"downsample_kernel_size": 4},
}


def training_step(length: int, fields: dict[str, int]) -> Callable[[], None]:
    """Forward, backward and an update of the weights with one random sequence."""
    config = preset("hkt-small", vocab_size=VOCAB_SIZE, max_position_embeddings=length, num_labels=2, **fields)
    model = HKTForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters())
    input_ids, labels = torch.randint(3, VOCAB_SIZE, (1, length)), torch.zeros(1, dtype=torch.long)

    def step() -> None:
        model(input_ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Measure, print, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="T")
    parser.add_argument("--repeats", type=int, default=20, help="measured turns")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent.parent / "results/taps.json")
    arguments = parser.parse_args()
    rows = []
    for length in arguments.lengths:
        steps = {name: training_step(length, fields) for name, fields in MODELS.items()}
        seconds = take_turns(steps, 3, arguments.repeats)
        rows.append({"length": length, **{name: summary(seconds[name], seconds["two_taps"]) for name in steps}})
        print(length, {name: round(rows[-1][name]["paired_ratio"], 3) for name in steps}, flush=True)
    settings = {"batch_size": 1, "repeats": arguments.repeats, "threads": torch.get_num_threads()}
    command = f"python scripts/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}".strip()
    write_json(arguments.output, {"rows": rows, "settings": settings, "command": command, **environment()})


if __name__ == "__main__":
    main()
