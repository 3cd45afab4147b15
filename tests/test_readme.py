"""The README's code runs and prints what it says; its table is the one that `results/` holds."""

import contextlib
import io
import json
import re
from pathlib import Path

from hkt_hf.config import build_experiment
from hkt_hf.presets import parse_yaml


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


def test_the_yaml_example_is_valid():
    (text,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    config = build_experiment(parse_yaml(text, source="README.md"))
    assert config.data.path == "reviews.csv"


def test_the_quickstart_table_is_the_measured_one():
    result = json.loads((ROOT / "results" / "quickstart.json").read_text(encoding="utf-8"))
    assert f"| majority class | | | {result['majority']:.1%} |" in README
    for arm, name in (("flat", "flat attention"), ("hkt", "HKT, 3 levels")):
        row = f"| {name} | {result['parameters'][arm]:,} | {result['seconds'][arm]:.0f} | {result[arm]:.1%} |"
        assert row in README
    assert result["hkt"] >= result["majority"] + 0.10


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
