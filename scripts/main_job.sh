#!/usr/bin/env bash
# Installs into .venv, at the tested versions, and runs the whole recipe on the bundled digits.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/pip install -q torch==2.13.0 -c constraints.txt
.venv/bin/pip install -q -e . -c constraints.txt
exec .venv/bin/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no \
  --dynamo_backend no scripts/recipe.py "$@"
