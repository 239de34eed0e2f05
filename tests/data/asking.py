"""Ask the data stage's costly questions alone."""

from __future__ import annotations

from hf_recipe.catalogue import CHECKS
from hf_recipe.inspection import inspect_dataset

ASKED = (
    "split-drift",
    "label-shortcut",
    "target-in-input",
    "local-context-enough",
    "input-oversized",
    "spurious-variation",
)


def ask(data, *checks: str, **roles):
    """The report of `checks` alone; nothing may crash."""
    checks = checks or ASKED
    ignore = tuple(name for name in CHECKS if name not in checks)
    report = inspect_dataset(data, ignore=ignore, **{"label": "label", **roles})
    assert not report.crashed, report.crashed
    return report


def found(report, check: str, severity: str | None = None):
    """The findings of `check`, of one severity or all."""
    return [f for f in report.flat if f.check == check and severity in (None, f.severity)]


def alarms(report) -> list[str]:
    return [f"{f.check}: {f.message}" for f in report.flat if f.severity != "note"]


def answer(report, start: str) -> str:
    return next(a.answer for a in report.answers if a.question.startswith(start))


def measured(report, kind: str):
    return next(m.values for m in report.measurements if m.kind == kind)
