"""The checkpoints in `results/checkpoints`: each gives the accuracy of its card, which is that of its record."""

import json
import re
import tarfile
from pathlib import Path

import pytest

from hkt_hf.experiments.package import best_run
from hkt_hf.experiments.records import read_records, sections
from hkt_hf.training import evaluate_checkpoint


ROOT = Path(__file__).resolve().parents[2]
ARCHIVES = sorted((ROOT / "results" / "checkpoints").glob("*.tar.gz"))
DATA = ROOT.parent / "shared" / "data"  # beside the repository: real data that the tests do not need elsewhere
TOLERANCE = 0.001  # other processors round differently: a few examples of 5,000 may change sides


def unpacked(archive, folder):
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda archive: archive.name)
def test_an_archive_is_small_whole_and_of_the_best_run(archive, tmp_path):
    assert archive.stat().st_size < 4 * 2**20
    checkpoint = unpacked(archive, tmp_path)
    names = {path.name for path in checkpoint.iterdir()}
    assert {"config.json", "model.safetensors", "modeling_hkt.py", "tokenizer.json", "README.md", "hkt.yaml"} <= names
    task, protocol = archive.name.removesuffix(".tar.gz").split("-")
    records = read_records(ROOT / "results" / "reproduce")
    (section,) = [each for each in sections(records) if (each.task, each.protocol) == (task, protocol)]
    _, record = best_run(section)
    metrics = json.loads((checkpoint / "metrics.json").read_text())
    assert metrics["test"]["accuracy"] == record["test_accuracy"] and metrics["seed"] == record["seed"]
    card = (checkpoint / "README.md").read_text()
    assert f"| test | accuracy | {record['test_accuracy']:.4f} |" in card
    report = (ROOT / "results" / "reproduce" / "report.md").read_text().splitlines()
    compared = [line for line in card.partition("## How it compares")[2].splitlines() if line.startswith("|")]
    assert compared and set(compared) <= set(report), "pack it again: hkt package"


@pytest.mark.parametrize(
    "archive",
    [
        pytest.param(path, id=path.name, marks=[] if path.name.startswith("listops") else pytest.mark.slow)
        for path in ARCHIVES
    ],
)
def test_an_archive_gives_the_accuracy_of_its_card(archive, tmp_path, monkeypatch):
    task = archive.name.partition("-")[0]
    overrides = []
    if task != "listops":
        if not (DATA / task).is_dir():
            pytest.skip(f"the data of {task} is not at hand")
        overrides = ["--data.path", str(DATA / task)]
    checkpoint = unpacked(archive, tmp_path)
    (stated,) = re.findall(r"\| test \| accuracy \| ([0-9.]+) \|", (checkpoint / "README.md").read_text())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert abs(evaluate_checkpoint(checkpoint, overrides)["accuracy"] - float(stated)) <= TOLERANCE
    assert not list(Path().iterdir())  # no trace of the folder that it was trained in
