"""The built wheel, installed where the source tree is not: it imports, trains a step, saves and reloads."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["pyproject.toml", "README.md", "LICENSE", "hkt_hf", "modeling", "configs"]

RELOAD = """
import sys
from pathlib import Path
import hkt_hf
from transformers import AutoModelForSequenceClassification, AutoTokenizer

site_packages, checkpoint = sys.argv[1:]
for module in (hkt_hf, hkt_hf.modeling):
    assert Path(module.__file__).is_relative_to(site_packages), module.__file__
model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
assert type(model).__module__ == "hkt_hf.modeling.modeling_hkt"
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
print(tuple(model(**tokenizer(["[MAX 1 2 ]"], return_tensors="pt")).logits.shape))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copyfile
        copy(source, tree / name)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            tree / "dist",
            tree,
        ],
        check=True,
    )
    (path,) = (tree / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A virtual environment that has the wheel and, from the running one, its dependencies but not the project."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site_packages = folder / "lib" / version / "site-packages"
    # Folders named in a .pth file join the path, but their own .pth files (the editable install's) are not read.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel], check=True
    )
    return folder, site_packages


def test_the_wheel_holds_code_configurations_and_licence(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {"hkt_hf/cli.py", "hkt_hf/data/listops.py", "hkt_hf/modeling/modeling_hkt.py", "hkt_hf/py.typed"}
    expected |= {"hkt_hf/configs/listops-hkt-tiny.yaml", "hkt_hf/configs/models/hkt-base.yaml"}
    assert expected <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("modeling/", "tests/", "configs/"))]


def test_the_wheel_trains_a_step_saves_and_reloads(installed, tmp_path):
    folder, site_packages = installed
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    options = {
        "--training.max_steps": "1",
        "--training.per_device_train_batch_size": "4",
        "--data.listops.num_train": "8",
        "--data.listops.num_validation": "4",
        "--data.listops.num_test": "4",
        "--output_dir": tmp_path / "run",
    }
    words = [str(word) for option in options.items() for word in option]
    for command in (
        [folder / "bin" / "hkt", "train", "listops-hkt-tiny", *words],
        [folder / "bin" / "python", "-c", RELOAD, site_packages, tmp_path / "run"],
    ):
        process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.strip() == "(1, 10)"
