"""The commands `hkt reproduce`, `hkt report` and `hkt package`."""

import argparse
import os
import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .records import PROTOCOLS, TASK_TITLES


def add_reproduce_parser(commands) -> None:
    """Add `reproduce` to the subcommands of `hkt`."""
    parser = commands.add_parser(
        "reproduce",
        help="train HKT, its flat twins and other models on a task of the paper, over several seeds",
        description="Runs configs/reproduce/TASK-PROTOCOL.yaml: each arm is searched over the same grid on the "
        "validation split and trained with each seed; the test split is read by the final runs alone. Every run writes "
        "a JSON record; finished runs are kept, interrupted ones go on. Options --section.key VALUE change the file, "
        "e.g. --data.path data/imdb. `hkt report` makes tables and plots of the records.",
    )
    _add_experiment_arguments(parser)
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="flat, hkt-rope, ...; default: all of the protocol")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="default: those of the protocol")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side; default: 1")
    parser.add_argument("--threads", type=int, help="threads of each run; default: the cores shared out")


def _add_experiment_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", choices=TASK_TITLES)
    parser.add_argument("--protocol", choices=PROTOCOLS, required=True, help="cut down for a CPU, or in full")
    parser.add_argument(
        "--results", type=Path, default=Path("results/reproduce"), help="folder of the records; default: %(default)s"
    )
    parser.add_argument(
        "--runs",
        type=Path,
        help="folder of the checkpoints; default: runs/NAME with the name of the folder of records",
    )


def _runs(options: argparse.Namespace) -> Path:
    return options.runs or Path("runs") / options.results.resolve().name


def run_reproduce(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Do what the options of `hkt reproduce` say.

    Raises:
        ValueError: a bad option, data that can't be used, records of other settings, or runs that failed.
        FileNotFoundError: data that is not there.
    """
    from .protocol import load_protocol
    from .reproduce import Sweep, reproduce

    for name in ("jobs", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")
    protocol = load_protocol(options.task, options.protocol, overrides, arms=options.arms, seeds=options.seeds)
    threads = options.threads or max(1, (os.cpu_count() or 1) // options.jobs)
    command = shlex.join(["hkt", *options.words])
    sweep = Sweep(protocol, options.results, _runs(options), threads=threads, command=command)
    with _termination_as_interruption():
        outcome = reproduce(sweep, options.jobs)
    lost = [f"{run.arm} {run.name}" for run in [*outcome["failed"], *outcome["left_out"]]]
    print(f"{len(outcome['finished'])} runs finished; records: {sweep.results}")
    if lost:
        raise ValueError(f"{len(lost)} runs failed or need one that did: {', '.join(lost)}; logs: {sweep.folders}")


@contextmanager
def _termination_as_interruption() -> Iterator[None]:
    """Take SIGTERM for Ctrl-C, which ends the processes of the runs, too."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def add_report_parser(commands) -> None:
    """Add `report` to the subcommands of `hkt`. What builds the report is looked up when the command runs."""
    report = commands.add_parser(
        "report",
        help="tables and plots of what `hkt reproduce` measured",
        description="Write report.md with tables and plots, built from the JSON records of `hkt reproduce` alone: every "
        "seed, gains paired by seed with t and bootstrap intervals, the search, the hours, learning curves, level "
        "weights over training, and accuracy against cost. Runs that failed or are missing are named. Every *.json file "
        "below the folder of results must be the record of one run. Nothing is trained.",
    )
    report.add_argument(
        "--results", type=Path, default=Path("results/reproduce"), help="folder of the records; default: %(default)s"
    )
    report.add_argument("--output", type=Path, help="folder to write to; default: that of the records")


def run_report(options: argparse.Namespace) -> None:
    """Write the report; print its short table of gains and the paths of what was written.

    Args:
        options (`argparse.Namespace`): `results` and `output`.

    Raises:
        FileNotFoundError: no such folder, or no records in it.
        ValueError: a file that is no record, or two records of the same run.
    """
    from .records import read_records
    from .report import summary_table, write_report

    paths = write_report(options.results, options.output or options.results)
    print(summary_table(read_records(options.results)))
    for path in paths:
        print(path)


def add_package_parser(commands) -> None:
    """Add `package` to the subcommands of `hkt`."""
    package = commands.add_parser(
        "package",
        help="pack the best checkpoint of a reproduced task, with its card, into one archive",
        description="Of the final runs of HKT, the one with the best validation accuracy: weights, code, tokenizer, and a "
        "card with what all arms measured, as TASK-PROTOCOL.tar.gz.",
    )
    _add_experiment_arguments(package)
    package.add_argument("--output", type=Path, default=Path("results/checkpoints"), help="default: %(default)s")


def run_package(options: argparse.Namespace) -> None:
    """Pack the checkpoint and print the path of the archive; errors as in [`~.package.package_best`]."""
    from .package import package_best

    print(package_best(options.results, _runs(options), options.task, options.protocol, options.output))
