"""Imports run one way, and heavy packages are imported where they are needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "hf_recipe"
ORDER = [
    {"core"},
    {"instruments", "report", "explanation"},
    {"data"},
    {"baselines"},
    {"complexify"},
    {"regularize"},
    {"tune"},
    {"catalogue"},
    {"examiner"},
    {"inspection"},
    {"trainer"},
    {"runner"},
    {"cli", "testing"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
LATE = {
    "wandb",
    "wandb_workspaces",
    "trackio",
    "optuna",
    "matplotlib",
    "cleanlab",
    "peft",
    "polars",
    "rensa",
}
MODULES = sorted(ROOT.rglob("*.py"))


def layer(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(tree: ast.AST, top: bool) -> list[str]:
    nodes = tree.body if top else [n for n in ast.walk(tree)]
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module or "")
    return found


def upward(path: Path, source: str) -> list[str]:
    own = layer(path)
    if own == "__init__":
        return []
    wrong = []
    for name in imports(ast.parse(source), top=True):
        parts = name.split(".")
        if parts[0] != "hf_recipe" or len(parts) < 2:
            wrong += [name] if parts[0] in ("scripts", "tests") else []
            continue
        other = parts[1]
        above = LEVEL[other] > LEVEL[own]
        beside = LEVEL[other] == LEVEL[own] and other != own
        if above or beside or (own == "report" and other not in ("core", "report")):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_downwards_only(path):
    assert upward(path, path.read_text()) == []


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_packages_are_imported_late(path):
    top = {name.split(".")[0] for name in imports(ast.parse(path.read_text()), top=True)}
    assert not top & LATE
    if layer(path) == "core":
        assert top <= set(sys.stdlib_module_names) | {"hf_recipe"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_holds_one_idea(path):
    assert len(path.read_text().splitlines()) <= 400


def test_a_planted_violation_is_seen():
    path = ROOT / "core" / "finding.py"
    assert upward(path, "from hf_recipe.trainer.attach import attach")
    assert upward(ROOT / "data" / "x.py", "import hf_recipe.tune.space")
    assert upward(ROOT / "report" / "x.py", "from hf_recipe.data import splits")
    assert not upward(ROOT / "tune" / "x.py", "from hf_recipe.data import splits")


def test_importing_the_package_loads_no_torch():
    code = "import sys, hf_recipe; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent).returncode == 0
