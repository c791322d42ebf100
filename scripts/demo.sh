#!/usr/bin/env bash
# The demo, offline: bash scripts/demo.sh trains and compares on the bundled models in a few minutes of CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
environment
exec python scripts/demo.py "$@"
