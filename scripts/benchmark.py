"""Time and memory of HKT against flat attention and other models, into `results/` of the folder in which it runs.

usage: python scripts/benchmark.py operators|models|report ...     as `hkt benchmark`; --help lists the options
"""

import sys

from hkt_hf.cli import main


if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
