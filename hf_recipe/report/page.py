"""The report as one self-contained page.

No network (a content security policy forbids it), readable without JavaScript, light and dark,
all text escaped. Budget: 1 MB without pictures, 5 MB with them, 10 MB never passed; what is left
out to keep it is said on the page.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_recipe.core.exhibit import Exhibit, Ladder, Picture, Table
from hf_recipe.core.finding import SEVERITIES, STAGES, Finding
from hf_recipe.core.report import GATES, Report
from hf_recipe.report.console import counts, where
from hf_recipe.report.figures import figure, weight
from hf_recipe.report.markup import code, details, section, table, text, value_of

HERE = Path(__file__).parent
MOST_BYTES = 1_000_000  # without pictures
MOST_PICTURES = 4_000_000
STATES = {"pass": "done", "warn": "done, with doubts", "fail": "not done"}
HEADINGS = {
    "data": "1 Become one with the data",
    "baselines": "2 Skeleton and dumb baselines",
    "complexify": "3 Overfit",
    "regularize": "4 Regularize",
    "tune": "5 Tune and squeeze out the juice",
}


@dataclass(frozen=True)
class Detail:
    """How much of a report is put on the page, from everything to the least."""

    json_without: tuple[str, ...] | None = ()  # None: no JSON at all
    exhibits: int = 1000
    rows: int = 200
    browsed: int = 2_000
    findings: int = 1000


DETAILS = (
    Detail(),
    Detail(json_without=("measurements",)),
    Detail(json_without=("measurements", "exhibits")),
    Detail(json_without=("measurements", "exhibits"), browsed=800),
    Detail(
        json_without=("measurements", "exhibits"), rows=50, browsed=200, exhibits=60, findings=200
    ),
    Detail(json_without=None, rows=20, browsed=50, exhibits=20, findings=60),
    Detail(json_without=None, exhibits=0, findings=20),
)


def render_page(report: Report) -> str:
    """The report as HTML, within its budget."""
    report, note = _within_budget(report)
    pictures = sum(map(weight, report.exhibits))
    page = ""
    drawn: dict[tuple[int, int], str] = {}
    for detail in DETAILS:
        page = _page(report, detail, note, drawn)
        if len(page.encode()) - pictures <= MOST_BYTES:
            break
    return page


def _within_budget(report: Report) -> tuple[Report, str]:
    """The report with as many pictures as the budget has room for, and a note on the others."""
    kept: list[Exhibit] = []
    room, dropped = MOST_PICTURES, 0
    for exhibit in report.exhibits:
        if weight(exhibit) > room:
            dropped += 1
            continue
        room -= weight(exhibit)
        kept.append(exhibit)
    note = (
        f"{dropped} of {len(report.exhibits)} exhibits hold more pictures than a page of 5 MB has "
        "room for; they stand in the JSON report."
        if dropped
        else ""
    )
    return replace(report, exhibits=kept), note


def _page(report: Report, detail: Detail, note: str, drawn: dict[tuple[int, int], str]) -> str:
    style = (HERE / "page.css").read_text(encoding="utf-8")
    script = (HERE / "page.js").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; "
        f"script-src '{_digest(script)}'; base-uri 'none'; form-action 'none'"
    )
    sections = [
        section("findings", "Findings", _findings(report, detail)),
        section("gates", "The five stages", _gates(report)),
        section("answers", "Answers", _answers(report)),
        section("exhibits", "Exhibits", _exhibits(report, detail, note, drawn)),
        section("checks", "What was checked", _coverage(report)),
        section("settings", "Settings", _settings(report)),
        section("environment", "Environment", _pairs(report.environment)),
        section("json", "Raw report", _raw(report, detail)),
    ]
    title = report.title or "Training report"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{text(title, 200)} · hf_recipe</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f"{_header(report, title, sections)}\n<main>\n{chr(10).join(filter(None, sections))}\n"
        f"</main>\n<footer>Written by hf_recipe. Nothing on this page was fetched, nothing is sent."
        f"</footer>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def _digest(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


# -------------------------------------------------------------------- header


def verdict(report: Report) -> tuple[str, str]:
    """The report in one sentence, and its tone: "error", "warning" or "good"."""
    roots = report.findings
    errors = [f for f in roots if f.severity == "error"]
    warnings = [f for f in roots if f.severity == "warning"]
    shut = [gate for gate in report.gates if gate.verdict == "fail"]
    if errors:
        more = f" and {len(errors) - 1} more" if len(errors) > 1 else ""
        return f"Not sound: {errors[0].check}{more}", "error"
    if report.status == "failed":
        return "The run failed; no check names a fault", "error"
    if warnings:
        more = f" and {len(warnings) - 1} more" if len(warnings) > 1 else ""
        return f"Look at this first: {warnings[0].check}{more}", "warning"
    if shut:
        return f"No fault found; the {shut[0].stage} stage is not done", "warning"
    if report.crashed:
        return f"No fault found, but {len(report.crashed)} checks crashed", "warning"
    if not report.ran:
        return "Nothing was checked", "warning"
    return f"Healthy: {len(report.ran)} checks ran and found no fault", "good"


def _header(report: Report, title: str, sections: list[str]) -> str:
    line, tone = verdict(report)
    state = {"running": "still running", "finished": "finished", "failed": "failed"}
    ran = (
        f"{len(report.ran)} checks ran, {len(report.skipped)} skipped, "
        f"{len(report.crashed)} crashed"
    )
    names = {
        "findings": "Findings", "gates": "Stages", "answers": "Answers", "exhibits": "Exhibits",
        "checks": "Checks", "settings": "Settings", "environment": "Environment", "json": "JSON",
    }  # fmt: skip
    links = "".join(
        f'<a href="#{name}">{label}</a>'
        for (name, label), content in zip(names.items(), sections, strict=True)
        if content
    )
    return (
        f'<header><div><h1>{text(title, 200)}</h1><p class="verdict {tone}">{text(line)}</p>'
        f'<p class="counts">{counts(report)} · {ran} · {state[report.status]}</p>'
        f'<p class="next"><b>Next</b>{text(report.next_step)}</p><nav>{links}</nav></div></header>'
    )


# -------------------------------------------------------------------- findings


def _findings(report: Report, detail: Detail) -> str:
    roots = report.findings
    if not roots:
        ran = "every check that ran was silent" if report.ran else "no check ran"
        return f'<p class="lead">None: {ran}.</p>'
    shown = "".join(_finding(finding) for finding in roots[: detail.findings])
    left = len(roots) - detail.findings
    return shown + (f'<p class="faint">{left:,} more in the JSON report.</p>' if left > 0 else "")


def _finding(finding: Finding) -> str:
    places = [where(finding)]
    if finding.last_step is not None and finding.last_step != finding.step:
        places.append(f"last at step {finding.last_step}")
    if finding.count > 1:
        places.append(f"{finding.count} times")
    about = f'<span class="tag">{text(finding.subject, 200)}</span>' if finding.subject else ""
    severity = finding.severity
    return (
        f'<article class="finding {severity}"><div class="head">'
        f'<span class="badge {severity}">{severity}</span><h4>{text(finding.check, 200)}</h4>'
        f'{about}<span class="where">{text(", ".join(filter(None, places)))}</span></div>'
        f"<p>{text(finding.message)}</p>{_reasons(finding)}{_evidence(finding)}"
        f"{_symptoms(finding)}</article>"
    )


def _reasons(finding: Finding) -> str:
    parts = [
        ("Seen", text(finding.evidence.get("seen", ""))),
        ("Expected", text(finding.evidence.get("expected", ""))),
        ("Why", text(finding.why)),
        ("Fix", code(finding.fix) if finding.fix else ""),
    ]
    told = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in parts if value)
    name = text(finding.check)
    return (
        (f"<dl>{told}</dl>" if told else "")
        + f'<p class="aside"><span>Silence it: <code>ignore=[&quot;{name}&quot;]</code></span>'
        + f"<span>More: <code>hf-recipe explain {name}</code></span></p>"
    )


def _evidence(finding: Finding) -> str:
    numbers = {k: v for k, v in finding.evidence.items() if k not in ("seen", "expected")}
    parts = details("Evidence", _pairs(numbers)) if numbers else ""
    rows = f"<p>Rows {text(', '.join(map(str, finding.examples[:100])))}</p>"
    quotes = "".join(f"<li>{text(quote)}</li>" for quote in finding.quotes[:100])
    content = (rows if finding.examples else "") + (
        f'<ul class="quotes">{quotes}</ul>' if quotes else ""
    )
    return parts + (details("Examples from the data", content) if content else "")


def _symptoms(finding: Finding) -> str:
    if not finding.symptoms:
        return ""
    lines = "".join(
        f"<li><code>{text(s.check)}</code> {text(s.message)} "
        f'<span class="faint">{text(where(s))}</span></li>'
        for s in finding.symptoms[:100]
    )
    title = f"Explains {len(finding.symptoms)} more finding{'s' * (len(finding.symptoms) > 1)}"
    return f'<details open><summary>{title}</summary><ul class="symptoms">{lines}</ul></details>'


# -------------------------------------------------------------------- stages, answers, exhibits


def _gates(report: Report) -> str:
    if not report.gates:
        return ""
    known = {gate.stage: gate for gate in report.gates}
    rows = []
    for stage in STAGES:
        gate = known.get(stage)
        state = STATES[gate.verdict] if gate else "not reached"
        reasons = "".join(f"<li>{text(reason)}</li>" for reason in (gate.reasons if gate else ()))
        rows.append(
            [
                text(HEADINGS[stage]),
                f'<span class="state {gate.verdict if gate else "closed"}">{state}</span>',
                f"<q>{text(GATES[stage])}</q>",
                f"<ul>{reasons}</ul>" if reasons else "",
            ]
        )
    return table(("stage", "gate", "the recipe asks for", "because"), rows, kind="steps")


def _answers(report: Report) -> str:
    if not report.answers:
        return ""
    rows = [
        [
            text(answer.question),
            f"{text(answer.answer)}"
            + (details("what it rests on", _pairs(answer.evidence)) if answer.evidence else ""),
        ]
        for answer in sorted(report.answers, key=lambda a: STAGES.index(a.stage))
    ]
    return table(("the recipe asks", "answer"), rows, kind="steps")


def _exhibits(report: Report, detail: Detail, note: str, drawn: dict[tuple[int, int], str]) -> str:
    shown = report.exhibits[: detail.exhibits]
    left = len(report.exhibits) - len(shown)
    notes = [note, f"{left} more exhibits stand in the JSON report." if left else ""]
    content = "".join(f'<p class="faint">{text(line)}</p>' for line in notes if line)
    for stage in STAGES:
        figures = ""
        for place, exhibit in enumerate(shown):
            if exhibit.stage == stage:  # each is drawn once, however often the page is cut
                cut = detail.rows if isinstance(exhibit, (Table, Ladder)) else 0
                if isinstance(exhibit, Table) and exhibit.browse:
                    cut = detail.browsed
                key = (place, cut)
                if key not in drawn:
                    drawn[key] = figure(exhibit, most_rows=cut, most_browsed=cut)
                figures += drawn[key]
        if figures:
            content += f'<h3>{HEADINGS[stage]}</h3><div class="figures">{figures}</div>'
    return content


# -------------------------------------------------------------------- coverage, settings, JSON


def _coverage(report: Report) -> str:
    alarmed = {f.check: f.severity for f in sorted(report.flat, key=_mildest_first)}
    groups: list[tuple[str, list[list[str]]]] = [
        (
            "Ran",
            [
                [text(n), text(", ".join(m)), alarmed.get(n, "silent")]
                for n, m in report.ran.items()
            ],
        ),
        ("Skipped", [[text(n), text(reason)] for n, reason in report.skipped.items()]),
        ("Crashed", [[text(n), text(error)] for n, error in report.crashed.items()]),
    ]
    columns = {"Ran": ("check", "when", "outcome"), "Skipped": ("check", "reason")}
    content = ""
    for name, rows in groups:
        if rows:
            body = table(columns.get(name, ("check", "error")), rows, kind="pairs")
            title = f"{name} ({len(rows)})"
            content += f"<details{_open(name)}><summary>{title}</summary>{body}</details>"
    return content or '<p class="lead">Nothing ran.</p>'


def _open(name: str) -> str:
    return "" if name == "Ran" else " open"


def _mildest_first(finding: Finding) -> int:
    return -SEVERITIES.index(finding.severity)


def _settings(report: Report) -> str:
    origins: Any = report.settings.get("origins") or {}
    rows = [
        [text(name), value_of(value), text(origins.get(name, "default"))]
        for name, value in report.settings.items()
        if name != "origins"
    ]
    return table(("setting", "value", "from"), rows, kind="pairs") if rows else ""


def _pairs(values: dict[str, Any]) -> str:
    if not values:
        return ""
    return table(
        ("name", "value"), ([text(k), value_of(v)] for k, v in values.items()), kind="pairs"
    )


def _raw(report: Report, detail: Detail) -> str:
    if detail.json_without is None:
        return "<p>Too large for this page: see the JSON report beside it.</p>"
    left: dict[str, Any] = {part: [] for part in detail.json_without}
    data = replace(report, **{"exhibits": list(_without_bytes(report)), **left}).to_dict()
    content = json.dumps(data, allow_nan=False, ensure_ascii=True)
    for sign in "<>&":  # so that no text of the data can end the element
        content = content.replace(sign, f"\\u{ord(sign):04x}")
    left_out = ", ".join([*detail.json_without, "pictures"])
    return (
        f"<p>The report as JSON lies in this page as <code>#report</code> (without {left_out}); "
        "the whole of it is written beside the page.</p>"
        f'<script type="application/json" id="report">{content}</script>'
    )


def _without_bytes(report: Report) -> Iterator[Exhibit]:
    for exhibit in report.exhibits:
        if isinstance(exhibit, Table) and exhibit.browse:  # the page holds its rows already
            exhibit = replace(exhibit, rows=(), pngs=())
        yield replace(exhibit, pngs=()) if isinstance(exhibit, Picture) else exhibit
