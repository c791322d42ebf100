#!/usr/bin/env bash
# Run the linter and all tests in an environment of their own: bash scripts/test.sh [pytest arguments]
# bash scripts/test.sh --durations     names the forty slowest tests as well
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
arguments=()
while [ $# -gt 0 ]; do
    arguments+=("$1")
    if [ "$1" = --durations ] && ! [[ ${2:-} =~ ^[0-9]+$ ]]; then
        arguments+=(40)
    fi
    shift
done
environment
ruff format --check .
ruff check .
python -m pytest -q -n auto --dist loadfile "${arguments[@]}" # a process per core, a file in one of them
