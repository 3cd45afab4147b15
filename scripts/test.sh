#!/usr/bin/env bash
# Makes the environment with the test extras, checks style, runs the tests: the project's own, then transformers' common
# model tests. With arguments, which go to pytest (e.g. -m slow), only what they select. A process a core, each with one
# thread; the tests of a file stay together, since they share what they train.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
make_environment test
.venv/bin/ruff check --quiet .
.venv/bin/ruff format --quiet --check .
export OMP_NUM_THREADS=1
.venv/bin/python -m pytest -q -n auto --dist loadfile "$@"
[ $# -gt 0 ] || .venv/bin/python -m pytest -q -n auto --dist worksteal -m common
