"""The command `hkt`: train, evaluate, predict, analyze, push, benchmark, reproduce, report, package."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence

from huggingface_hub.errors import HfHubHTTPError

from .analysis.command import add_analyze_parser, run_analyze
from .benchmark.command import add_benchmark_parser, run_benchmark
from .experiments.command import (
    add_package_parser,
    add_report_parser,
    add_reproduce_parser,
    run_package,
    run_report,
    run_reproduce,
)
from .files import write_json


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command `hkt`."""
    parser = argparse.ArgumentParser(prog="hkt", description="Hierarchical attention on the Hugging Face stack.")
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser(
        "train",
        help="train an experiment; continues where it was interrupted",
        description="Train an experiment. Options --section.key VALUE change what the configuration says, "
        "e.g. --training.learning_rate 1e-3 --model.num_levels 1 --output_dir runs/flat.",
    )
    train.add_argument("config", help="a YAML file, or the name of a packaged configuration, e.g. listops-hkt-tiny")

    evaluate = commands.add_parser(
        "evaluate",
        help="measure a checkpoint",
        description="Measure a checkpoint on the data it was trained on; --data.KEY VALUE names other data.",
    )
    evaluate.add_argument("checkpoint", help="folder of a run, or a Hub id")
    evaluate.add_argument("--split", default="test", choices=("train", "validation", "test"))
    evaluate.add_argument("--out", help="also write the metrics to this JSON file")

    predict = commands.add_parser("predict", help="labels and scores of texts, or tokens for their [MASK]")
    predict.add_argument("checkpoint", help="folder of a run, or a Hub id")
    predict.add_argument("texts", nargs="+", metavar="TEXT")
    predict.add_argument("--json", action="store_true", help="print all labels and scores as JSON")

    push = commands.add_parser("push", help="upload a checkpoint to the Hub, in one commit")
    push.add_argument("checkpoint", help="folder of a finished run")
    push.add_argument("repo_id", help="user/name or organisation/name")
    push.add_argument("--private", action="store_true", help="make a private repository if it is new")
    push.add_argument("--revision", help="branch to commit to")

    add_analyze_parser(commands)
    add_benchmark_parser(commands)
    add_reproduce_parser(commands)
    add_report_parser(commands)
    add_package_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `hkt`.

    Args:
        arguments (sequence of `str`, *optional*): words after `hkt`; those of the process by default.

    Returns:
        `int`: 0, or 1 after an error that the user can mend (its message goes to standard error).
    """
    options, rest = build_parser().parse_known_args(arguments)
    options.words = list(sys.argv[1:] if arguments is None else arguments)
    if rest and options.command not in ("train", "evaluate", "analyze", "reproduce"):
        build_parser().error(f"unrecognized arguments: {' '.join(rest)}")
    # Under `torchrun` or `accelerate launch`: one process speaks, and one does what needs no others.
    is_first = int(os.environ.get("RANK", "0")) == 0
    if not is_first and options.command in (
        "predict",
        "analyze",
        "push",
        "benchmark",
        "reproduce",
        "report",
        "package",
    ):
        return 0
    logging.basicConfig(
        level=logging.INFO if is_first else logging.ERROR, format="%(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        _COMMANDS[options.command](options, rest)
    except KeyboardInterrupt:
        print("interrupted; the same command continues from what was saved last", file=sys.stderr)
        return 130
    except (ValueError, OSError, HfHubHTTPError) as error:
        print(f"hkt {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


# The commands import what they need when they run: `hkt --help` and errors of usage answer at once.


def _train(options: argparse.Namespace, rest: list[str]) -> None:
    from accelerate import PartialState

    from .config import load_experiment
    from .training import train

    config = load_experiment(options.config, rest)
    report = train(config)
    if not PartialState().is_main_process:
        return
    for split in ("validation", "test"):
        print(f"{split}: " + ", ".join(f"{name} {value:.4f}" for name, value in report[split].items()))
    print(f"model, card and curves: {config.output_dir}")


def _evaluate(options: argparse.Namespace, rest: list[str]) -> None:
    from accelerate import PartialState

    from .training import evaluate_checkpoint

    metrics = evaluate_checkpoint(options.checkpoint, rest, split=options.split)
    if not PartialState().is_main_process:
        return
    if options.out:
        write_json(options.out, {"checkpoint": options.checkpoint, "split": options.split, **metrics})
    print(f"{options.split}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))


def _predict(options: argparse.Namespace, rest: list[str]) -> None:
    from .training import predict

    for text, scores in zip(options.texts, predict(options.checkpoint, options.texts), strict=True):
        if options.json:
            print(json.dumps({"text": text, "scores": scores}, ensure_ascii=False))
        else:
            shown = text if len(text) <= 60 else f"{text[:57]}..."
            chosen = [score for score in scores if score["score"] > 0.5] or scores[:1]  # several for several labels
            labels = ", ".join(score["label"] for score in chosen)
            values = ", ".join(f"{score['score']:.4f}" for score in chosen)
            print(f"{labels}\t{values}\t{shown}")


def _push(options: argparse.Namespace, rest: list[str]) -> None:
    from .hub import push_checkpoint

    private = options.private or None
    try:
        print(push_checkpoint(options.checkpoint, options.repo_id, private=private, revision=options.revision))
    except (ValueError, OSError, HfHubHTTPError):
        raise
    except Exception as error:  # of the HTTP library, which is another one in each major version of huggingface_hub
        raise ConnectionError(f"the push broke off, the repository is as it was: {error}") from error


def _analyze(options: argparse.Namespace, rest: list[str]) -> None:
    run_analyze(options, rest)


def _benchmark(options: argparse.Namespace, rest: list[str]) -> None:
    run_benchmark(options)


def _reproduce(options: argparse.Namespace, rest: list[str]) -> None:
    run_reproduce(options, rest)


def _report(options: argparse.Namespace, rest: list[str]) -> None:
    run_report(options)


def _package(options: argparse.Namespace, rest: list[str]) -> None:
    run_package(options)


_COMMANDS = {
    "train": _train,
    "evaluate": _evaluate,
    "predict": _predict,
    "push": _push,
    "analyze": _analyze,
    "benchmark": _benchmark,
    "reproduce": _reproduce,
    "report": _report,
    "package": _package,
}


if __name__ == "__main__":
    sys.exit(main())
