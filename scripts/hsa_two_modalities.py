"""Pictures and questions about them under one root, along several trees; writes `results/hsa_two_modalities.json` and `.png`.

usage: python scripts/hsa_two_modalities.py [--data FOLDER] [--steps N] [--output FILE]

Runs that are in the file already are kept.
"""

import argparse
import shlex
import sys
from pathlib import Path

from hkt_hf.experiments.two_modalities import ARMS, Protocol, plot, two_modalities


RESULTS = Path(__file__).resolve().parent.parent / "results"


def main() -> None:
    """Run everything, or what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder or Hub id of CIFAR-10; by default the Hub's uoft-cs/cifar10")
    parser.add_argument("--steps", type=int, default=1500, help="of every run (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "hsa_two_modalities.json")
    options = parser.parse_args()
    protocol = Protocol(
        side=8,
        arms=list(ARMS),
        seeds=[0, 1, 2],
        search_seed=100,
        learning_rates=[1e-3, 2e-3],
        steps=options.steps,
        batch_size=64,
        num_train=40_000,
        num_validation=2000,
        num_test=5000,
        model={
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "intermediate_size": 128,
            "hidden_dropout": 0.0,
        },
    )
    command = f"python scripts/hsa_two_modalities.py {shlex.join(sys.argv[1:])}".strip()
    result = two_modalities(protocol, options.output, options.data, command)
    plot(result, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
