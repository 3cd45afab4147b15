"""Train HKT-tiny and its flat twin on ListOps, evaluate both, reload, predict; writes `results/quickstart.json`."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

from hkt_hf.config import load_experiment
from hkt_hf.data import load_data
from hkt_hf.files import write_json
from hkt_hf.training import evaluate_checkpoint, train


ROOT = Path(__file__).resolve().parent.parent
ARMS = {"flat": "listops-flat-tiny", "hkt": "listops-hkt-tiny"}
EXPRESSIONS = [
    "[MAX 2 9 [MIN 4 7 ] 0 ]",
    "[SM 3 5 [MED 1 8 6 ] 4 ]",
    "[MIN [MAX 3 7 1 ] [SM 9 9 9 ] 8 [MED 2 5 5 ] ]",
]


def majority_accuracy(config) -> float:
    """Test accuracy of always answering the most frequent label of the training split."""
    splits = load_data(config.data).splits
    (label, _), *_ = Counter(splits["train"]["label"][:]).most_common(1)
    test = splits["test"]["label"][:]
    return test.count(label) / len(test)


def main() -> None:
    """Do everything; a second run reuses what is finished."""
    configs = {arm: load_experiment(name) for arm, name in ARMS.items()}
    accuracies = {"majority": majority_accuracy(configs["hkt"])}
    reports = {}
    for arm, config in configs.items():
        print(f"\n== {arm}: {config.output_dir} ==", flush=True)
        reports[arm] = train(config)
        accuracies[arm] = evaluate_checkpoint(config.output_dir)["accuracy"]

    checkpoint = configs["hkt"].output_dir
    print(f"\n== {checkpoint} in a new process, through the Auto classes ==", flush=True)
    subprocess.run([sys.executable, ROOT / "scripts" / "load_and_predict.py", checkpoint, *EXPRESSIONS], check=True)

    write_json(
        ROOT / "results" / "quickstart.json",
        {
            **accuracies,
            "test_expressions": configs["hkt"].data.listops.num_test,
            "command": "bash scripts/quickstart.sh",
            "config": {arm: config.to_dict() for arm, config in configs.items()},
            "parameters": {arm: report["parameters"] for arm, report in reports.items()},
            "seconds": {arm: report["seconds"] for arm, report in reports.items()},
            **{key: reports["hkt"][key] for key in ("versions", "machine", "commit")},
        },
    )
    print("\n| model | parameters | seconds | test accuracy |\n| --- | --- | --- | --- |")
    print(f"| majority class | | | {accuracies['majority']:.1%} |")
    for arm, name in (("flat", "flat attention"), ("hkt", "HKT, 3 levels")):
        report = reports[arm]
        print(f"| {name} | {report['parameters']:,} | {report['seconds']:.0f} | {accuracies[arm]:.1%} |")


if __name__ == "__main__":
    main()
