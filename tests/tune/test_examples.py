"""The examples run as they are, for a short while."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("distil_*.py"))


def test_every_head_has_one():
    heads = {"causal_lm", "image", "seq2seq", "token_classification"}
    assert {path.stem.removeprefix("distil_") for path in EXAMPLES} == heads


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_it_runs(path, tmp_path):
    command = [sys.executable, str(path), "--output_dir", str(tmp_path / "out"), "--epochs", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "agreement" in done.stdout
