"""The README's code runs and prints what it says; its table is the one that `results/` holds."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest

from hkt_hf.config import load_experiment
from hkt_hf.training import train


ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_snippets_print_what_they_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    blocks = re.findall(r"```(python|text)\n(.*?)```", README, flags=re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python", "text"] * (len(blocks) // 2)
    namespace: dict = {}
    for (_, code), (_, expected) in zip(blocks[::2], blocks[1::2], strict=True):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), namespace)
        lines = printed.getvalue().strip().splitlines()
        wanted = expected.strip().splitlines()
        assert lines[-len(wanted) :] == wanted


def test_the_yaml_example_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (text,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    Path("reviews.yaml").write_text(text)
    rows = [f"a film of {i} minutes,{i % 5 + 1}" for i in range(60)]
    Path("reviews.csv").write_text("\n".join(["review,stars", *rows]) + "\n")
    overrides = ["--model.hidden_size", "16", "--model.intermediate_size", "16", "--training.disable_tqdm", "true"]
    report = train(load_experiment("reviews.yaml", overrides))
    assert report["steps"] == 6 and set(report["test"]) == {"loss", "accuracy"}


def test_the_quickstart_table_is_the_measured_one():
    result = json.loads((ROOT / "results" / "quickstart.json").read_text(encoding="utf-8"))
    assert f"| majority class | | | {result['majority']:.1%} |" in README
    for arm, name in (("flat", "flat attention"), ("hkt", "HKT, 3 levels")):
        row = f"| {name} | {result['parameters'][arm]:,} | {result['seconds'][arm]:.0f} | {result[arm]:.1%} |"
        assert row in README
    assert result["hkt"] >= result["majority"] + 0.10


def test_the_pretraining_figures_are_the_measured_ones():
    result = json.loads((ROOT / "results" / "pretrain_then_finetune.json").read_text(encoding="utf-8"))
    steps = (
        "1,000 steps of masked LM, then 1,000 of classification",
        "2,000 steps of classification (the same steps and tokens)",
        "1,000 steps of classification",
    )
    for arm, name in zip(("pretrained", "scratch", "short"), steps, strict=True):
        (row,) = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", README, flags=re.MULTILINE)
        shown = [float(value.rstrip("%")) for value in row.split(", ")]
        assert shown == pytest.approx([100 * accuracy for accuracy in result["test_accuracy"][arm]], abs=0.051)
        rates = [float(rate) for rate in result["search"][arm]]
        assert len(rates) == 5 and min(rates) < result["learning_rate"][arm] < max(rates)
    flat = " ".join(README.split())
    for control, text in (
        ("scratch", "loses 4.6 points (paired t over three seeds, 95% interval -6.4 to -2.7)"),
        ("short", "(-1.0, -2.3 to +0.3)"),
    ):
        assert text in flat
        difference = [100 * result["difference"][control][key] for key in ("mean", "low", "high")]
        shown = {"scratch": [-4.6, -6.4, -2.7], "short": [-1.0, -2.3, 0.3]}[control]
        assert difference == pytest.approx(shown, abs=0.051)
    assert {round(measured["perplexity"], 1) for measured in result["masked_lm"]} == {7.6}


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
