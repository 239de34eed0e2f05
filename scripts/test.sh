#!/usr/bin/env bash
# Installs everything into .venv, at the tested versions, and passes the tests.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/pip install -q torch==2.13.0 -c constraints.txt
.venv/bin/pip install -q -e '.[dev]' -c constraints.txt
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
exec .venv/bin/python -m pytest -q -n 2 --dist worksteal --durations 15 "$@"
