"""The sweep's workspace: its panels, what is said without the extra, and what W&B is sent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_recipe.tune.dashboard import build_dashboard, panels
from hf_recipe.tune.wandb_sweep import Launch, sweep_config
from tests.tune.wandb_server import ENTITY, PROJECT, environment, serve

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("dashboard.json")
SPACE = {
    "learning_rate": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2},
    "optimizer": {"parameters": {"beta": {"min": 0.5, "max": 1.0}}},
    "kind": {"value": 1},
}
CONFIG = sweep_config(SPACE, Launch())

SAVE = """
import sys
from hf_recipe.tune.dashboard import save_dashboard
path, entity, project = sys.argv[1:]
print(save_dashboard(path, entity=entity, project=project, without_errors=True))
"""


def test_every_parameter_has_its_axis_and_the_metric_its_curve():
    found = panels({"learning_rate": SPACE["learning_rate"], "dropout": {}}, "eval/loss")
    axes = {o["x"]: o["log_x"] for kind, o in found if kind == "ScatterPlot"}
    assert axes == {"learning_rate": True, "dropout": False}
    columns = [name for name, _ in found[0][1]["columns"]]
    assert columns == ["learning_rate", "dropout", "eval/loss"]
    assert [o["y"] for kind, o in found if kind == "LinePlot"] == [["eval/loss"], ["train/loss"]]


def test_without_the_extra_a_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_recipe\[workspaces\]'"):
        build_dashboard(CONFIG, entity="me", project="digits")
    index = sweep_config(SPACE, Launch(), flavour="index")
    with pytest.raises(ValueError, match="names no parameters"):
        build_dashboard(index, entity="me", project="digits")


def without_ids(spec):
    """A specification without the numbers that the client draws at random."""
    if isinstance(spec, dict):
        return {k: without_ids(v) for k, v in spec.items() if k != "__id__"}
    return [without_ids(item) for item in spec] if isinstance(spec, list) else spec


@pytest.mark.slow
def test_what_is_saved_at_wandb_is_the_golden_specification(tmp_path):
    """All panels, the runs best first, those without errors alone; against the stand-in."""
    pytest.importorskip("wandb_workspaces", reason="needs the extra workspaces")
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    with serve(None) as backend:
        done = subprocess.run(
            [sys.executable, "-c", SAVE, str(path), ENTITY, PROJECT],
            env=os.environ | environment(backend, tmp_path) | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    assert backend.unknown == []
    assert f"{backend.url}/{ENTITY}/{PROJECT}" in done.stdout
    (view,) = backend.views.values()
    assert view["type"] == "project-view"
    assert without_ids(json.loads(view["spec"])) == json.loads(GOLDEN.read_text())
