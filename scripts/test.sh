#!/usr/bin/env bash
# Makes the environment with the test extras, checks style, runs the tests. Arguments go to pytest, e.g. -m slow.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
make_environment test
.venv/bin/ruff check --quiet .
.venv/bin/ruff format --quiet --check .
.venv/bin/python -m pytest -q "$@"
