"""``--report_to trackio``: the dashboard without an account, read back from its own database."""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trackio", reason="needs the extra trackio")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_curves_alerts_and_settings_are_there_after_a_trial(tmp_path, monkeypatch):
    """One trial of the main job, whose rate is far too high, in a process of its own."""
    home = tmp_path / "trackio"
    monkeypatch.setenv("TRACKIO_DIR", str(home))
    command = [sys.executable, str(ROOT / "scripts" / "recipe.py"), "--trial", "--use_cpu", "true"]
    command += ["--report_to", "trackio", "--num_train_epochs", "1", "--wandb_project", "digits"]
    command += ["--learning_rate", "1e6", "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stderr[-2000:]
    assert not (tmp_path / "out" / "wandb").exists()

    def read(what):
        with contextlib.closing(sqlite3.connect(home / "digits.db")) as database:
            return database.execute(f"select {what}").fetchall()

    ((name, config),) = read("run_name, config from configs")
    assert name == "trial (seed 42)"
    assert json.loads(config)["learning_rate"] == 1e6
    rows = [json.loads(row) for (row,) in read("metrics from metrics order by id")]
    assert {"train/loss", "train/global_step", "eval/loss"} <= set().union(*rows)
    steps = [row["train/global_step"] for row in rows if "train/global_step" in row]
    assert steps == sorted(steps)
    alerts = read("title, level from alerts")
    assert alerts
    assert all(title.startswith("error: ") and level == "error" for title, level in alerts)
