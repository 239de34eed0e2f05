"""A sweep's W&B workspace as code: axis plots, parallel coordinates, importance, curves.

    hf-recipe sweep init ...; wandb sweep sweep.yaml
    python -c "from hf_recipe.tune.dashboard import save_dashboard; \
        save_dashboard('sweep.yaml', entity='me', project='digits')"

It needs the extra `workspaces`; the plots without an account are those of ``hf-recipe sweep run``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_recipe.tune.wandb_sweep import POINT, flattened


def panels(parameters: Sequence[str], metric: str) -> list[tuple[str, dict[str, Any]]]:
    """(kind of panel, its options) for a sweep over `parameters`.

    Args:
        parameters: searched names, as the run's config has them.
        metric: as W&B sees it, "eval/loss".
    """
    found: list[tuple[str, dict[str, Any]]] = [
        ("ParallelCoordinatesPlot", {"columns": [f"c::{name}" for name in parameters] + [metric]}),
        ("ParameterImportancePlot", {"with_respect_to": metric}),
    ]
    found += [("ScatterPlot", {"x": f"c::{name}", "y": metric}) for name in parameters]
    found.append(("LinePlot", {"x": "train/global_step", "y": [metric, "train/loss"]}))
    return found


def build_dashboard(
    config: Mapping[str, Any], *, entity: str, project: str, name: str = "The search"
) -> Any:
    """The workspace of a sweep, not yet saved.

    Args:
        config: content of a sweep.yaml.

    Raises:
        ImportError: without the extra.
        ValueError: the index flavour, whose parameter is a number that says nothing.
    """
    try:
        import wandb_workspaces.reports.v2 as blocks
        import wandb_workspaces.workspaces as workspaces
    except ImportError:
        raise ImportError(
            "a dashboard as code needs wandb-workspaces: pip install 'hf_recipe[workspaces]'"
        ) from None
    space = {k: v for k, v in flattened(config["parameters"]).items() if "value" not in v}
    if list(space) == [POINT]:
        raise ValueError("an index grid names no parameters; read them from its points.json")
    wanted = panels(list(space), config["metric"]["name"])
    section = workspaces.Section(
        name=name,
        is_open=True,
        panels=[getattr(blocks, kind)(**options) for kind, options in wanted],
    )
    return workspaces.Workspace(entity=entity, project=project, name=name, sections=[section])


def save_dashboard(path: str | Path, *, entity: str, project: str) -> str:
    """Save the workspace of a sweep.yaml at W&B; its address."""
    import yaml

    config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    workspace = build_dashboard(config, entity=entity, project=project)
    workspace.save()
    return str(workspace.url)
