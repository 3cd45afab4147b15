#!/usr/bin/env bash
# From a fresh clone to a trained, saved and reloaded HKT, beside its flat twin, in one command.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
make_environment
.venv/bin/python scripts/quickstart.py
