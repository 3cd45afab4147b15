"""Getting the library's source distribution, without a network."""

import io
import subprocess
import tarfile

import pytest
import source_distribution
from source_distribution import SourceDistributionUnavailable, library_source


VERSION = "1.2.3"


def archive(folder, *names):
    with tarfile.open(folder / f"transformers-{VERSION}.tar.gz", "w:gz") as tar:
        for name in names:
            info = tarfile.TarInfo(f"transformers-{VERSION}/{name}")
            info.size = 4
            tar.addfile(info, io.BytesIO(b"text"))


@pytest.fixture
def pip(monkeypatch):
    """Stands for pip: calls `pip.download(folder)`, or fails with its message."""

    class Pip:
        calls = 0

        def download(self, folder):
            archive(folder, "tests/test_modeling_common.py", "setup.py")

        def __call__(self, command, **kwargs):
            self.calls += 1
            assert command[-1] == f"transformers=={VERSION}"
            try:
                self.download(source_distribution.Path(command[command.index("--dest") + 1]))
            except OSError as error:
                return subprocess.CompletedProcess(command, 1, "", f"WARNING: slow\nERROR: {error}\nnote: none")
            return subprocess.CompletedProcess(command, 0, "", "")

    pip = Pip()
    monkeypatch.setattr(source_distribution.subprocess, "run", pip)
    monkeypatch.setattr(source_distribution, "version", lambda package: VERSION)
    return pip


def contents(folder):
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != "lock"
    )


def test_it_is_downloaded_once_and_only_its_tests_are_kept(tmp_path, pip):
    for _ in range(2):
        folder = library_source(tmp_path / "cache")
    assert pip.calls == 1
    assert contents(folder) == ["src/transformers/__init__.py", "tests/__init__.py", "tests/test_modeling_common.py"]
    assert (folder / "tests/test_modeling_common.py").read_text() == "text"


def failing(folder):
    raise OSError("No matching distribution")


def without_tests(folder):
    archive(folder, "setup.py")


def truncated(folder):
    archive(folder, "tests/test_modeling_common.py")
    path = folder / f"transformers-{VERSION}.tar.gz"
    path.write_bytes(path.read_bytes()[:100])


def nothing(folder):
    pass


@pytest.mark.parametrize(
    ("download", "message"),
    [
        (failing, f"transformers=={VERSION} .*ERROR: No matching distribution"),
        (without_tests, "has no tests/test_modeling_common.py"),
        (truncated, "can't be unpacked"),
        (nothing, "can't download"),
    ],
)
def test_what_can_not_be_had_is_named_and_leaves_nothing_behind(tmp_path, pip, download, message):
    pip.download = download
    with pytest.raises(SourceDistributionUnavailable, match=message):
        library_source(tmp_path)
    assert contents(tmp_path) == []
    del pip.download
    assert library_source(tmp_path).is_dir()


def test_an_interrupted_download_leaves_nothing_behind(tmp_path, pip):
    def interrupted(folder):
        archive(folder, "tests/test_modeling_common.py")
        raise KeyboardInterrupt

    pip.download = interrupted
    with pytest.raises(KeyboardInterrupt):
        library_source(tmp_path)
    assert contents(tmp_path) == []


def test_a_path_that_leads_out_of_the_folder_is_refused(tmp_path, pip):
    pip.download = lambda folder: archive(folder, "tests/../../../outside", "tests/test_modeling_common.py")
    with pytest.raises(SourceDistributionUnavailable, match="can't be unpacked"):
        library_source(tmp_path / "cache")
    assert not (tmp_path / "outside").exists()
