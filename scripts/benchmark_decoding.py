"""Cache bytes and seconds a token of HKT and of its flat twin; writes `results/decoding.json`."""

import argparse
import shlex
import sys
from pathlib import Path

import torch

from hkt_hf.benchmark.decoding import measure_decoding
from hkt_hf.environment import environment
from hkt_hf.files import write_json


def main() -> None:
    """Measure, print a table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="hkt-base", help="a packaged model size")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384], help="tokens in the cache")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64, help="measured steps a context")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).resolve().parent.parent / "results/decoding.json"
    )
    arguments = parser.parse_args()
    rows = measure_decoding(
        arguments.model,
        tuple(arguments.contexts),
        arguments.batch_size,
        arguments.tokens,
        device=arguments.device,
        dtype=getattr(torch, arguments.dtype),
    )
    settings = {key: value for key, value in vars(arguments).items() if key != "output"}
    command = f"python scripts/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}".strip()
    write_json(
        arguments.output,
        {"rows": rows, "settings": settings, "threads": torch.get_num_threads(), "command": command, **environment()},
    )
    print("context   cache: flat   HKT   ratio      token: flat    HKT   ratio")
    for row in rows:
        (flat, hkt), times = row["cache_bytes"].values(), row["step_seconds"]
        print(
            f"{row['context']:7d}  {flat / 2**20:8.1f} MiB {hkt / 2**20:7.1f} MiB {row['cache_ratio']:.3f}"
            f"  {1e3 * times['flat']['median']:8.2f} ms {1e3 * times['hkt']['median']:8.2f} ms {row['step_ratio']:.2f}"
        )


if __name__ == "__main__":
    main()
