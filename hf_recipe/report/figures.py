"""Every kind of exhibit as a figure of the page."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Sequence

from hf_recipe.core.exhibit import Curve, Exhibit, Ladder, Matrix, Picture, Table
from hf_recipe.report.markup import cell, number, table, text
from hf_recipe.report.plots import draw_curve, draw_interval, draw_matrix

PNG = b"\x89PNG\r\n\x1a\n"
LONG = 40  # characters from which a cell is a text to read
VERDICTS = {True: "kept", False: "dropped", None: "undecided"}


def figure(exhibit: Exhibit, *, most_rows: int = 200, most_browsed: int = 2_000) -> str:
    """An exhibit with its title and caption.

    Tables are cut at `most_rows` rows, those to be searched at `most_browsed`.
    """
    wide = ""
    if isinstance(exhibit, Curve):
        body = draw_curve(exhibit)
    elif isinstance(exhibit, Matrix):
        body = draw_matrix(exhibit)
    elif isinstance(exhibit, Picture):
        body, wide = _pictures(exhibit), " wide"
    elif isinstance(exhibit, Table):
        most = most_browsed if exhibit.browse else most_rows
        body, wide = _rows(exhibit, most), " wide" if len(exhibit.columns) > 3 else ""
    else:
        body, wide = _ladder(exhibit, most_rows), " wide"
    private = ' <span class="tag" title="stays on this machine">private</span>'
    caption = f"<p>{text(exhibit.caption)}</p>" if exhibit.caption else ""
    return (
        f'<figure class="card{wide}"><figcaption><h4>{text(exhibit.title, 200)}'
        f"{private if exhibit.private else ''}</h4>{caption}</figcaption>{body}</figure>"
    )


def weight(exhibit: Exhibit) -> int:
    """Bytes of the pictures in an exhibit."""
    return sum(map(len, exhibit.pngs)) if isinstance(exhibit, (Picture, Table)) else 0


def _pictures(picture: Picture) -> str:
    labels = [*picture.labels, *[""] * (len(picture.pngs) - len(picture.labels))]
    shown = []
    for png, label in zip(picture.pngs, labels, strict=False):
        shown.append(
            f'<div class="picture">{_image(png, label)}<span>{text(label, 200)}</span></div>'
        )
    return f'<div class="pictures">{"".join(shown)}</div>'


def _image(png: str, label: str) -> str:
    if not _is_png(png):
        return '<span class="faint">not a PNG</span>'
    return f'<img alt="{text(label, 200)}" src="data:image/png;base64,{png}">'


def _is_png(content: str) -> bool:
    try:
        return base64.b64decode(content, validate=True).startswith(PNG)
    except (binascii.Error, ValueError):
        return False


def _rows(exhibit: Table, most: int) -> str:
    rows = exhibit.rows[:most]
    numeric = [i for i in range(len(exhibit.columns)) if _numeric([row[i : i + 1] for row in rows])]
    longest = [max((len(str(v)) for v in column), default=0) for column in zip(*rows, strict=True)]
    long = [i for i, size in enumerate(longest) if size > LONG]
    columns, cells = exhibit.columns, [[cell(v) for v in row] for row in rows]
    if exhibit.pngs:
        drawn = [_image(png, "") if png else "" for png in exhibit.pngs]
        columns, numeric, long = ("", *columns), [i + 1 for i in numeric], [i + 1 for i in long]
        cells = [[picture, *row] for picture, row in zip(drawn, cells, strict=False)]
    kind = "browse" if exhibit.browse else ""
    body = table(columns, cells, numeric=numeric, long=long, kind=kind)
    left = len(exhibit.rows) - len(rows)
    return body + (f'<p class="faint">{left:,} more rows in the JSON report.</p>' if left else "")


def _numeric(cells: Sequence[Sequence[object]]) -> bool:
    known = [c[0] for c in cells if c and c[0] not in (None, "nan", "inf", "-inf")]
    return bool(known) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) for v in known
    )


def _ladder(ladder: Ladder, most: int) -> str:
    rungs = ladder.rungs[:most]
    ends = [
        abs(v) for r in rungs for v in (r.gain, r.low, r.high) if v is not None and abs(v) < 1e150
    ]
    reach = max(ends, default=0.0) or 1.0
    metric = any(r.metric is not None for r in rungs)
    columns = ["change", "loss", *([ladder.metric_name] if metric else [])]
    columns += ["gain over the rung before", "95 % interval", "seconds", "verdict"]
    rows = []
    for number_, rung in enumerate(rungs):
        verdict = "start" if number_ == 0 and rung.gain is None else VERDICTS[rung.kept]
        note = f'<span class="note-of">{text(rung.note)}</span>' if rung.note else ""
        rows.append(
            [
                f"{text(rung.change)}{note}",
                cell(rung.loss),
                *([cell(rung.metric)] if metric else []),
                draw_interval(rung, reach),
                _interval(rung.gain, rung.low, rung.high),
                cell(round(rung.cost, 1) if math.isfinite(rung.cost) else rung.cost),
                f'<span class="state {verdict}">{verdict}</span>',
            ]
        )
    numeric = [1, 2, 5] if metric else [1, 4]
    return table(columns, rows, numeric=numeric)


def _interval(gain: float | None, low: float | None, high: float | None) -> str:
    if gain is None:
        return cell(None)
    ends = f" [{number(low, 3)}, {number(high, 3)}]" if None not in (low, high) else ""  # type: ignore[arg-type]
    return f'<span class="whole">{gain:+.3g}{ends}</span>'
