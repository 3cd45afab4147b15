"""What made a result: versions, machine and commit, for the JSON files and model cards."""

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


PACKAGES = ("hkt-hf", "torch", "transformers", "datasets", "accelerate", "evaluate", "huggingface-hub", "tokenizers")


def environment(packages: Sequence[str] = PACKAGES) -> dict[str, object]:
    """What every result carries: `versions` of Python and of the packages, `machine`, and `commit` where known."""
    return {
        "versions": {"python": platform.python_version(), **_package_versions(packages)},
        "machine": machine(),
        "commit": commit(),
    }


def machine() -> str:
    """The processor that trains, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return processor()


def processor() -> str:
    """The CPU of this machine and the number of its cores, in words."""
    return f"{os.cpu_count()} x {_processor_name()}"


def commit() -> str | None:
    """Git commit this package was run from, with `-dirty` where tracked files were changed since.

    `None` where it was installed without its repository, or where git is not at hand.
    """
    source = Path(__file__).resolve().parent.parent
    if not (source / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(source), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else None


def _package_versions(packages: Sequence[str]) -> dict[str, str]:
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
