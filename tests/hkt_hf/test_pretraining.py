"""The experiment on pretraining, in miniature; and the statistics of its result."""

import json
import math
import statistics

import pytest
from PIL import Image

from hkt_hf.config import build_experiment
from hkt_hf.experiments import pretraining
from hkt_hf.experiments.pretraining import ARMS, Protocol, plot, pretrain_then_finetune
from hkt_hf.experiments.statistics import paired_difference


SMALL = {
    "model": {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 16,
    },
    "data": {
        "task": "listops",
        "listops": {"min_length": 5, "max_length": 16, "num_train": 64, "num_validation": 20, "num_test": 20},
    },
    "tokenizer": {"max_length": 16},
    "training": {
        "per_device_train_batch_size": 16,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    },
}
PROTOCOL = Protocol(
    pretrain_steps=2, finetune_steps=3, pretrain_learning_rate=1e-3, learning_rates=(1e-3, 1e-2), seeds=(0, 1)
)


def config(output_dir, **changes):
    return build_experiment({**SMALL, "output_dir": str(output_dir), **changes})


def test_the_experiment_in_miniature(tmp_path, monkeypatch):
    """Interrupted once: what is finished is not run again."""
    done = []
    real_train = pretraining.train

    def train(run):
        if len(done) == 5:
            done.append(None)
            raise KeyboardInterrupt
        done.append(run)
        return real_train(run)

    monkeypatch.setattr(pretraining, "train", train)
    with pytest.raises(KeyboardInterrupt):
        pretrain_then_finetune(config(tmp_path / "runs"), PROTOCOL)
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/model.safetensors")}
    assert finished
    result = pretrain_then_finetune(config(tmp_path / "runs"), PROTOCOL)
    assert (
        finished.items()
        <= {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/model.safetensors")}.items()
    )

    reports = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/metrics.json")}
    assert {name: report["steps"] for name, report in reports.items() if name.endswith("seed0")} == {
        "pretraining-seed0": 2,
        **{
            f"{arm}-lr{result['learning_rate'][arm]:g}-seed0": {"pretrained": 3, "scratch": 5, "short": 3}[arm]
            for arm in ARMS
        },
    }
    for arm in ARMS:
        tried = {rate: reports[f"{arm}-lr{rate:g}-seed100"]["validation"]["accuracy"] for rate in (1e-3, 1e-2)}
        assert tried[result["learning_rate"][arm]] == max(tried.values())
        assert result["test_accuracy"][arm] == [
            reports[f"{arm}-lr{result['learning_rate'][arm]:g}-seed{seed}"]["test"]["accuracy"] for seed in (0, 1)
        ]
    assert [curve["step"] for curve in result["validation_curves"]["pretrained"]] == [[5]] * 2
    lengths = {arm: sum(tokens) for arm, tokens in result["tokens"].items()}
    assert (
        lengths["pretrained"] == pytest.approx(lengths["scratch"], rel=0.1) and lengths["short"] < lengths["scratch"]
    )
    checkpoints = {run.model.get("checkpoint") for run in done if run and "pretrained" in run.output_dir}
    assert checkpoints == {str(tmp_path / "runs" / f"pretraining-seed{seed}") for seed in (0, 1, 100)}

    assert [set(measured) for measured in result["masked_lm"]] == [{"loss", "masked_accuracy", "perplexity"}] * 2
    json.dumps(result)
    plot(result, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.size[0] > 600


def test_what_is_refused(tmp_path):
    for changes, message in (
        ({"pretrain_steps": 0}, "`pretrain_steps` must be at least 1, got 0"),
        ({"learning_rates": ()}, "`learning_rates`"),
        ({"seeds": (3,)}, r"`seeds` must be at least two different ones for an interval, got \[3\]"),
        ({"seeds": (0, 100)}, r"`search_seed` \(100\) must not be one of `seeds`"),
    ):
        with pytest.raises(ValueError, match=message):
            Protocol(**{**vars(PROTOCOL), **changes})
    for changes in ({"objective": "masked_lm"}, {"model": {"checkpoint": str(tmp_path)}}):
        with pytest.raises(ValueError, match="must be that of a classifier from scratch"):
            pretrain_then_finetune(config(tmp_path / "runs", **changes), PROTOCOL)


def test_the_interval_is_that_of_student():
    treated, control = [0.5, 0.62, 0.55], [0.52, 0.55, 0.5]
    result = paired_difference(treated, control)
    differences = [a - b for a, b in zip(treated, control, strict=True)]
    half = 4.302653 * statistics.stdev(differences) / math.sqrt(3)  # 97.5 % quantile of t with 2 degrees of freedom
    mean = statistics.mean(differences)
    assert result["mean"] == pytest.approx(mean) and result["t_quantile"] == pytest.approx(4.302653, rel=1e-6)
    assert (result["low"], result["high"]) == pytest.approx((mean - half, mean + half), rel=1e-5)
    for pair in (([0.1], [0.2]), ([0.1, 0.2], [0.3])):
        with pytest.raises(ValueError, match="must be pairs, at least two"):
            paired_difference(*pair)
