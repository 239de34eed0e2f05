"""Findings on the console: at once and in few lines, regrouped at the end, silent when healthy.

Trackers capture what a run prints, so nothing out of the user's data is ever printed: no quoted
values, no rows, no text of a crash. Those stand in the report on disk.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import IO

from rich.console import Console
from rich.text import Text

from hf_recipe.core.finding import SEVERITIES, Finding
from hf_recipe.core.report import Report

WIDTH = 100
MOST_LINES = 9
COLOURS = {"error": "bold red", "warning": "bold yellow", "note": "bold cyan"}
LABEL = 12  # columns of "  silence   "
MOST_NOTES = 3
MOST_REASONS = 3
ASCII = str.maketrans(
    {"×": "x", "±": "+-", "−": "-", "–": "-", "—": "-", "…": "...", "→": "->", "≤": "<=",
     "≥": ">=", "≈": "~", "σ": "sigma", "µ": "u", "μ": "u", "²": "^2", "·": "*", "√": "sqrt",
     "‘": "'", "’": "'", "“": '"', "”": '"', "∞": "inf", "\u00a0": " "}
)  # fmt: skip


class ConsoleSink:
    """Prints findings as they come and one closing summary.

    Args:
        stream: where to; default: standard error.
        enabled: False on every process but the first, which alone speaks.
        trial_mode: in a sweep's trial: errors only, and no summary without one.
    """

    def __init__(
        self,
        stream: IO[str] | None = None,
        *,
        enabled: bool = True,
        trial_mode: bool = False,
    ) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.enabled = enabled
        self.trial_mode = trial_mode
        terminal = self.stream.isatty()
        colour = terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        encoding = (getattr(self.stream, "encoding", None) or "").lower()
        self._ascii = not (terminal and encoding.startswith("utf"))
        self._console = Console(
            file=self.stream,
            force_terminal=colour,
            force_jupyter=False,
            color_system="standard" if colour else None,
            width=WIDTH,
            highlight=False,
            markup=False,
            emoji=False,
        )
        self._said: set[tuple[str, str, str]] = set()

    # ---------------------------------------------------------------- at once

    def finding(self, finding: Finding) -> None:
        """Print an error or a warning at once, each check, subject and split only once.

        The first of a check is told in full, in nine lines at most; the next ones, about other
        columns or layers, in their first line alone. Notes wait for the summary.
        """
        told = {"error"} if self.trial_mode else {"error", "warning"}
        if not self.enabled or finding.severity not in told or finding.identity in self._said:
            return
        known = any(check == finding.check for check, _, _ in self._said)
        self._said.add(finding.identity)
        lines = self._headline(finding)
        if not known:
            lines += self._details(finding, MOST_LINES - len(lines))
        for number, line in enumerate(lines):
            self._print(line, finding.severity if number == 0 else None)

    def _headline(self, finding: Finding) -> list[str]:
        place = where(finding)
        told = f"{finding.severity}[{finding.check}] {self._clean(_named(finding))}"
        if len(told) + len(place) + 3 <= WIDTH:
            return [told + place.rjust(WIDTH - len(told)) if place else told]
        room = WIDTH - len(place) - 3 if place else WIDTH
        lines = _wrap(told, WIDTH, 2, hanging="  ")
        if place and len(lines[-1]) <= room:
            lines[-1] += place.rjust(WIDTH - len(lines[-1]))
        elif place:
            lines = _wrap(told, room, 2, hanging="  ")
            lines[-1] += place.rjust(WIDTH - len(lines[-1]))
        return lines

    def _details(self, finding: Finding, room: int) -> list[str]:
        parts = [
            ("seen", str(finding.evidence.get("seen", "")), 1),
            ("expected", str(finding.evidence.get("expected", "")), 1),
            ("why", finding.why, 2),
            ("fix", finding.fix, 2),
            ("silence", f'ignore=["{finding.check}"]', 1),
            ("more", f"hf-recipe explain {finding.check}", 1),
        ]
        told = {label: _wrap(self._clean(text), WIDTH - LABEL, most) for label, text, most in parts}
        for label in ("why", "fix"):
            if sum(map(len, told.values())) > room and len(told[label]) > 1:
                text = dict((name, text) for name, text, _ in parts)[label]
                told[label] = _wrap(self._clean(text), WIDTH - LABEL, 1)
        return [
            f"  {label if number == 0 else '':<{LABEL - 2}}{line}"
            for label, lines in told.items()
            for number, line in enumerate(lines)
        ]

    # ---------------------------------------------------------------- at the end

    def summary(self, report: Report, path: str | os.PathLike[str] | None = None) -> None:
        """Print the closing summary: roots with what they account for, counts, the next step.

        A healthy run gets one line; a healthy trial of a sweep none.
        """
        if not self.enabled:
            return
        roots = report.findings
        alarms = [f for f in roots if f.severity != "note"]
        if self.trial_mode:
            alarms = [f for f in alarms if f.severity == "error"]
            if alarms:
                self._print(f"hf-recipe: {counts(report)}", "error")
            return
        if not alarms and not report.crashed:
            self._print(self._one_line(report, path))
            return
        for line in _wrap(f"hf-recipe: {counts(report)}; {coverage(report)}", WIDTH, 2, "  "):
            self._print(self._clean(line))
        for finding in alarms:
            for number, line in enumerate(self._root(finding)):
                self._print(line, finding.severity if number == 0 else None)
        self._rest(report, path)

    def _root(self, finding: Finding) -> Iterator[str]:
        place = ", ".join(filter(None, [where(finding), _times(finding.count)]))
        told = f"{finding.severity}[{finding.check}] {_named(finding)}"
        yield from _wrap(
            self._clean(told + (f" ({place})" if place else "")), WIDTH - 2, 2, "  ", indent="  "
        )
        if finding.symptoms:
            names = Counter(symptom.check for symptom in finding.symptoms)
            listed = ", ".join(n if k == 1 else f"{n} ({k})" for n, k in names.items())
            yield from _wrap(f"explains {listed}", WIDTH - 4, 2, "  ", indent="    ")

    def _rest(self, report: Report, path: str | os.PathLike[str] | None) -> None:
        crashed = [f"{name} ({error})" for name, error in sorted(report.redacted().crashed.items())]
        parts = [
            ("notes", _few(_note_names(report), MOST_NOTES), 1),
            ("skipped", skip_reasons(report), 2),
            ("crashed", _few(crashed, MOST_NOTES), 2),
            ("next", report.next_step, 2),
            ("report", str(path or ""), 2),
        ]
        for label, text, most in parts:
            for number, line in enumerate(_wrap(self._clean(text), WIDTH - LABEL, most)):
                self._print(f"  {label if number == 0 else '':<{LABEL - 2}}{line}")

    def _one_line(self, report: Report, path: str | os.PathLike[str] | None) -> str:
        notes = _note_names(report)
        short = _plural(len(notes), "note") if notes else "healthy"
        found = f"{short} ({_few(notes, MOST_NOTES)})" if notes else short
        told = f"; report: {path}" if path else ""
        ran = f"{len(report.ran)} ran, {len(report.skipped)} skipped"
        for line in (
            f"hf-recipe: {found}; {ran}" + told,
            f"hf-recipe: {short}; {ran}" + told,
            f"hf-recipe: {found}; {ran}",
        ):
            if len(line) <= WIDTH:
                return self._clean(line)
        return f"hf-recipe: {short}; {ran}"

    # ---------------------------------------------------------------- printing

    def _clean(self, text: str) -> str:
        """`text` on one line, without codes that a terminal would obey."""
        text = re.sub(r"\s+", " ", text).strip()
        if self._ascii:
            text = text.translate(ASCII).encode("ascii", "backslashreplace").decode("ascii")
        return re.sub(
            "[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]",
            lambda found: found[0].encode("unicode_escape").decode("ascii"),
            text,
        )

    def _print(self, line: str, severity: str | None = None) -> None:
        text = Text(line.rstrip())
        if severity is not None:
            head = re.match(r"\s*[a-z-]+(\[[a-z0-9-]+\])?", line)
            text.stylize(COLOURS[severity], 0, head.end() if head else 0)
        self._console.print(text, soft_wrap=True)


def counts(report: Report) -> str:
    """``1 error, 2 warnings, 3 notes``: the roots by severity."""
    number = Counter(finding.severity for finding in report.findings)
    return ", ".join(_plural(number[severity], severity) for severity in SEVERITIES)


def coverage(report: Report) -> str:
    """``14 ran, 3 skipped, 0 crashed``."""
    return f"{len(report.ran)} ran, {len(report.skipped)} skipped, {len(report.crashed)} crashed"


def skip_reasons(report: Report) -> str:
    """``8: runs by its own call; 2: no eval_dataset``: how many checks each reason held back.

    What a reason says after a colon or in brackets differs by check and stands in the report.
    """
    numbers = Counter(re.split(r": | \(", reason)[0] for reason in report.skipped.values())
    common = numbers.most_common(MOST_REASONS)
    told = [f"{number}: {reason}" for reason, number in common]
    rest = len(report.skipped) - sum(number for _, number in common)
    if rest:
        told.append(f"{rest} more in the report")
    return "; ".join(told)


def where(finding: Finding) -> str:
    """``train, step 4, rank 0``: split, first step, rank, as far as they are known."""
    parts = [finding.split]
    if finding.step is not None:
        parts.append(f"step {finding.step}")
    if finding.rank is not None:
        parts.append(f"rank {finding.rank}")
    return ", ".join(filter(None, parts))


def _named(finding: Finding) -> str:
    if finding.subject and finding.subject not in finding.message:
        return f"{finding.subject}: {finding.message}"
    return finding.message


def _note_names(report: Report) -> list[str]:
    return list(dict.fromkeys(f.check for f in report.findings if f.severity == "note"))


def _few(names: Iterable[str], most: int) -> str:
    everything = list(names)
    if len(everything) <= most:
        return ", ".join(everything)
    return f"{', '.join(everything[:most])} and {len(everything) - most} more"


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _times(count: int) -> str:
    return f"{count} times" if count > 1 else ""


def _wrap(text: str, width: int, most: int, hanging: str = "", indent: str = "") -> list[str]:
    """`text` in at most `most` lines of `width` columns; what is cut ends in an ellipsis."""
    lines = textwrap.wrap(
        text,
        width + len(indent),
        initial_indent=indent,
        subsequent_indent=indent + hanging,
        max_lines=most,
        placeholder=" ...",
        break_on_hyphens=False,
    )
    return lines
