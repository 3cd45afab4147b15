"""Run the common tests on HKT, and on BERT and Llama beside it; write `results/common_tests.json` and `.md`.

usage: python tests/common/report.py
"""

import json
import re
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
from known_skips import explanation

from hkt_hf.environment import environment


ROOT = Path(__file__).resolve().parents[2]
FILES = ("tests/common/test_common_hkt.py", "tests/common/library_models.py")
# Which model inside the library a class is compared with: one of the same kind.
TWINS = {"HKTModelTest": "BertModelTest", "HKTDecoderModelTest": "LlamaModelTest"}


class Recorder:
    """Outcome of each test, and why it was skipped."""

    def __init__(self):
        self.outcomes = defaultdict(set)
        self.reasons = defaultdict(set)

    def pytest_runtest_logreport(self, report):
        test = tuple(report.nodeid.split("::")[1:])
        subtest = type(report).__name__ == "SubtestReport"
        if report.failed or report.skipped or report.when == "call":
            self.outcomes[test].add((subtest, report.outcome))
        if report.skipped:
            self.reasons[test].add(report.longrepr[2].removeprefix("Skipped: "))

    def outcome(self, test) -> str:
        outcomes = self.outcomes[test]
        if any(outcome == "failed" for _, outcome in outcomes):
            return "failed"
        # A test that leaves every part out is reported as passed.
        skipped, passed = (True, "skipped") in outcomes, (True, "passed") in outcomes
        return "skipped" if (False, "skipped") in outcomes or (skipped and not passed) else "passed"

    def counts(self) -> dict[str, dict[str, int]]:
        counts = defaultdict(lambda: {"passed": 0, "failed": 0, "skipped": 0})
        for test in self.outcomes:
            counts[test[0]][self.outcome(test)] += 1
        return dict(counts)

    def skips(self) -> list[dict[str, object]]:
        """The tests that HKT skips by what the reason means, and which models inside the library skip them too."""
        groups = defaultdict(lambda: defaultdict(set))
        for test, reasons in self.reasons.items():
            if test[0] in TWINS and self.outcome(test) == "skipped":
                for meaning in {explanation(reason) for reason in reasons}:
                    groups[meaning][test[1]].update([test[0], *map(_general, reasons)])
        skipped = {test for test in self.outcomes if self.outcome(test) == "skipped"}
        result = []
        for meaning, tests in sorted(groups.items(), key=lambda item: str(item[0])):
            for name, found in sorted(tests.items()):
                classes = sorted(found & TWINS.keys())
                result.append(
                    {
                        "test": name,
                        "meaning": meaning,
                        "reasons": sorted(found - TWINS.keys()),
                        "classes": classes,
                        "library_models_too": [twin for twin in TWINS.values() if (twin, name) in skipped],
                    }
                )
        return result


def _general(reason: str) -> str:
    """The reason without the name of the class, so that equal reasons are equal."""
    reason = re.sub(r"<class '[\w.]+'>", "the class", reason)
    reason = re.sub(r"^\w+::\w+ is skipped: ", "", reason)
    return re.sub(r"`?HKT\w+`?", "the class", reason)


def table(result: dict[str, object]) -> str:
    lines = [
        "# transformers' common model tests on HKT",
        "",
        f"Written by `{result['command']}`: transformers {result['versions']['transformers']}, "
        f"torch {result['versions']['torch']}, {result['machine']}.",
        "",
        "| | passed | failed | skipped |",
        "| --- | --- | --- | --- |",
        *(f"| {name} | {c['passed']} | {c['failed']} | {c['skipped']} |" for name, c in result["counts"].items()),
        "",
        "Every test that HKT skips, and the models inside the library that skip it in the same run:",
        "",
        "| test | why | also skipped by |",
        "| --- | --- | --- |",
    ]
    for skip in result["skips"]:
        twins = ", ".join(name.removesuffix("ModelTest") for name in skip["library_models_too"]) or "none"
        lines.append(f"| {skip['test']} | {skip['meaning']}: {'; '.join(skip['reasons'])} | {twins} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    recorder = Recorder()
    start = time.perf_counter()
    status = pytest.main(["-q", "-m", "common", "--rootdir", str(ROOT), *(str(ROOT / f) for f in FILES)], [recorder])
    if not recorder.outcomes:
        return status
    result = {
        "command": "python tests/common/report.py",
        **environment(),
        "seconds": round(time.perf_counter() - start),
        "counts": recorder.counts(),
        "failed": sorted("::".join(test) for test in recorder.outcomes if recorder.outcome(test) == "failed"),
        "skips": recorder.skips(),
    }
    (ROOT / "results" / "common_tests.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (ROOT / "results" / "common_tests.md").write_text(table(result), encoding="utf-8")
    return 0 if not any(test.startswith(tuple(TWINS)) for test in result["failed"]) else 1


if __name__ == "__main__":
    sys.exit(main())
