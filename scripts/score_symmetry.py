"""Constrained scores after training: their spectra, directions and accuracy; writes `results/score_symmetry.json`.

usage: python scripts/score_symmetry.py [--runs FOLDER]

Reads the runs that `hkt reproduce listops --protocol cpu --arms hkt-rope hkt-symmetric-rope hkt-psd-rope` leaves in `runs/reproduce`;
spectra are those of `kernel_report` on eight validation expressions.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from statistics import mean

from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hkt_hf.analysis import directional_report, kernel_report
from hkt_hf.data import load_data
from hkt_hf.environment import environment
from hkt_hf.files import write_json
from hkt_hf.training import checkpoint_experiment


RESULTS = Path(__file__).resolve().parent.parent / "results"
ARMS = ("hkt-rope", "hkt-symmetric-rope", "hkt-psd-rope")
SEEDS = (0, 1, 2)
NUM_EXAMPLES = 8


def measure(checkpoint: Path) -> dict[str, float]:
    """Smallest eigenvalues by the largest, shares of negative ones, and the directional ratio, of one trained model."""
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    config = checkpoint_experiment(checkpoint)[0]
    texts = load_data(config.data).splits["validation"]["text"][:NUM_EXAMPLES]
    batch = dict(tokenizer(texts, padding=True, truncation=True, return_tensors="pt"))
    kernel = kernel_report(model, batch)
    found: dict[str, float] = {}
    for name, entries in (
        ("projections", [entry for entry in kernel if entry["level"] != "combined"]),
        ("scores", [entry for entry in kernel if entry["level"] == "combined"]),
    ):
        found[f"min_relative_eigenvalue_{name}"] = min(
            entry["min_eigenvalue"] / entry["max_eigenvalue"] for entry in entries
        )
        found[f"negative_fraction_{name}"] = mean(entry["negative_fraction"] for entry in entries)
    combined = [entry for entry in directional_report(model, batch) if entry["level"] == "combined"]
    return {**found, "directional_ratio": mean(entry["directional_ratio"] for entry in combined)}


def main() -> None:
    """Measure each arm and seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce"), help="default: %(default)s")
    options = parser.parse_args()
    rows = []
    for arm, seed in tqdm([(arm, seed) for arm in ARMS for seed in SEEDS], unit="run"):
        record = RESULTS / "reproduce" / "listops" / "cpu" / arm / f"final-seed{seed}.json"
        accuracy = json.loads(record.read_text(encoding="utf-8"))["test_accuracy"]
        checkpoint = options.runs / "listops" / "cpu" / arm / f"final-seed{seed}"
        rows.append({"arm": arm, "seed": seed, "test_accuracy": accuracy, **measure(checkpoint)})
    command = f"python scripts/score_symmetry.py {shlex.join(sys.argv[1:])}".strip()
    write_json(RESULTS / "score_symmetry.json", {"command": command, "rows": rows, **environment()})


if __name__ == "__main__":
    main()
