"""The report: what ran, what was found, what could not be checked and why.

It is written while the run goes on, atomically, so that a killed run leaves a readable one.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from hf_recipe.core.check import hints_of, plain, typed, unplain, without
from hf_recipe.core.exhibit import EXHIBITS, Answer, Exhibit
from hf_recipe.core.finding import SEVERITIES, STAGES, Finding, Moment, Stage, fold

SCHEMA = "hf_recipe.report/1"
MOST_MEASUREMENTS = 1024
MOST_KEPT = 16  # of one kind, moment and split, while a run goes on

GATES: dict[Stage, str] = {
    "data": "we should now have a good understanding of the dataset",
    "baselines": (
        "a semi-automated pipeline that, given any model, "
        "spits out all kinds of metrics and debugging results"
    ),
    "complexify": "a large model that (over)fits",
    "regularize": "overfitting reduced considerably",
    "tune": "SOTA",
}

NEXT_MOVE: dict[Stage, str] = {
    "data": "look at the data: hf_recipe.inspect_dataset(trainer.train_dataset)",
    "baselines": "prove the pipeline: recipe.overfit_one_batch()",
    "complexify": "grow the model until it overfits, at a constant learning rate",
    "regularize": "now give up some training loss for validation loss: more data first",
    "tune": "search at random, few parameters at a time, then distil",
}

Verdict = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Gate:
    """How a stage ended: the recipe's sentence, the verdict and its reasons."""

    stage: Stage
    verdict: Verdict
    reasons: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        return GATES[self.stage]

    @property
    def because(self) -> str:
        """The first reason that is marked with the verdict, else the first, else the sentence."""
        mark = f"{self.verdict}: "
        marked = [reason for reason in self.reasons if reason.startswith(mark)]
        return next(iter(marked or self.reasons), self.sentence).removeprefix(mark)


@dataclass(frozen=True)
class Stored:
    """A measurement as it stands in a report, so that it can be judged again.

    ``private`` names the fields of ``values`` that hold the user's data (nested ones as
    ``outer.inner``); ``kept`` says that something was found in it.
    """

    kind: str
    version: int
    moment: Moment
    split: str
    step: int | None
    values: Mapping[str, Any]
    private: tuple[str, ...] = ()
    kept: bool = False


@dataclass
class Report:
    """Everything that was seen. `findings` are the roots, cause first, symptoms folded under."""

    title: str = ""
    status: Literal["running", "finished", "failed"] = "running"
    ran: dict[str, list[Moment]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    crashed: dict[str, str] = field(default_factory=dict)
    measurements: list[Stored] = field(default_factory=list)
    exhibits: list[Exhibit] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    gates: list[Gate] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    explains: dict[str, tuple[str, ...]] = field(default_factory=dict)
    flat: list[Finding] = field(default_factory=list)

    # ---------------------------------------------------------------- reading

    @property
    def findings(self) -> list[Finding]:
        """The roots: causes first, worse before milder, what they account for as symptoms."""
        return fold(self.flat, self.explains)

    def at_least(self, severity: str) -> list[Finding]:
        """Roots as severe as `severity` ("error", "warning" or "note") or worse."""
        worst = SEVERITIES[: _index(SEVERITIES, severity) + 1]
        return [finding for finding in self.findings if finding.severity in worst]

    @property
    def next_step(self) -> str:
        """One line: the recipe's next move, given what was found so far."""
        for severity in ("error", "warning"):
            for finding in self.findings:
                if finding.severity == severity:
                    about = f" ({finding.subject})" if finding.subject else ""
                    how = finding.fix or f"hf-recipe explain {finding.check}"
                    return f"Mend {finding.check}{about} first: {how}"
        if self.ran and all(moments == ["study"] for moments in self.ran.values()):
            return "Run the best three again on new seeds: the best of many is best by luck, too."
        passed = {gate.stage for gate in self.gates if gate.verdict != "fail"}
        for gate in self.gates:
            if gate.verdict == "fail":
                return f"The {gate.stage} gate is shut: {gate.because}"
        if len(passed) == len(STAGES):
            doubts = [gate for gate in self.gates if gate.verdict == "warn"]
            if doubts:  # the latest rests on all before it
                last = doubts[-1]
                return f"All five gates are open, {last.stage} with a doubt: {last.because}"
            return "All five gates are open: leave it in training."
        for stage in STAGES:
            if stage not in passed and (self.gates or stage != "data"):
                return f"Nothing stands in the way; {NEXT_MOVE[stage]}."
        return f"Nothing stands in the way; {NEXT_MOVE['data']}."

    # ---------------------------------------------------------------- writing

    def add(self, finding: Finding) -> Finding:
        """Take in a finding; one seen before counts up. Returns it as it now stands."""
        for place, earlier in enumerate(self.flat):
            if earlier.identity == finding.identity:
                self.flat[place] = earlier.again(finding)
                return self.flat[place]
        self.flat.append(finding)
        return finding

    def store(self, stored: Stored, *, keep: bool = False) -> None:
        """Keep a measurement; without `keep` it replaces the last of its kind, moment and split.

        A run that is flushed a thousand times thus keeps the newest of each kind and those
        that something was found in: of these the first ones and the newest.
        """
        stored = replace(stored, kept=keep)
        if stored in self.measurements:  # the same probe, run again, saw the same
            return
        if stored.moment in ("run", "eval"):
            rivals = [i for i, old in enumerate(self.measurements) if _same_place(old, stored)]
            if rivals and len(rivals) >= (MOST_KEPT if keep else 1):
                del self.measurements[rivals[-1]]
        self.measurements.append(stored)
        del self.measurements[:-MOST_MEASUREMENTS]

    def exhibit(self, exhibit: Exhibit) -> None:
        """Take in an exhibit; one with the same stage and title is replaced."""
        self.exhibits = [
            e for e in self.exhibits if (e.stage, e.title) != (exhibit.stage, exhibit.title)
        ] + [exhibit]

    def answer(self, answer: Answer) -> None:
        """Take in an answer; an earlier one to the same question is replaced."""
        self.answers = [a for a in self.answers if a.question != answer.question] + [answer]

    def gate(self, gate: Gate) -> None:
        """Take in a gate; an earlier one of the same stage is replaced."""
        self.gates = [g for g in self.gates if g.stage != gate.stage] + [gate]
        self.gates.sort(key=lambda g: STAGES.index(g.stage))

    def without_rows(self) -> list[Finding]:
        """The findings, unfolded, without rows and quoted values."""
        return [_without_rows(finding) for finding in self.flat]

    def redacted(self) -> Report:
        """A copy without rows, quoted values or private exhibits: what may leave the machine.

        The text of a crash may hold values of the data; its type remains.
        """
        return replace(
            self,
            flat=self.without_rows(),
            exhibits=[e for e in self.exhibits if not e.private],
            crashed={name: _type_of_error(text) for name, text in self.crashed.items()},
            measurements=[
                replace(m, values=functools.reduce(without, m.private, m.values))
                for m in self.measurements
            ],
        )

    # ---------------------------------------------------------------- JSON

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able values, with its schema's name."""
        return {
            "schema": SCHEMA,
            "title": self.title,
            "status": self.status,
            "next_step": self.next_step,
            "findings": [plain(finding) for finding in self.findings],
            "ran": plain(self.ran),
            "skipped": dict(self.skipped),
            "crashed": dict(self.crashed),
            "gates": [plain(gate) for gate in self.gates],
            "answers": [plain(answer) for answer in self.answers],
            "exhibits": [{"kind": type(e).__name__, **plain(e)} for e in self.exhibits],
            "measurements": [plain(stored) for stored in self.measurements],
            "environment": plain(self.environment),
            "settings": plain(self.settings),
            "explains": plain(self.explains),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The report that `to_dict` came from; raises ValueError on another schema."""
        if data.get("schema") != SCHEMA:
            raise ValueError(
                f"schema {data.get('schema')!r}, expected {SCHEMA!r}; "
                "read it with the version that wrote it"
            )
        flat: list[Finding] = []
        for item in data["findings"]:
            root = _finding(item)
            flat += [replace(root, symptoms=()), *root.symptoms]
        return cls(
            title=data["title"],
            status=data["status"],
            ran={name: list(moments) for name, moments in data["ran"].items()},
            skipped=dict(data["skipped"]),
            crashed=dict(data["crashed"]),
            measurements=[  # their values stay JSON until they are judged again
                replace(_record(Stored, item), values=item["values"])
                for item in data["measurements"]
            ],
            exhibits=[_exhibit(item) for item in data["exhibits"]],
            answers=[_record(Answer, item) for item in data["answers"]],
            gates=[_record(Gate, item) for item in data["gates"]],
            environment=unplain(data["environment"]),
            settings=unplain(data["settings"]),
            explains={name: tuple(others) for name, others in data["explains"].items()},
            flat=flat,
        )

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as JSON text; written atomically to `path` if one is given."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False)
        # Half a surrogate pair, as broken texts hold, has no UTF-8; JSON can escape it.
        text = re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)
        if path is not None:
            write_atomically(path, text)
        return text

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Report:
        """Read a report back, losslessly."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    # ---------------------------------------------------------------- renderers
    # Imported when called: `core` depends on nothing.

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as one self-contained page; written atomically to `path` if given."""
        from hf_recipe.report.page import render_page

        text = render_page(self)
        if path is not None:
            write_atomically(path, text)
        return text

    def to_sarif(self, path: str | os.PathLike[str] | None = None) -> str:
        """The findings as SARIF 2.1.0, for code-scanning dashboards."""
        from hf_recipe.report.sarif import render_sarif

        text = render_sarif(self)
        if path is not None:
            write_atomically(path, text)
        return text

    def to_markdown(self) -> str:
        """The report as a section of a model card."""
        from hf_recipe.report.model_card import render_markdown

        return render_markdown(self)


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write `content` so that a reader sees the old file or the whole new one, never a part."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _same_place(old: Stored, new: Stored) -> bool:
    return (old.kind, old.moment, old.split, old.kept) == (
        new.kind,
        new.moment,
        new.split,
        new.kept,
    )


def _without_rows(finding: Finding) -> Finding:
    symptoms = tuple(_without_rows(symptom) for symptom in finding.symptoms)
    return replace(finding, examples=(), quotes=(), symptoms=symptoms)


def _type_of_error(text: str) -> str:
    """The `ValueError` of "ValueError: ...", and nothing of a text that does not start so."""
    kind = re.match(r"([A-Za-z_][A-Za-z0-9_.]*)(?=:|$)", text)
    return kind[1] if kind else "error"


def _index(values: Iterable[str], value: str) -> int:
    known = list(values)
    if value not in known:
        raise ValueError(f"severity must be one of {', '.join(known)}; got {value!r}")
    return known.index(value)


def _record(kind: Callable[..., Any], item: Mapping[str, Any]) -> Any:
    assert isinstance(kind, type)
    hints = hints_of(kind)
    known = {f.name for f in dataclasses.fields(kind)}
    return kind(**{k: typed(hints[k], v) for k, v in item.items() if k in known})


def _finding(item: Mapping[str, Any]) -> Finding:
    return _record(Finding, item)  # type: ignore[no-any-return]


def _exhibit(item: Mapping[str, Any]) -> Exhibit:
    return _record(EXHIBITS[item["kind"]], item)  # type: ignore[no-any-return]
