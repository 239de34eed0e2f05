"""The report as a section of a model card.

Cards go to the Hub, so what is written is the redacted report.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from hf_recipe.core.exhibit import Cell, Table
from hf_recipe.core.finding import STAGES, Finding
from hf_recipe.core.report import Report, write_atomically
from hf_recipe.report.console import counts, where

START, END = "<!-- hf_recipe: start -->", "<!-- hf_recipe: end -->"
STATES = {"pass": "done", "warn": "done, with doubts", "fail": "not done"}
HEAD = "Checked with hf_recipe"
MOST_ROWS = 50  # of a table


def render_markdown(report: Report) -> str:
    """The report as Markdown: verdict, findings, gates, answers, and what was not checked."""
    redacted = report.redacted()
    roots = redacted.findings
    ran = (
        f"{len(redacted.ran)} checks ran, {len(redacted.skipped)} skipped, "
        f"{len(redacted.crashed)} crashed"
    )
    parts = [f"## {HEAD}", f"{counts(redacted)}; {ran}."]
    if roots:
        rows = (
            [f.severity, f"`{_plain(f.check)}`", _about(f), where(f), ", ".join(_symptoms(f))]
            for f in roots
        )
        parts.append(_table(("severity", "check", "what was seen", "where", "explains"), rows))
    if redacted.gates:
        known = {gate.stage: gate for gate in redacted.gates}
        parts.append(
            _table(
                ("stage", "gate", "because"),
                (
                    [s, STATES[known[s].verdict], "; ".join(known[s].reasons)]
                    if s in known
                    else [s, "not reached", ""]
                    for s in STAGES
                ),
            )
        )
    if redacted.answers:
        parts.append(
            _table(("question", "answer"), ([a.question, a.answer] for a in redacted.answers))
        )
    parts += _tables(redacted)
    parts += _coverage(redacted)
    return "\n\n".join(parts) + "\n"


def _tables(report: Report) -> list[str]:
    """The last stage's tables, folded away: what the model came from, and how good it is."""
    tables = [e for e in report.exhibits if isinstance(e, Table) and e.stage == STAGES[-1]]
    parts = []
    for table in tables:
        rows = ([_cell(cell) for cell in row] for row in table.rows[:MOST_ROWS])
        parts.append(f"**{_plain(table.title)}**\n\n{_table(table.columns, rows)}")
        if table.caption:
            parts.append(_plain(table.caption))
    if not parts:
        return []
    body = "\n\n".join(parts)
    return [f"<details><summary>Tables</summary>\n\n{body}\n\n</details>"]


def _coverage(report: Report) -> list[str]:
    """The checks, folded away: which ran and when, which did not and why."""
    outcome = {f.check: f.severity for f in reversed(report.findings) for f in (*f.symptoms, f)}
    rows = [[f"`{n}`", f"ran ({', '.join(m)})", outcome.get(n, "-")] for n, m in report.ran.items()]
    rows += [[f"`{n}`", f"skipped: {reason}", "-"] for n, reason in report.skipped.items()]
    rows += [[f"`{n}`", f"crashed: {error}", "-"] for n, error in report.crashed.items()]
    if not rows:
        return []
    body = _table(("check", "state", "finding"), rows)
    return [f"<details><summary>All checks</summary>\n\n{body}\n\n</details>"]


def write_model_card(path: str | os.PathLike[str], report: Report) -> None:
    """Put the section into the card at `path`: in place of an earlier one, else at its end.

    The rest of the card, front matter included, is left as it is; a card that does not exist is
    written with the section alone.
    """
    card = Path(path)
    old = card.read_text(encoding="utf-8") if card.is_file() else ""
    section = f"{START}\n{render_markdown(report)}{END}"
    before, start, rest = old.partition(START)
    _, end, after = rest.partition(END)
    if start and end:
        new = before + section + after
    else:
        new = f"{old.rstrip()}\n\n{section}\n".lstrip() if old.strip() else f"{section}\n"
    write_atomically(card, new)


def _about(finding: Finding) -> str:
    named = finding.subject and finding.subject not in finding.message
    return f"{finding.subject}: {finding.message}" if named else finding.message


def _symptoms(finding: Finding) -> list[str]:
    return list(dict.fromkeys(symptom.check for symptom in finding.symptoms))


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = list(columns)
    lines = [heads, ["---"] * len(heads), *([_plain(c) for c in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Cell) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(content: str) -> str:
    """`content` in one cell: no line break, no cell border, no markup but code."""
    flat = re.sub(r"[\s\x00-\x1f\x7f]+", " ", content).strip()
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\|*_\[\]#])", r"\\\1", flat) if not flat.startswith("`") else flat
