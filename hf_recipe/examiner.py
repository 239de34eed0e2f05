"""The examiner: takes measurements, lets the checks judge them, keeps the report.

It is the one border at which a crash inside a check or probe is caught: it becomes `crashed` in
the report, and the training goes on.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from typing import Any

from hf_recipe.catalogue import CHECKS
from hf_recipe.core.check import Check, Located, Measurement, Probe, Skip, private_paths
from hf_recipe.core.config import Settings
from hf_recipe.core.exhibit import Answer
from hf_recipe.core.finding import Finding, Moment
from hf_recipe.core.report import Report, Stored

Outcome = tuple[str, Any]


def _alone(outcome: Outcome) -> Outcome:
    return outcome


# Ids for which the model has no row: no forward pass gets past them.
UNRUNNABLE = frozenset({"label-out-of-range", "token-out-of-range"})


# What a check still waits for at the end, by the first moment at which its evidence exists.
ABSENT: dict[Moment, str] = {
    "dataset": "no data set was looked at",
    "batch": "no batch was made",
    "static": "no Trainer was looked at",
    "probe": "the model was not run",
    "run": "no training was watched",
    "eval": "no evaluation was watched",
    "end": "no run came to its end",
    "ranks": "one process alone",
    "resume": "nothing was resumed",
    "study": "no study was looked at",
}


class Examiner:
    """Runs probes, judges measurements, and tells `hear` of every finding that is new.

    Args:
        settings: what is selected, how severe, under which thresholds.
        report: where everything is kept.
        hear: called with each new finding, on every process.
        agree: makes rank 0's outcome the outcome of all ranks; identity on one process.
        leads: whether this process is rank 0, which alone reads data.

    Attributes:
        patient: whether what is found healthy while training waits for `settle`.
    """

    def __init__(
        self,
        settings: Settings,
        report: Report | None = None,
        *,
        hear: Callable[[Finding], None] = lambda finding: None,
        agree: Callable[[Outcome], Outcome] = _alone,
        leads: bool = True,
    ) -> None:
        self.settings = settings
        self.report = report if report is not None else Report()
        self.hear = hear
        self.agree = agree
        self.leads = leads
        self.latest: dict[str, Measurement] = {}
        self.outcomes: dict[str, str] = {}  # by probe: "taken", "skip" or "crash"
        self.select(settings)
        self.report.explains = {c.name: c.explains for c in CHECKS.values() if c.explains}
        self.report.settings = {f.name: getattr(settings, f.name) for f in fields(settings)}
        self._known = _baseline(settings.baseline)
        self.expected_seen: set[str] = set()
        self.patient = False
        self._quiet: dict[tuple[str, Moment, str], tuple[Measurement, int | None]] = {}

    # ---------------------------------------------------------------- what is wanted

    def select(self, settings: Settings) -> None:
        """From now on run what `settings` select."""
        self.settings = settings
        self.selected: dict[str, Check] = {
            name: check for name, check in CHECKS.items() if settings.selects(name, check.stage)
        }
        self._judges: dict[str, list[Check]] = {}
        self._answers: dict[tuple[type[Measurement], ...], list[Check]] = {}  # of `judging`
        for check in self.selected.values():
            for kind in check.by_kind:
                self._judges.setdefault(kind, []).append(check)

    def judging(self, kinds: Iterable[type[Measurement]]) -> list[Check]:
        """The selected checks that judge any of `kinds`."""
        asked = tuple(kinds)
        if asked not in self._answers:
            found = [check for kind in asked for check in self._judges.get(kind.kind(), ())]
            self._answers[asked] = list(dict.fromkeys(found))
        return self._answers[asked]

    def skip(self, kinds: Iterable[type[Measurement]], reason: str) -> None:
        """Say why the checks that judge `kinds` could not run (unless they have)."""
        for check in self.judging(kinds):
            if check.name not in self.report.ran:
                self.report.skipped[check.name] = reason

    def crash(self, kinds: Iterable[type[Measurement]], where: str, error: BaseException) -> None:
        """Record a crash of ours; never the user's concern beyond a line in the report."""
        last = traceback.extract_tb(error.__traceback__)
        place = f" at {last[-1].filename.rsplit('/', 1)[-1]}:{last[-1].lineno}" if last else ""
        for check in self.judging(kinds):
            self.report.crashed[check.name] = f"{type(error).__name__}: {error} ({where}{place})"

    # ---------------------------------------------------------------- probes

    def examine(
        self,
        probe: Probe,
        subject: Any,
        guard: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        step: int | None = None,
    ) -> list[Finding]:
        """Run one probe and judge what it measured; all ranks call it, all get rank 0's word.

        Args:
            step: the optimizer step it looks at; None before training.
        """
        if not (self.judging(probe.measures) or self.selected.keys() & set(probe.serves)):
            return []
        fatal = {f.check for f in self.report.flat} & UNRUNNABLE
        if probe.moment == "probe" and fatal:  # and on a GPU it would take the device with it
            self.skip(probe.measures, f"the model cannot run on such rows: {min(fatal)}")
            return []
        outcome: Outcome = ("taken", [])
        if self.leads or probe.moment not in ("dataset", "batch"):
            outcome = self._take(probe, subject, guard)
        word, content = self.agree(outcome)
        self.outcomes[probe.name] = word
        if word == "skip":
            self.skip(probe.measures, content)
            return []
        if word == "crash":
            for check in self.judging(probe.measures):
                self.report.crashed[check.name] = content
            return []
        found: list[Finding] = []
        for item in content:
            if isinstance(item, Located):
                found += self.judge(item.measurement, probe.moment, split=item.split, step=step)
            elif isinstance(item, Measurement):
                found += self.judge(item, probe.moment, step=step)
            elif isinstance(item, Answer):
                self.report.answer(item)
            else:
                self.report.exhibit(item)
        return found

    def _take(self, probe: Probe, subject: Any, guard: Callable[[], Any]) -> Outcome:
        try:
            with guard():
                return ("taken", list(probe.take(subject)))
        except Skip as reason:
            return ("skip", str(reason))
        except Exception as error:  # the probe border
            if excuse := excused(error):
                return ("skip", excuse)
            last = traceback.extract_tb(error.__traceback__)
            place = f"{last[-1].filename.rsplit('/', 1)[-1]}:{last[-1].lineno}" if last else "?"
            return ("crash", f"{type(error).__name__}: {error} ({probe.name}, {place})")

    # ---------------------------------------------------------------- judging

    def judge(
        self,
        measurement: Measurement,
        moment: Moment,
        *,
        split: str = "",
        step: int | None = None,
    ) -> list[Finding]:
        """Let every selected check judge `measurement`; returns the findings, new or repeated."""
        kind = measurement.kind()
        self.latest[kind] = measurement
        found: list[Finding] = []
        judged = False
        for check in self._judges.get(kind, ()):
            try:
                faults = list(check.judge(measurement, self.settings.thresholds.get(check.name)))
            except Exception as error:  # the probe border
                self.crash((type(measurement),), f"judging {kind}", error)
                continue
            judged = True
            self.report.skipped.pop(check.name, None)
            moments = self.report.ran.setdefault(check.name, [])
            if moment not in moments:
                moments.append(moment)
            for fault in faults:
                finding = check.finding(
                    fault, split=split, step=step, severity=self.settings.severity
                )
                if finding.check in self.settings.expect:
                    self.expected_seen.add(finding.check)
                elif finding.identity not in self._known:
                    found.append(finding)
        if judged and found:
            self.report.store(_stored(measurement, moment, split, step), keep=True)
        elif judged:
            self._quiet[kind, moment, split] = (measurement, step)
            if not self.patient or moment not in ("run", "eval"):  # of the others each stays
                self.settle()
        for finding in found:
            if step is None and self._stands(finding):
                continue  # the same probe, asked again before step 1
            standing = self.report.add(finding)
            if standing.count == finding.count:
                self.hear(finding)
        return found

    def settle(self) -> None:
        """Write into the report what was measured since the last call and found healthy.

        While training the newest of a kind replaces the one before; so it is made JSON only when
        somebody reads the report.
        """
        quiet, self._quiet = self._quiet, {}
        for (_, moment, split), (measurement, step) in quiet.items():
            self.report.store(_stored(measurement, moment, split, step))

    def _stands(self, finding: Finding) -> bool:
        return any(
            f.identity == finding.identity and f.message == finding.message
            for f in self.report.flat
        )

    # ---------------------------------------------------------------- closing

    def close(self, reasons: dict[str, str] | None = None) -> None:
        """Say of every selected check that did not run why, and of `expect` what did not fire."""
        for name, check in self.selected.items():
            if name in self.report.ran or name in self.report.crashed:
                continue
            default = (
                f"runs by its own call: {check.call}"
                if check.call
                else f"{ABSENT[check.moments[0]]} ({', '.join(check.moments)})"
            )
            self.report.skipped.setdefault(name, (reasons or {}).get(name, default))
        for name in self.settings.expect:
            if name in self.expected_seen or name not in self.report.ran:
                continue
            check = CHECKS[name]
            finding = Finding(
                check=name,
                stage=check.stage,
                severity="warning",
                message=f"{name} was expected to fire, ran, and saw nothing",
                subject="expect",
                why="An expectation that no longer holds hides the next real fault.",
                fix=f"remove {name!r} from expect=",
            )
            if finding.identity not in {f.identity for f in self.report.flat}:
                self.report.add(finding)
                self.hear(finding)


def _baseline(path: str | None) -> set[tuple[str, str, str]]:
    if path is None:
        return set()
    return {finding.identity for finding in _everything(Report.from_json(path))}


def _everything(report: Report) -> Iterator[Finding]:
    yield from report.flat


def _stored(measurement: Measurement, moment: Moment, split: str, step: int | None) -> Stored:
    return Stored(
        kind=measurement.kind(),
        version=type(measurement).version,
        moment=moment,
        split=split,
        step=step,
        values=measurement.values(),
        private=private_paths(type(measurement)),  # type: ignore[arg-type]
    )


def excused(error: BaseException) -> str | None:
    """Why a probe cannot run here, where an error says that much; None: it is ours."""
    text = f"{type(error).__name__} {error}".lower()
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate" in text:
        return "the probe ran out of memory"
    if "does not require grad and does not have a grad_fn" in text:
        return "the model's own forward pass takes gradients, so it cannot run without"
    return None
