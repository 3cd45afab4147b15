"""The command `hkt benchmark`: `operators`, `models`, and `report`, which draws a result again."""

import argparse
import os
import shlex
import sys
from pathlib import Path


def add_benchmark_parser(commands) -> None:
    """Add `benchmark` to the subcommands of `hkt`. What is measured is looked up when the command runs."""
    benchmark = commands.add_parser("benchmark", help="time and memory of HKT against flat attention and other models")
    kinds = benchmark.add_subparsers(dest="kind", required=True)

    operators = kinds.add_parser(
        "operators",
        help="backends of the attention operator against PyTorch's fused attention",
        description="Every row is one run in which all operators take turns; finished rows are not measured again.",
    )
    operators.add_argument(
        "--operators", dest="names", nargs="+", metavar="NAME", help="flat and backends; default: all"
    )
    operators.add_argument("--modes", nargs="+", metavar="MODE", help="forward forward_backward; default: both")
    operators.add_argument("--widths", type=int, nargs="+", help="head widths p; default: 64")
    operators.add_argument("--batch-heads", type=int, help="batch size times heads; default: 8")
    operators.add_argument("--batch-size", type=int, help="the batch size in it; default: 1")
    operators.add_argument("--num-levels", type=int, help="default: 3")
    operators.add_argument("--causal", dest="is_causal", action="store_true")

    models = kinds.add_parser(
        "models",
        help="HKT against its flat twin and other models of the same size",
        description="Every row is one run in which all models take turns; finished rows are not measured again.",
    )
    models.add_argument(
        "--models", dest="names", nargs="+", metavar="NAME", help="or hkt:ATTN_IMPLEMENTATION; default: all"
    )
    models.add_argument(
        "--modes",
        nargs="+",
        metavar="MODE",
        help="forward forward_backward train_step decode_step; default: forward train_step",
    )
    models.add_argument("--preset", help="a packaged model size, which the next options change; default: hkt-small")
    models.add_argument("--width", type=int, help="hidden size d")
    models.add_argument("--num-heads", type=int)
    models.add_argument("--num-layers", type=int)
    models.add_argument("--intermediate-size", type=int)
    models.add_argument("--num-levels", type=int)
    models.add_argument("--batch-size", type=int, help="default: 1")

    for parser, kind in ((operators, "operators"), (models, "models")):
        parser.add_argument("--lengths", type=int, nargs="+", help="T; default: 512 1024 2048 4096")
        parser.add_argument(
            "--padding", action="store_true", help="sequences from T down to T / 2, padded on the right"
        )
        parser.add_argument("--dtype", help="float32 (default), bfloat16, float16 or float64")
        parser.add_argument("--device", help="cpu (default) or cuda")
        parser.add_argument("--threads", type=int, help="threads of PyTorch; default: its own choice")
        parser.add_argument("--warm-up", type=int, help="turns before the measured ones; default: 3")
        parser.add_argument("--repeats", type=int, help="measured turns; default: 10")
        parser.add_argument("--max-step-seconds", type=float, help="leave out what takes longer; default: 60")
        parser.add_argument("--fresh", action="store_true", help="measure finished rows again")
        parser.add_argument("--output", type=Path, default=Path(f"results/benchmark_{kind}.json"))

    report = kinds.add_parser("report", help="write tables and plots of a result again")
    report.add_argument("result", type=Path, help="the JSON file of a benchmark")


def run_benchmark(options: argparse.Namespace) -> None:
    """Measure, write the JSON file with tables and plots beside it, and print the tables.

    Args:
        options (`argparse.Namespace`): as parsed, and `words`, the command line after `hkt`.

    Raises:
        ValueError: an argument that can't be measured, before anything is.
        FileNotFoundError: an unknown preset, or no such result.
    """
    from .report import markdown

    if options.kind == "report":
        from .sweep import read_result

        result, output = read_result(options.result), options.result
    else:
        result, output = _sweep(options), options.output
    print(markdown(result))
    for path in [output, *_write_report(result, output)]:
        print(path)


def _sweep(options: argparse.Namespace) -> dict[str, object]:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler would write two lines for every step it counts
    import torch

    from .sweep import ModelSweep, OperatorSweep, Protocol, run_sweep

    if options.threads is not None and options.threads < 1:
        raise ValueError(f"`threads` must be at least 1, got {options.threads}")
    given = {key: value for key, value in vars(options).items() if value is not None}
    sweep_class = {"operators": OperatorSweep, "models": ModelSweep}[options.kind]
    sweep = sweep_class(
        **{key: given[key] for key in sweep_class.__dataclass_fields__ if key in given and key != "kind"}
    )
    protocol = Protocol(**{key: given[key] for key in Protocol.__dataclass_fields__ if key in given})
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    command = shlex.join(["hkt", *options.words])
    return run_sweep(sweep, options.output, protocol, fresh=options.fresh, command=command)


def _write_report(result: dict[str, object], output: Path) -> list[Path]:
    from .report import write_report

    try:
        return write_report(result, output)
    except ImportError as error:
        print(f"no plot ({error}); `hkt benchmark report {output}` draws it where matplotlib is", file=sys.stderr)
        return [output.with_suffix(".md")]
