"""The source distribution of the installed transformers, whose tests the project runs on its own models."""

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock


CACHE = Path(__file__).resolve().parents[2] / ".cache"
# What a distribution must have to be of use, and what its tests expect around them and find empty.
NEEDED_FILE = "tests/test_modeling_common.py"
EMPTY_FILES = ("tests/__init__.py", "src/transformers/__init__.py")


class SourceDistributionUnavailable(Exception):
    """The source distribution can't be had; the message says why."""


def library_source(cache: Path = CACHE) -> Path:
    """Folder with `tests/` of the installed transformers; downloaded once by package name, then read from `cache`.

    A folder is either whole or not there: it gets its name when it is complete. Processes wait for each other.

    Raises:
        SourceDistributionUnavailable: there is no such distribution, no network, or no tests in it.
    """
    installed = version("transformers")
    folder = cache / f"transformers-{installed}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "lock"):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=cache, prefix="download-") as temporary:
                archive = _download(installed, Path(temporary))
                os.replace(_unpack(archive, installed, Path(temporary) / "unpacked"), folder)
    return folder


def _download(installed: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    # Without build isolation pip reads the metadata with the setuptools that is installed: nothing else is downloaded.
    command += ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", str(folder)]
    result = subprocess.run([*command, f"transformers=={installed}"], capture_output=True, text=True)
    archives = list(folder.glob("*.tar.gz"))
    if result.returncode != 0 or len(archives) != 1:
        lines = (result.stderr or result.stdout).strip().splitlines() or [f"exit status {result.returncode}"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise SourceDistributionUnavailable(f"pip can't download transformers=={installed} as a source: {reason}")
    return archives[0]


def _unpack(archive: Path, installed: str, target: Path) -> Path:
    """Unpack `tests/` of the archive into `target`; returns the folder of the distribution."""
    root = f"transformers-{installed}"
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(target, [m for m in tar.getmembers() if m.name.startswith(f"{root}/tests/")], filter="data")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise SourceDistributionUnavailable(f"{archive.name} can't be unpacked: {error}") from error
    folder = target / root
    if not (folder / NEEDED_FILE).is_file():
        raise SourceDistributionUnavailable(f"{archive.name} has no {NEEDED_FILE}")
    for name in EMPTY_FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder
