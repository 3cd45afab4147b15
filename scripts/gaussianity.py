"""Mardia's tests of queries and keys, untrained by model width and over the epochs of training; `results/gaussianity.json`.

usage: python scripts/gaussianity.py [CONFIG] [--section.key VALUE ...]

CONFIG is what is trained, by default `listops-hkt-tiny`, with two taps of downsampling, as in the result, and learned absolute
positions: with rotary ones the vectors of the first layer are no more different ones than there are tokens. Untrained models
have its fields but for the width; heads stay 16 wide, as in the paper's figure. An interrupted training goes on.
"""

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np

from hkt_hf.analysis.gaussianity import GaussianityCallback, by_width
from hkt_hf.config import load_experiment
from hkt_hf.data import load_data
from hkt_hf.environment import environment
from hkt_hf.experiments.arms import initialize_by_name
from hkt_hf.files import replacing, write_json
from hkt_hf.training import build_model_and_tokenizer, train


matplotlib.use("Agg")
from matplotlib import pyplot as plt


RESULTS = Path(__file__).resolve().parent.parent / "results"
WIDTHS = (32, 64, 128, 256, 512)
HEAD_DIM = 16
NUM_EXAMPLES = 16


def main(words: list[str]) -> None:
    """Measure, train, draw."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    name, overrides = (words[0], words[1:]) if words and not words[0].startswith("--") else ("listops-hkt-tiny", words)
    fields = ["--model.position_embedding_type", "absolute", "--model.downsample_kernel_size", "2"]
    config = load_experiment(name, [*fields, *overrides])
    task = load_data(config.data)
    tokenizer = build_model_and_tokenizer(config, task)[1]
    texts = task.splits["validation"]["text"][:NUM_EXAMPLES]
    length = config.tokenizer.max_length
    batch = dict(tokenizer(texts, truncation=True, max_length=length, padding=True, return_tensors="pt"))

    def build(width: int):
        fields = {"hidden_size": width, "head_dim": HEAD_DIM, "num_attention_heads": width // HEAD_DIM}
        model = build_model_and_tokenizer(replace(config, model={**config.model, **fields}), task)[0]
        initialize_by_name(model, config.seed)
        return model

    widths = by_width(build, WIDTHS, batch)
    history = Path(config.output_dir).with_name(f"{Path(config.output_dir).name}-gaussianity.json")
    metrics = train(config, callbacks=[GaussianityCallback(batch, history)])
    epochs = json.loads(history.read_text(encoding="utf-8"))
    result = {
        "command": " ".join(["python scripts/gaussianity.py", *words]),
        "by_width": [_summary(widths, "hidden_size", width) for width in WIDTHS],
        "by_epoch": [{"epoch": entry["epoch"], **_summary(entry["report"])} for entry in epochs],
        "test": metrics["test"],
        **environment(),
    }
    write_json(RESULTS / "gaussianity.json", result)
    with replacing(RESULTS / "gaussianity.png") as temporary:
        _plot(result, temporary)


def _summary(report: list[dict], key: str | None = None, value: int | None = None) -> dict:
    """Mean kurtosis over heads by layer and level, and the shares of rejections at 1%, by kurtosis and by skewness."""
    found = [entry for entry in report if key is None or entry[key] == value]
    summary: dict = {} if key is None else {key: value}
    summary["expected_kurtosis"] = found[0]["expected_kurtosis"]
    for of in ("queries", "keys"):
        for level in sorted({entry["level"] for entry in found}):
            for layer in sorted({entry["layer"] for entry in found}):
                each = [e for e in found if (e["of"], e["level"], e["layer"]) == (of, level, layer)]
                summary[f"{of}, layer {layer}, level {level}"] = {
                    "kurtosis": round(float(np.mean([entry["kurtosis"] for entry in each])), 2),
                    "rejected": round(float(np.mean([entry["kurtosis_p_value"] < 0.01 for entry in each])), 3),
                    "rejected_by_skewness": round(float(np.mean([e["skewness_p_value"] < 0.01 for e in each])), 3),
                    "samples": each[0]["num_samples"],
                }
    return summary


def _plot(result: dict, path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for axes, part, x, label in (
        (panels[0], "by_width", "hidden_size", "width, untrained"),
        (panels[1], "by_epoch", "epoch", "epoch of training"),
    ):
        rows = result[part]
        for name in (name for name in rows[0] if name.startswith("queries")):
            axes.plot([row[x] for row in rows], [row[name]["kurtosis"] for row in rows], "o-", label=name)
        axes.axhline(rows[0]["expected_kurtosis"], color="black", linestyle="--", label="Gaussian")
        axes.set_xlabel(label)
        axes.set_yscale("log")
    panels[0].set_xscale("log", base=2)
    panels[0].set_ylabel("Mardia's kurtosis")
    panels[1].legend(fontsize=7)
    figure.savefig(path, format="png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main(sys.argv[1:])
