#!/usr/bin/env bash
# Run the linter and all tests in an environment of their own: bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
environment
ruff format --check .
ruff check .
python -m pytest -q -n auto --dist loadfile "$@" # a process per core, a file in one of them
