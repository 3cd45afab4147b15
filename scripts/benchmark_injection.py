"""How long an encoder takes with HSA put into its layers, beside its own attention; writes `results/hsa_injection.json`.

A BERT of all-MiniLM-L6-v2's sizes (6 layers, 12 heads of 32) with as many positions as needed, random weights and float32: times
do not depend on them. One text without padding; all models take turns in one run.
"""

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

from hkt_hf.benchmark.measurement import summary, take_turns
from hkt_hf.environment import environment
from hkt_hf.files import write_json
from hkt_hf.hsa import inject


SIZES = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
ALL_LAYERS = [0, 1, 2, 3, 4, 5]
INJECTIONS = {
    "three_layers_groups_of_4": (4, [0, 4, 5]),
    "three_layers_windows_of_16": ((16, None), [0, 4, 5]),
    "all_layers_groups_of_4": (4, ALL_LAYERS),
    "all_layers_groups_of_16": (16, ALL_LAYERS),
    "all_layers_windows_of_16": ((16, None), ALL_LAYERS),
}


def main() -> None:
    """Measure, print, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192], help="tokens")
    parser.add_argument("--repeats", type=int, default=10, help="measured turns")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).resolve().parent.parent / "results/hsa_injection.json"
    )
    arguments = parser.parse_args()
    if arguments.repeats < 2:
        parser.error(f"--repeats must be at least 2, got {arguments.repeats}")
    torch.set_num_threads(1)
    config = BertConfig(**SIZES, max_position_embeddings=max(arguments.lengths))
    own = BertModel(config).eval()
    models = {"own_attention": own}
    for name, (tree, layers) in INJECTIONS.items():
        models[name] = BertModel(BertConfig(**config.to_diff_dict())).eval()
        models[name].load_state_dict(own.state_dict())
        inject(models[name], tree=tree, layers=layers)
    rows = []

    def step(model: BertModel, inputs: dict[str, torch.Tensor]) -> Callable[[], object]:
        return lambda: model(**inputs)

    for length in arguments.lengths:
        inputs = {"input_ids": torch.randint(1000, config.vocab_size, (1, length))}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.inference_mode():
            steps = {name: step(model, inputs) for name, model in models.items()}
            seconds = take_turns(steps, 2, arguments.repeats)
        rows.append({"length": length, **{name: summary(seconds[name], seconds["own_attention"]) for name in steps}})
        print(length, {name: round(rows[-1][name]["paired_ratio"], 3) for name in steps}, flush=True)
    settings = {"batch_size": 1, "repeats": arguments.repeats, "threads": 1, **SIZES}
    command = f"python scripts/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}".strip()
    write_json(arguments.output, {"rows": rows, "settings": settings, "command": command, **environment()})


if __name__ == "__main__":
    main()
