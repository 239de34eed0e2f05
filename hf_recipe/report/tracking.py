"""Findings on the dashboards of Weights & Biases and trackio.

Everything sent is built from the redacted report, unless the user said ``log_samples=True``.
Values are logged against ``train/global_step``, never with ``step=``, which would fight with the
Trainer's own callback over the run's step.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Collection, Mapping
from typing import Any

from hf_recipe.core.exhibit import Table
from hf_recipe.core.finding import Finding
from hf_recipe.core.report import Report
from hf_recipe.report.page import render_page, verdict

STEP = "train/global_step"
COLUMNS = ("severity", "check", "stage", "subject", "split", "step", "count", "message", "fix")
STATUS = {"error": "error", "warning": "warning", "good": "healthy"}


class TrackingSink:
    """Tells the active trackers of a report. The caller sees to it that only rank 0 has one.

    Args:
        trackers: where to, of "wandb" and "trackio" (``args.report_to``). A tracker without an
            active run is passed over in silence: none is ever started here.
        log_samples: whether rows, quoted values and private exhibits may leave the machine.
    """

    def __init__(
        self, trackers: Collection[str] = ("wandb",), *, log_samples: bool = False
    ) -> None:
        self.trackers = tuple(trackers)
        self.log_samples = log_samples
        self._told: dict[str, Any] = {}
        self._alerted: set[str] = set()
        self._defined: Any = None

    def update(self, report: Report, step: int) -> None:
        """Log the counts if they changed, and alert of each error's name once.

        Args:
            report: the report so far.
            step: optimizer steps done.
        """
        shown = report if self.log_samples else report.redacted()
        run = wandb_run() if "wandb" in self.trackers else None
        numbers = scalars(shown)
        if run is not None and numbers != self._told:
            self._define(run)
            gone = {name: 0 for name in self._told if name not in numbers}
            run.log({**gone, **numbers, STEP: step})
            run.summary.update({**numbers, "recipe/status": status(shown)})
            self._told = numbers
        for finding in shown.flat:
            self.alert(finding)

    def follow(self, numbers: Mapping[str, float], step: int) -> None:
        """Log `numbers` of one moment, by name under "recipe/".

        Args:
            numbers: finite ones are sent.
            step: optimizer steps done.
        """
        run = wandb_run() if "wandb" in self.trackers else None
        finite = {f"recipe/{k}": v for k, v in numbers.items() if math.isfinite(v)}
        if run is not None and finite:
            self._define(run)
            run.log({**finite, STEP: step})

    def close(self, report: Report, step: int, *, tables: Collection[str] = ()) -> None:
        """Log what `update` has not, the table of findings, and the page as an artifact.

        Args:
            report: as it ended.
            step: optimizer steps done.
            tables: titles of the report's tables that are sent as such too, where they may.
        """
        self.update(report, step)
        run = wandb_run() if "wandb" in self.trackers else None
        if run is None:
            return
        import wandb

        shown = report if self.log_samples else report.redacted()
        columns, rows = findings_table(shown)
        self._define(run)
        run.log({"recipe/findings": wandb.Table(columns=columns, data=rows), STEP: step})
        for item in shown.exhibits:
            if isinstance(item, Table) and item.title in tables:
                name = "recipe/" + "-".join(re.findall(r"[a-z0-9]+", item.title.lower()))
                sent = wandb.Table(columns=list(item.columns), data=[list(r) for r in item.rows])
                run.log({name: sent, STEP: step})
        run.summary["recipe/status"] = status(shown)
        run.summary["recipe/next_step"] = shown.next_step
        artifact = wandb.Artifact(f"recipe-report-{run.id}", type="report")
        with artifact.new_file("report.html", mode="w", encoding="utf-8") as page:
            page.write(render_page(shown))
        with artifact.new_file("report.json", mode="w", encoding="utf-8") as data:
            data.write(shown.to_json())
        run.log_artifact(artifact)

    def _define(self, run: Any) -> None:
        if self._defined is not run:
            run.define_metric(STEP)
            run.define_metric("recipe/*", step_metric=STEP)
            self._defined = run

    def alert(self, finding: Finding) -> None:
        """Alert of an error, once per name; of its rows nothing is told."""
        if finding.severity != "error" or finding.check in self._alerted:
            return
        self._alerted.add(finding.check)
        about = f"{finding.message}\nFix: {finding.fix}" if finding.fix else finding.message
        title, level = f"error: {finding.check}", "ERROR"
        run = wandb_run() if "wandb" in self.trackers else None
        if run is not None:
            run.alert(title=title, text=about, level=level)
        if "trackio" in self.trackers:
            alert_trackio(title, about, level)


def wandb_run() -> Any:
    """The active run of W&B, or None; nothing is imported or started for it."""
    module = sys.modules.get("wandb")
    return None if module is None or os.environ.get("WANDB_DISABLED") == "true" else module.run


def alert_trackio(title: str, about: str, level: str) -> None:
    """Send an alert to trackio's run, if the process has trackio loaded and a run in it."""
    trackio = sys.modules.get("trackio")
    if trackio is None or trackio.context_vars.current_run.get() is None:
        return
    trackio.alert(title=title, text=about, level=trackio.AlertLevel[level])


def scalars(report: Report) -> dict[str, Any]:
    """What a sweep can sort by: counts of roots by severity, and of every check that found."""
    roots = report.findings
    found: dict[str, Any] = {
        f"recipe/{severity}s": sum(f.severity == severity for f in roots)
        for severity in ("error", "warning", "note")
    }
    for finding in report.flat:
        name = f"recipe/{finding.check}"
        found[name] = found.get(name, 0) + finding.count
    return found


def status(report: Report) -> str:
    """The report in one word: "error", "warning" or "healthy"."""
    return STATUS[verdict(report)[1]]


def findings_table(report: Report) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of all findings, roots first; of rows of the data only what is left."""
    flat = [one for root in report.findings for one in (root, *root.symptoms)]
    samples = any(finding.examples or finding.quotes for finding in flat)
    columns = [*COLUMNS, "explained_by", *(["examples", "quotes"] if samples else [])]
    rows: list[list[Any]] = []
    for root in report.findings:
        for finding in (root, *root.symptoms):
            cause = "" if finding is root else root.check
            row = [*(getattr(finding, name) for name in COLUMNS), cause]
            if samples:
                row += [", ".join(map(str, finding.examples)), "\n".join(finding.quotes)]
            rows.append(row)
    return columns, rows
