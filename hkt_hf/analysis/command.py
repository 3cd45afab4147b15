"""The command `hkt analyze`: all instruments on a checkpoint, with plots and a page to look through."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def add_analyze_parser(commands) -> None:
    """Add `analyze` to the subcommands of `hkt`."""
    parser = commands.add_parser(
        "analyze",
        help="what a trained model does: theorems as measurements, attention maps",
        description="Measure a checkpoint on validation examples of the data it was trained on (--data.KEY VALUE names "
        "other data, --text a text of yours): is the score a kernel, which way do heads look, what do levels add, are queries "
        "and keys Gaussian. Writes analysis.json, plots, and attention.html, which needs no network.",
    )
    parser.add_argument("checkpoint", help="folder of a run, or a Hub id")
    parser.add_argument(
        "--out", type=Path, help="folder to write to; default: CHECKPOINT/analysis, or ./analysis for a Hub id"
    )
    parser.add_argument("--text", help="the text whose attention is shown; default: the first example that fits")
    parser.add_argument("--examples", type=int, default=8, help="how many are measured; default: %(default)s")


def run_analyze(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Do what the options of `hkt analyze` say; print a summary and the folder.

    Raises:
        ValueError, TypeError, OSError: a checkpoint, data or text that can't be used.
    """
    from .analyze import analyze, summary

    out = options.out
    if out is None:
        folder = Path(options.checkpoint)
        out = folder / "analysis" if folder.is_dir() else Path("analysis")
    command = " ".join(["hkt", *options.words])
    found = analyze(
        options.checkpoint, out, overrides, text=options.text, num_examples=options.examples, command=command
    )
    print("\n".join(summary(found)))
    print(out)
