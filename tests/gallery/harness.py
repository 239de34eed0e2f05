"""The gallery: faulty runs and their fixed twins, through real Trainers.

A case builds a Trainer, faulty or fixed. The harness attaches the recipe, trains, and asserts
that the fault's own check is the only alarm, and that the fixed twin raises none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hf_recipe
from hf_recipe.core.finding import Finding
from hf_recipe.testing import examined

Build = Callable[[Path, bool], Any]


@dataclass(frozen=True)
class Case:
    """One fault, planted and not.

    Attributes:
        check: the name that must be found.
        build: (folder, faulty) -> Trainer.
        severity: what the finding's severity must be; None: any.
        also: further alarms that this fault may rightly raise.
        healthy_also: alarms that the fixed twin may rightly raise (none, as a rule).
        train: False: preflight alone.
        settings: arguments of `attach`.
    """

    check: str
    build: Build
    severity: str | None = None
    also: Collection[str] = ()
    healthy_also: Collection[str] = ()
    train: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    def __str__(self) -> str:
        return self.name or self.check


def run(trainer: Any, *, train: bool = True, **settings: Any) -> hf_recipe.Report:
    """Attach, preflight, train if asked to, and return the report; nothing may have crashed."""
    return examined(trainer, train=train, **settings)


def everything(report: hf_recipe.Report) -> list[Finding]:
    """Roots and what is folded under them."""
    return [f for root in report.findings for f in (root, *root.symptoms)]


def alarms(report: hf_recipe.Report) -> set[str]:
    """Names of the roots that are warnings or errors."""
    return {f.check for f in report.findings if f.severity != "note"}


def assert_found(case: Case, folder: Path) -> hf_recipe.Report:
    """The faulty run is named, by its own name, as a root, and by no other."""
    report = run(case.build(folder, True), train=case.train, **case.settings)
    found = [f for f in report.findings if f.check == case.check]
    told = [(f.check, f.severity, f.message) for f in everything(report)]
    assert found, f"{case.check} was not found; ran {report.ran.get(case.check)}, told {told}"
    if case.severity is not None:
        assert found[0].severity == case.severity, told
    assert alarms(report) - {case.check} <= set(case.also), told
    return report


def assert_silent(case: Case, folder: Path) -> hf_recipe.Report:
    """The fixed twin raises no alarm, and the check did run."""
    report = run(case.build(folder, False), train=case.train, **case.settings)
    told = [(f.check, f.severity, f.message) for f in everything(report)]
    assert alarms(report) <= set(case.healthy_also), told
    assert case.check in report.ran, (report.skipped.get(case.check), report.ran)
    assert not [f for f in everything(report) if f.check == case.check and f.severity != "note"]
    return report
