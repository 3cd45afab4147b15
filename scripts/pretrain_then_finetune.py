"""Masked-LM pretraining and fine-tuning against training from scratch; writes `results/pretrain_then_finetune.json`.

usage: python scripts/pretrain_then_finetune.py [CONFIG] [--section.key VALUE ...]

CONFIG is a classifier from scratch, by default `listops-pretraining`. A second run reuses what is finished, and continues
what was interrupted. Another CONFIG writes its result beside that one, under its own name.
"""

import logging
import sys
from pathlib import Path

from hkt_hf.config import load_experiment
from hkt_hf.experiments.pretraining import ARMS, Protocol, plot, pretrain_then_finetune
from hkt_hf.files import write_json


RESULTS = Path(__file__).resolve().parent.parent / "results"
DEFAULT = "listops-pretraining"
PROTOCOL = Protocol(
    pretrain_steps=1000,
    finetune_steps=1000,
    pretrain_learning_rate=1e-3,
    learning_rates=(2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
)


def main(words: list[str]) -> None:
    """Run everything, write the result and print it."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    name, overrides = (words[0], words[1:]) if words and not words[0].startswith("--") else (DEFAULT, words)
    result = pretrain_then_finetune(load_experiment(name, overrides), PROTOCOL)
    command = " ".join(["python scripts/pretrain_then_finetune.py", *words])
    stem = "pretrain_then_finetune" if name == DEFAULT else f"pretrain_then_finetune_{Path(name).stem}"
    write_json(RESULTS / f"{stem}.json", {"command": command, **result})
    plot(result, RESULTS / f"{stem}.png")
    for arm in ARMS:
        accuracies = ", ".join(f"{accuracy:.1%}" for accuracy in result["test_accuracy"][arm])
        print(f"{arm}: test accuracy {accuracies} (learning rate {result['learning_rate'][arm]:g})")
    for control, difference in result["difference"].items():
        mean, low, high = (100 * difference[key] for key in ("mean", "low", "high"))
        print(
            f"pretrained - {control}: {mean:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f} "
            f"(paired t, {difference['pairs']} seeds)"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
