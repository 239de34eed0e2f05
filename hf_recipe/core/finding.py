"""Findings: what a check says about a run, as plain values.

A judging function yields a :class:`Fault` (numbers and a sentence); the examiner completes it
with what its check knows (why, fix, severity) into a :class:`Finding`, the only thing that the
console, the page, JSON, SARIF and W&B ever see.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

Severity = Literal["error", "warning", "note"]
Stage = Literal["data", "baselines", "complexify", "regularize", "tune"]
Moment = Literal[
    "dataset", "batch", "static", "probe", "run", "eval", "end", "ranks", "resume", "study"
]

SEVERITIES: tuple[Severity, ...] = get_args(Severity)
STAGES: tuple[Stage, ...] = get_args(Stage)
MOMENTS: tuple[Moment, ...] = get_args(Moment)


@dataclass(frozen=True)
class Fault:
    """What one judging function says: a sentence with its numbers.

    ``message``, ``subject`` and ``evidence`` may leave the machine (W&B, the Hub); so they name
    columns, layers and counts, never a value out of the user's data. Such values go to ``quotes``
    and row numbers to ``examples``, which stay here unless ``log_samples=True``.
    """

    message: str
    subject: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    severity: Severity | None = None
    fix: str | None = None
    examples: tuple[int, ...] = ()
    quotes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """A fault, with its check's name, reasons and remedy.

    Attributes:
        check: kebab-case name of the fault; its only id.
        subject: column, layer, parameter, ...: what the fault is about.
        evidence: ``seen`` and ``expected`` (short texts) and the numbers behind them.
        fix: the line of code that mends it.
        examples: row indices of the data set, worst first.
        quotes: values out of the user's data; never uploaded without consent.
        step: first optimizer step at which it was seen; None before training.
        count: how often it was seen.
        symptoms: findings that this one accounts for.
    """

    check: str
    stage: Stage
    severity: Severity
    message: str
    subject: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""
    fix: str = ""
    examples: tuple[int, ...] = ()
    quotes: tuple[str, ...] = ()
    split: str = ""
    step: int | None = None
    last_step: int | None = None
    rank: int | None = None
    count: int = 1
    symptoms: tuple[Finding, ...] = ()

    @property
    def identity(self) -> tuple[str, str, str]:
        """Two findings with the same identity are one finding, seen twice."""
        return (self.check, self.subject, self.split)

    def again(self, later: Finding) -> Finding:
        """This finding, seen once more: the newest numbers, the first step, one more count."""
        worst = min(self.severity, later.severity, key=SEVERITIES.index)
        return replace(
            later,
            severity=worst,
            step=self.step,
            last_step=later.step if later.step is not None else self.last_step,
            count=self.count + later.count,
        )


def fold(findings: Iterable[Finding], explains: Mapping[str, Iterable[str]]) -> list[Finding]:
    """Put every finding that another one accounts for under its cause.

    Args:
        findings: findings without symptoms.
        explains: for each check, the checks whose findings it accounts for.

    Returns:
        The roots, causes before lone findings and worse before milder ones. Errors are never
        folded, so that a second fault stays visible.
    """
    everything = list(findings)
    present = {finding.check for finding in everything}
    causes: dict[str, str] = {}
    for cause in present:
        for symptom in explains.get(cause, ()):
            if symptom in present and symptom != cause:
                causes.setdefault(symptom, cause)

    def root_of(check: str) -> str:
        seen = {check}
        while check in causes and causes[check] not in seen:
            check = causes[check]
            seen.add(check)
        return check

    roots = [f for f in everything if f.severity == "error" or root_of(f.check) == f.check]
    standing = {finding.check for finding in roots}
    symptoms: dict[str, list[Finding]] = {}
    for finding in everything:
        if finding in roots:
            continue
        cause = root_of(finding.check)
        if cause not in standing:  # its cause lies in a ring of mutual explanations
            roots.append(finding)
            standing.add(finding.check)
            continue
        symptoms.setdefault(cause, []).append(finding)
    folded = []
    for finding in roots:
        under = symptoms.pop(finding.check, ())  # under the first of several subjects only
        folded.append(replace(finding, symptoms=tuple(under)) if under else finding)
    folded.sort(key=lambda f: (SEVERITIES.index(f.severity), not f.symptoms))
    return folded
