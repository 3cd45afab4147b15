"""The command `hkt report`."""

import argparse
from pathlib import Path


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
