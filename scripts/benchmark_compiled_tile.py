"""What `torch.compile` would save in a tile of the polyphase backend; writes `results/compiled_tile.json`.

The block between the matrix products of a tile is timed as the backend does it, in place, and as the C++ that the compiler
makes of it, turn by turn, beside the whole forward and backward pass of such a tile. Both blocks first copy their inputs
anew, which the backend does not; that time cancels in the difference.
"""

import argparse
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch

from hkt_hf.benchmark.measurement import take_turns
from hkt_hf.environment import environment
from hkt_hf.files import write_json
from hkt_hf.modeling import polyphase_hkt


def views(fine, coarse, count):
    """A fine tile and the coarse one that is added to it, `count` coarse phases, in shapes that broadcast."""
    group, rows, columns = coarse.shape
    rows, columns = rows // count, columns // count
    return fine.view(group, count, 2, rows, count, 2, columns), coarse.view(group, count, 1, rows, count, 1, columns)


def forward_in_place(fine, middle, coarse):
    """Weights, row maxima and row sums, as the backend makes them."""
    for tile, coarser, count in ((middle, coarse, 1), (fine, middle, 2)):
        left, right = views(tile, coarser, count)
        left.add_(right)
    top = fine.amax(dim=-1, keepdim=True)
    weights = fine.sub_(top).exp2_()
    return weights, top, weights.sum(dim=-1, keepdim=True)


def forward(fine, middle, coarse):
    """The same for the compiler."""
    for tile, count in ((middle, 1), (fine, 2)):
        left, right = views(tile, coarse, count)
        coarse = (left + right).view_as(tile)
    top = coarse.amax(dim=-1, keepdim=True)
    weights = (coarse - top).exp2()
    return weights, top, weights.sum(dim=-1, keepdim=True)


def backward_in_place(fine, middle, coarse, weight_gradients, log_sums, means):
    """Weights, and score gradients of all levels, as the backend makes them."""
    for tile, coarser, count in ((middle, coarse, 1), (fine, middle, 2)):
        left, right = views(tile, coarser, count)
        left.add_(right)
    weights = fine.sub_(log_sums).exp2_()
    gradients = [weight_gradients.sub_(means).mul_(weights)]
    for phases in (4, 2):
        gradients.append(polyphase_hkt._pool(gradients[-1], phases))
    return weights, gradients


def backward(fine, middle, coarse, weight_gradients, log_sums, means):
    """The same for the compiler."""
    for tile, count in ((middle, 1), (fine, 2)):
        left, right = views(tile, coarse, count)
        coarse = (left + right).view_as(tile)
    weights = (coarse - log_sums).exp2()
    gradients = [(weight_gradients - means) * weights]
    for phases in (4, 2):
        gradients.append(polyphase_hkt._pool(gradients[-1], phases))
    return weights, gradients


def measure(length: int, width: int, repeats: int) -> dict[str, object]:
    """Seconds of both blocks and passes at one head width, and what compiling them would save."""
    tiles = [torch.randn(1, length >> level, length >> level) for level in range(3)]
    inputs = [*tiles, torch.randn(1, length, length)]
    rows = [torch.full((1, length, 1), 12.0), torch.zeros(1, length, 1)]
    copies = [torch.empty_like(tensor) for tensor in inputs]

    def anew(block, number, *others):
        def run():
            for copy, tensor in zip(copies[:number], inputs, strict=False):
                copy.copy_(tensor)
            return block(*copies[:number], *others)

        return run

    compiled_forward, compiled_backward = (
        torch.compile(block, dynamic=False, fullgraph=True) for block in (forward, backward)
    )
    start = time.perf_counter()
    compiled_forward(*tiles)
    compiled_backward(*inputs, *rows)
    compile_seconds = time.perf_counter() - start
    for expected, actual in zip(
        forward_in_place(*(tile.clone() for tile in tiles)), compiled_forward(*tiles), strict=True
    ):
        torch.testing.assert_close(actual, expected)

    queries, keys = ([torch.randn(1, 1, length >> level, width) for level in range(3)] for _ in range(2))
    value = torch.randn(1, 1, length, width)
    others = (value, None, False, 0.0, None)
    output, log_sums = polyphase_hkt._forward(queries, keys, *others)
    runs = {
        "forward_block": anew(forward_in_place, 3),
        "forward_block_compiled": anew(compiled_forward, 3),
        "forward": lambda: polyphase_hkt._forward(queries, keys, *others),
        "backward_block": anew(backward_in_place, 4, *rows),
        "backward_block_compiled": anew(compiled_backward, 4, *rows),
        "backward": lambda: polyphase_hkt._backward(value, output, log_sums, queries, keys, *others),
    }
    seconds = {name: statistics.median(samples) for name, samples in take_turns(runs, 5, repeats).items()}
    saved = {
        name: (seconds[f"{name}_block"] - seconds[f"{name}_block_compiled"]) / seconds[name]
        for name in ("forward", "backward")
    }
    return {"length": length, "width": width, "compile_seconds": compile_seconds, "seconds": seconds, "saved": saved}


def main() -> None:
    """Measure, print, write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=1024, help="T, one tile")
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 64], help="head widths p")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).resolve().parent.parent / "results/compiled_tile.json"
    )
    arguments = parser.parse_args()
    rows = [measure(arguments.length, width, arguments.repeats) for width in arguments.widths]
    command = f"python scripts/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}".strip()
    settings = {"threads": torch.get_num_threads(), "repeats": arguments.repeats}
    write_json(arguments.output, {"rows": rows, "settings": settings, "command": command, **environment()})
    for row in rows:
        saved = ", ".join(f"{share:.1%} of the {name}" for name, share in row["saved"].items())
        print(f"width {row['width']}: compiled in {row['compile_seconds']:.1f} s, saves {saved}")


if __name__ == "__main__":
    main()
