"""What the polyphase backend gains from its choices on a CPU; writes `results/cpu_choices.json`.

Forward and backward of three levels, as it is, with PyTorch's own matrix products instead of oneDNN's, and with other
tiles; and `exp` against `exp2`. All take turns.
"""

import argparse
import contextlib
import shlex
import statistics
import sys
from pathlib import Path
from unittest import mock

import torch

from hkt_hf.benchmark.measurement import take_turns
from hkt_hf.benchmark.registry import OperatorSizes, operator_step
from hkt_hf.environment import environment
from hkt_hf.files import write_json
from hkt_hf.modeling import polyphase_hkt


CHOICES = {
    "as_it_is": contextlib.nullcontext,
    "without_onednn": lambda: mock.patch.object(polyphase_hkt, "_has_onednn", lambda: False),
    "tile_512": lambda: mock.patch.object(polyphase_hkt, "TILE", 512),
    "tile_2048": lambda: mock.patch.object(polyphase_hkt, "TILE", 2048),
}


def measure(batch_heads: int, length: int, width: int, repeats: int) -> dict[str, object]:
    """Medians of the seconds of each choice, and of flat attention, at one size."""
    sizes = OperatorSizes(length=length, width=width, batch_heads=batch_heads)
    step = operator_step("polyphase", "forward_backward", sizes)

    def under(choice):
        def run():
            with choice():
                step.run()

        return run

    runs = {"flat": operator_step("flat", "forward_backward", sizes).run}
    runs |= {name: under(choice) for name, choice in CHOICES.items()}
    seconds = {name: statistics.median(samples) for name, samples in take_turns(runs, 3, repeats).items()}
    ratios = {name: value / seconds["flat"] for name, value in seconds.items()}
    return {"batch_heads": batch_heads, "length": length, "width": width, "seconds": seconds, "ratios": ratios}


def main() -> None:
    """Measure, print, write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).resolve().parent.parent / "results/cpu_choices.json"
    )
    arguments = parser.parse_args()
    rows = [measure(*size, arguments.repeats) for size in ((8, 2048, 64), (8, 2048, 32), (16, 1024, 16))]
    scores, output = torch.randn(1024, 1024), torch.empty(1024, 1024)
    runs = {"exp": lambda: torch.exp(scores, out=output), "exp2": lambda: torch.exp2(scores, out=output)}
    exponentials = {name: statistics.median(samples) for name, samples in take_turns(runs, 5, 50).items()}
    command = f"python scripts/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}".strip()
    settings = {"threads": torch.get_num_threads(), "repeats": arguments.repeats}
    result = {"rows": rows, "seconds_of_a_tile": exponentials, "settings": settings}
    write_json(arguments.output, {**result, "command": command, **environment()})
    for row in rows:
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratios"].items())
        print(f"{row['batch_heads']}, {row['length']}, {row['width']}: {ratios}")
    print(", ".join(f"{name} {1e3 * value:.3f} ms" for name, value in exponentials.items()))


if __name__ == "__main__":
    main()
