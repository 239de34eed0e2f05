"""A sweep's W&B workspace as code: axis plots, parallel coordinates, importance, curves.

    hf-recipe sweep init ...; wandb sweep sweep.yaml
    python -c "from hf_recipe.tune.dashboard import save_dashboard; \
        save_dashboard('sweep.yaml', entity='me', project='digits')"

It needs the extra `workspaces`; the plots without an account are those of ``hf-recipe sweep run``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_recipe.tune.wandb_sweep import POINT, flattened

BEST = 5  # runs whose training curves are drawn
FINDINGS = ("recipe/errors", "recipe/warnings")  # what `attach` leaves in a run's summary


def panels(space: Mapping[str, Mapping[str, Any]], metric: str) -> list[tuple[str, dict[str, Any]]]:
    """(kind of panel, its options) for a sweep over `space`.

    Args:
        space: searched parameters by name, as the run's config has them.
        metric: as W&B sees it, "eval/loss".
    """
    logs = {name: "log" in str(spec.get("distribution")) for name, spec in space.items()}
    columns = [*logs.items(), (metric, False)]
    found: list[tuple[str, dict[str, Any]]] = [
        ("ParallelCoordinatesPlot", {"columns": columns}),
        ("ParameterImportancePlot", {"with_respect_to": metric}),
    ]
    found += [("ScatterPlot", {"x": n, "y": metric, "log_x": log}) for n, log in logs.items()]
    curves = {"x": "train/global_step", "max_runs_to_show": BEST}
    found += [("LinePlot", {**curves, "y": [y]}) for y in (metric, "train/loss")]
    return found


def build_dashboard(
    config: Mapping[str, Any],
    *,
    entity: str,
    project: str,
    name: str = "The search",
    without_errors: bool = False,
) -> Any:
    """The workspace of a sweep, not yet saved: its runs best first, our findings beside them.

    Args:
        config: content of a sweep.yaml.
        without_errors: show only runs in which the recipe found no error; a run that it did not
            watch is hidden too.

    Raises:
        ImportError: without the extra.
        ValueError: the index flavour, whose parameter is a number that says nothing.
    """
    space = {k: v for k, v in flattened(config["parameters"]).items() if "value" not in v}
    if list(space) == [POINT]:
        raise ValueError("an index grid names no parameters; read them from its points.json")
    try:
        import wandb_workspaces.expr as expr
        import wandb_workspaces.workspaces as workspaces
    except ImportError:
        raise ImportError(
            "a dashboard as code needs wandb-workspaces: pip install 'hf_recipe[workspaces]'"
        ) from None
    goal = config["metric"]
    rising = str(goal.get("goal", "minimize")) == "minimize"
    found = panels(space, goal["name"])
    section = workspaces.Section(
        name=name, is_open=True, panels=[_panel(kind, options) for kind, options in found]
    )
    runs = workspaces.RunsetSettings(
        order=[expr.Ordering(expr.Summary(goal["name"]), ascending=rising)],
        filters=[expr.Summary(FINDINGS[0]) == 0] if without_errors else [],
        pinned_columns=[f"summary:{column}" for column in (goal["name"], *FINDINGS)],
    )
    return workspaces.Workspace(
        entity=entity, project=project, name=name, sections=[section], runset_settings=runs
    )


def _panel(kind: str, options: Mapping[str, Any]) -> Any:
    """A panel in the package's own words: which names are of the config, which of the summary."""
    import wandb_workspaces.reports.v2 as blocks

    given = dict(options)
    if kind == "ScatterPlot":
        given |= {"x": blocks.Config(given["x"]), "y": blocks.SummaryMetric(given["y"])}
    if kind == "ParallelCoordinatesPlot":
        *parameters, (metric, _) = given["columns"]
        axes = [(blocks.Config(n), log) for n, log in parameters]
        axes.append((blocks.SummaryMetric(metric), False))
        given["columns"] = [
            blocks.ParallelCoordinatesPlotColumn(metric=axis, log=log) for axis, log in axes
        ]
    return getattr(blocks, kind)(**given)


def save_dashboard(
    path: str | Path, *, entity: str, project: str, without_errors: bool = False
) -> str:
    """Save the workspace of a sweep.yaml at W&B; its address. Options: see `build_dashboard`."""
    import yaml

    config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    workspace = build_dashboard(
        config, entity=entity, project=project, without_errors=without_errors
    )
    workspace.save()
    return str(workspace.url)
