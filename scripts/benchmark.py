"""Time and memory of HKT against flat attention and other models: `hkt benchmark`, with results in `results/`.

usage: python scripts/benchmark.py operators|models|report ...
"""

import os
import sys
from pathlib import Path

from hkt_hf.cli import main


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parent.parent)
    sys.exit(main(["benchmark", *sys.argv[1:]]))
