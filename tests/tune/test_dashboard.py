"""The sweep's workspace: its panels, what it says where the extra is missing, what it builds."""

import importlib.util
import sys
import types

import pytest
import yaml

from hf_recipe.tune.dashboard import build_dashboard, panels, save_dashboard
from hf_recipe.tune.wandb_sweep import Launch, sweep_config

SPACE = {"learning_rate": {"min": 1e-4, "max": 1e-2}, "kind": {"value": 1}}
CONFIG = sweep_config(SPACE, Launch())


def test_every_parameter_has_its_axis_and_the_metric_its_curve():
    found = panels(["learning_rate", "dropout"], "eval/loss")
    assert [kind for kind, _ in found].count("ScatterPlot") == 2
    assert found[0][1]["columns"] == ["c::learning_rate", "c::dropout", "eval/loss"]
    assert "eval/loss" in found[-1][1]["y"]


@pytest.mark.skipif(
    importlib.util.find_spec("wandb_workspaces") is not None, reason="the extra is installed"
)
def test_without_the_extra_a_line_says_how_to_get_it():
    with pytest.raises(ImportError, match=r"pip install 'hf_recipe\[workspaces\]'"):
        build_dashboard(CONFIG, entity="me", project="digits")


def test_a_workspace_is_built_of_them(monkeypatch, tmp_path):
    class Thing(types.SimpleNamespace):
        url = "https://wandb.ai/me/digits"

        def save(self):
            self.saved.append(self)

    saved = Thing.saved = []
    blocks, spaces = types.ModuleType("v2"), types.ModuleType("workspaces")
    for name in ("ParallelCoordinatesPlot", "ParameterImportancePlot", "ScatterPlot", "LinePlot"):
        setattr(blocks, name, Thing)
    spaces.Section = spaces.Workspace = Thing
    package, reports = types.ModuleType("wandb_workspaces"), types.ModuleType("reports")
    package.reports, package.workspaces, reports.v2 = reports, spaces, blocks
    names = {"": package, ".reports": reports, ".reports.v2": blocks, ".workspaces": spaces}
    for name, module in names.items():
        monkeypatch.setitem(sys.modules, f"wandb_workspaces{name}", module)
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    assert save_dashboard(path, entity="me", project="digits") == Thing.url
    (workspace,) = saved
    assert len(workspace.sections[0].panels) == 4  # constants have no axis
    index = sweep_config(SPACE, Launch(), flavour="index")
    with pytest.raises(ValueError, match="names no parameters"):
        build_dashboard(index, entity="me", project="digits")
