"""Time and memory of Hierarchical Self-Attention by length, beside flat attention; writes `results/hsa_speed.json` and `.png`.

usage: python scripts/hsa_speed.py [--lengths N ...] [--flat-limit N] [--device cuda] [--dtype bfloat16] [--output FILE]

One thread, one sequence, one head of width 64. On a CPU seconds are processor time, best of the repeats; in a turn every
operator runs once. Flat attention (`scaled_dot_product_attention`) is left out beyond `--flat-limit`. Finished lengths are kept.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import matplotlib
import torch

from hkt_hf.benchmark.measurement import peak_allocation, seconds_of, turn_order
from hkt_hf.benchmark.registry import HSA_TREES, REFERENCE, OperatorSizes, operator_step
from hkt_hf.environment import environment
from hkt_hf.files import replacing, write_json


matplotlib.use("Agg")
from matplotlib import pyplot as plt


RESULTS = Path(__file__).resolve().parent.parent / "results"
LENGTHS = [512, 2048, 8192, 32768, 131072, 1_000_000]
MODES = ("forward", "forward_backward")
WIDTH = 64


def measure_length(length: int, mode: str, options: argparse.Namespace) -> dict[str, dict[str, object]]:
    """Seconds and peak bytes of each operator at one length, and how many times as fast as flat attention it is."""
    sizes = OperatorSizes(length, WIDTH, batch_heads=1, dtype=options.dtype, device=options.device)
    names = [*([REFERENCE] if length <= options.flat_limit else []), *HSA_TREES]
    # A flat root over windows is a flat attention over N / 16 of them.
    names = [name for name in names if name != "hsa-windows" or length <= 16 * options.flat_limit]
    steps = {name: operator_step(name, mode, sizes) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(1 + options.repeats):
        for name in turn_order(names, turn):
            steps[name].release()
            taken = _seconds(steps[name].run, options.device)
            if turn > 0:
                seconds[name].append(taken)
    rows = {}
    for name, step in steps.items():
        step.release()
        rows[name] = {"seconds": min(seconds[name]), "samples": seconds[name]}
        rows[name]["peak_bytes"] = peak_allocation(step, options.device)[0]
        if REFERENCE in rows:
            rows[name]["speedup"] = rows[REFERENCE]["seconds"] / rows[name]["seconds"]
    return rows


def _seconds(run, device: str) -> float:
    if device.startswith("cuda"):
        return seconds_of(run, device)
    began = time.process_time()
    run()
    return time.process_time() - began


def plot(result: dict, path: Path) -> None:
    """Seconds and memory by length, on logarithmic axes."""
    views = [
        ("forward", "seconds", "forward, seconds"),
        ("forward_backward", "seconds", "forward and backward, seconds"),
        ("forward", "peak_bytes", "forward, peak bytes"),
    ]
    figure, panels = plt.subplots(1, len(views), figsize=(4.6 * len(views), 4), layout="constrained")
    for axes, (mode, key, title) in zip(panels, views, strict=True):
        rows = sorted((row for row in result["rows"] if row["mode"] == mode), key=lambda row: row["length"])
        for number, name in enumerate([REFERENCE, *HSA_TREES]):
            found = [row for row in rows if name in row["operators"]]
            values = [row["operators"][name][key] for row in found]
            axes.loglog([row["length"] for row in found], values, marker="o", label=name, color=f"C{number}")
        axes.set(title=title, xlabel="leaves N")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


def main() -> None:
    """Measure every length and mode that the file lacks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--flat-limit", type=int, default=32768, help="longest flat attention (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, default=RESULTS / "hsa_speed.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {"device": options.device, "dtype": options.dtype, "width": WIDTH, "rows": []}
    if options.output.is_file():
        found = json.loads(options.output.read_text(encoding="utf-8"))
        if any(found[key] != result[key] for key in ("device", "dtype", "width")):
            raise SystemExit(
                f"{options.output} was measured on another device or in another dtype: choose another file"
            )
        result = found
    for length in sorted(options.lengths):
        for mode in options.modes:
            if any((row["length"], row["mode"]) == (length, mode) for row in result["rows"]):
                continue
            operators = measure_length(length, mode, options)
            result["rows"].append({"length": length, "mode": mode, "operators": operators})
            command = f"python scripts/hsa_speed.py {shlex.join(sys.argv[1:])}".strip()
            result.update(command=command, **environment())
            write_json(options.output, result)
            for name, entry in operators.items():
                speedup = f", {entry['speedup']:.1f}x" if "speedup" in entry else ""
                print(f"{length:>8} {mode:<17}{name:<12}{1e3 * entry['seconds']:10.2f} ms{speedup}", flush=True)
    plot(result, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
