"""What made a result: versions, machine and commit, for the JSON files and model cards."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


PACKAGES = ("hkt-hf", "torch", "transformers", "datasets", "accelerate", "evaluate", "huggingface-hub", "tokenizers")


def environment() -> dict[str, object]:
    """Versions of Python and of the packages, the machine, and the commit of the code where it is known."""
    return {"python": platform.python_version(), **_package_versions(), "machine": machine(), "commit": commit()}


def machine() -> str:
    """The processor that trains, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} x {_processor_name()}"


def commit() -> str | None:
    """Hash of the git commit this package was run from, or `None` where it was installed without its repository."""
    source = Path(__file__).resolve().parent.parent
    if not (source / ".git").exists():
        return None
    result = subprocess.run(["git", "-C", str(source), "rev-parse", "HEAD"], capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else None


def _package_versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
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
