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
        """This finding, seen once more: the newest numbers, the first step, one more count.

        What was read before step 1 names the cause (a tensor that the optimizer does not hold),
        and is not replaced by what it comes to in the run (a tensor that does not move).
        """
        worst = min(self.severity, later.severity, key=SEVERITIES.index)
        foreseen = self.step is None and later.step is not None and worst == self.severity
        return replace(
            self if foreseen else later,
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
        The roots, causes before lone findings and worse before milder ones. Errors are not
        folded, so that a second fault stays visible, but for those whose own evidence names the
        error that they follow from; nor is a finding folded under a milder one.
    """
    everything = list(findings)
    present = list(dict.fromkeys(finding.check for finding in everything))
    causes: dict[str, list[str]] = {check: [] for check in present}
    for cause in present:
        for symptom in explains.get(cause, ()):
            if symptom in causes and symptom != cause:
                causes[symptom].append(cause)
    above = {check: _reachable(check, causes) for check in present}
    worst = {
        check: min(SEVERITIES.index(f.severity) for f in everything if f.check == check)
        for check in present
    }

    def accounted(finding: Finding) -> bool:
        rank = SEVERITIES.index(finding.severity)
        proven = finding.evidence.get("follows_from") in above[finding.check] - {finding.check}
        return (rank > 0 or proven) and any(
            worst[c] <= rank for c in above[finding.check] - {finding.check}
        )

    roots = [i for i, f in enumerate(everything) if not accounted(f)]
    under: dict[int, list[Finding]] = {}
    left = [i for i, f in enumerate(everything) if accounted(f)]
    # Checks that explain each other stand in a ring: the first of them seen becomes the root.
    for i in sorted(left, key=lambda i: everything[i].check not in above[everything[i].check]):
        finding = everything[i]
        standing = [r for r in roots if _may_carry(everything[r], finding, above)]
        if standing:
            best = max(standing, key=lambda r: _kinship(everything[r], finding))
            under.setdefault(best, []).append(finding)
        else:
            roots.append(i)
    folded = [replace(everything[i], symptoms=tuple(under.get(i, ()))) for i in roots]

    def order(finding: Finding) -> tuple[int, bool, bool]:
        caused = bool(above[finding.check] - {finding.check})  # an error, and another one's doing
        return (SEVERITIES.index(finding.severity), caused, not finding.symptoms)

    folded.sort(key=order)
    return folded


def _reachable(check: str, causes: Mapping[str, list[str]]) -> set[str]:
    """Every check that accounts for `check`, at any remove; itself only if it is in a ring."""
    found: set[str] = set()
    open_ends = list(causes[check])
    while open_ends:
        cause = open_ends.pop()
        if cause not in found:
            found.add(cause)
            open_ends += causes[cause]
    return found


def _may_carry(root: Finding, finding: Finding, above: Mapping[str, set[str]]) -> bool:
    milder = SEVERITIES.index(root.severity) > SEVERITIES.index(finding.severity)
    return root.check != finding.check and root.check in above[finding.check] and not milder


def _kinship(root: Finding, finding: Finding) -> tuple[bool, bool]:
    """Of several roots that account for a finding, the one about the same thing carries it."""
    return (root.subject == finding.subject, root.split == finding.split)
