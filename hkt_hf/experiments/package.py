"""The best checkpoint of a task as one archive: model, code, tokenizer, and a card with what all runs measured."""

import gzip
import io
import json
import tarfile
from pathlib import Path

from ..files import replacing
from ..hub import release_files
from ..training import METRICS_FILE
from .arms import parse_arm
from .records import FINISHED, ArmRuns, Section, read_records, sections
from .report import accuracy_table, gain_table


CARD = "README.md"
COMPARISON = "## How it compares"


def best_run(section: Section) -> tuple[ArmRuns, dict]:
    """The finished final run of HKT with the best validation accuracy, of arms that a configuration describes whole.

    Args:
        section ([`~hkt_hf.experiments.records.Section`]): one task under one protocol.

    Returns:
        `tuple`: the arm and the record of the run.

    Raises:
        ValueError: no such run.
    """
    found = [
        (arm, record)
        for arm in section.arms
        if arm.name == "hkt" or arm.name.startswith("hkt-")
        for record in arm.finished.values()
        if parse_arm(arm.name)[0].is_checkpoint
    ]
    if not found:
        raise ValueError(f"{section.title}: no final run of HKT has finished")
    return max(found, key=lambda pair: (pair[1]["validation_accuracy"], -pair[1]["seed"]))


def package_best(results: str | Path, runs: str | Path, task: str, protocol: str, output: str | Path) -> Path:
    """Pack the best checkpoint of a task into `OUTPUT/TASK-PROTOCOL.tar.gz`.

    Where the checkpoint is gone but the archive that is there holds that run, its card alone is written anew.

    Args:
        results (`str` or `Path`): folder of the records of `hkt reproduce`.
        runs (`str` or `Path`): folder of its checkpoints.
        task (`str`): `"listops"`, `"cifar10"`, `"imdb"` or `"imdb-words"`.
        protocol (`str`): `"cpu"` or `"paper"`.
        output (`str` or `Path`): folder to write to; made if it does not exist.

    Returns:
        `Path`: the archive. It holds one folder, `TASK-PROTOCOL`, which `from_pretrained` and `hkt evaluate` take. The
        same checkpoint and records give the same bytes.

    Raises:
        FileNotFoundError: no records; or the checkpoint's folder is gone and no archive holds that run.
        ValueError: no finished run of HKT for the task and protocol.
    """
    records = [record for record in read_records(results) if (record["task"], record["protocol"]) == (task, protocol)]
    if not records:
        raise ValueError(f"{results} holds no record of the task {task!r} under the protocol {protocol!r}")
    (section,) = sections(records)
    arm, record = best_run(section)
    suffix = "-rope" if arm.positions == "rope" else ""
    folder = Path(runs) / task / protocol / f"{arm.name}{suffix}" / f"final-seed{record['seed']}"
    name = f"{task}-{protocol}"
    path = Path(output) / f"{name}.tar.gz"
    if folder.is_dir():
        files = {file.name: file.read_bytes() for file in release_files(folder)}
    elif (files := _packed(path)) is None or not _is_of(record, json.loads(files[METRICS_FILE])):
        raise FileNotFoundError(
            f"the best run's checkpoint {folder} is not there, and {path} does not hold it: `hkt reproduce` writes it"
        )
    card = files[CARD].decode("utf-8").replace(folder.name, name).partition(f"\n{COMPARISON}")[0]
    files[CARD] = (card.rstrip() + "\n\n" + "\n".join(_comparison(section, arm, record)) + "\n").encode("utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(_archive(name, files))
    return path


def _comparison(section: Section, arm: ArmRuns, record: dict) -> list[str]:
    accuracy = 100 * record["test_accuracy"]
    count = sum(run["status"] == FINISHED for run in arm.final.values())
    return [
        COMPARISON,
        "",
        f"{section.title[0].upper()}{section.title[1:]}: this is the run of HKT with the best validation accuracy (arm "
        f"`{arm.label}`, seed {record['seed']}, of {count}); its test accuracy is {accuracy:.2f}%. Expect that of another "
        "seed to be the mean of the arm.",
        "",
        *accuracy_table(section),
        "",
        *gain_table(section),
    ]


def _packed(path: Path) -> dict[str, bytes] | None:
    """The files of an archive by name; `None` if there is no archive."""
    if not path.is_file():
        return None
    with tarfile.open(path) as archive:
        return {Path(entry.name).name: archive.extractfile(entry).read() for entry in archive if entry.isfile()}


def _is_of(record: dict, metrics: dict) -> bool:
    """Whether a checkpoint with these metrics is that of the record."""
    return (metrics["seed"], metrics["validation"]["accuracy"], metrics["test"]["accuracy"]) == (
        record["seed"],
        record["validation_accuracy"],
        record["test_accuracy"],
    )


def _archive(name: str, files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    # Neither times nor owners: the bytes depend on the content alone.
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w") as archive,
    ):
        for file, content in sorted(files.items()):
            entry = tarfile.TarInfo(f"{name}/{file}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()
