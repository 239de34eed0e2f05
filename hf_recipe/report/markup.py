"""What every part of the page is written with: escaped text, numbers, tags.

A data set is hostile input: whatever comes from outside goes through `text`.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable
from typing import Any

MOST_CHARACTERS = 2048
# Controls, bidirectional overrides, invisible marks and half surrogate pairs: shown, not obeyed.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)


def text(value: Any, most: int = MOST_CHARACTERS) -> str:
    """`value` as text of the page: escaped, cut at `most` characters, controls made visible."""
    content = value if isinstance(value, str) else str(value)
    cut = len(content) - most
    if cut > 0:
        content = content[:most] + f" … ({cut:,} more characters)"
    shown = UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), content)
    return html.escape(shown, quote=True)


def number(value: float, digits: int = 4) -> str:
    """A number in few digits: ``0.6931``, ``12,480``, ``3.2e-05``, ``nan``."""
    if not math.isfinite(value):
        return str(float(value))
    if abs(value) < 1e7 and (value == int(value) or abs(value) >= 10 ** (digits - 1)):
        return f"{round(value):,}"
    return f"{value:.{digits}g}"


def cell(value: Any) -> str:
    """The content of a table's cell."""
    if value is None:
        return '<span class="faint">–</span>'
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        shown, exact = number(value), repr(value)
        return text(shown) if shown == exact else f'<span title="{exact}">{text(shown)}</span>'
    return text(value)


def table(
    columns: Iterable[str],
    rows: Iterable[Iterable[str]],
    *,
    numeric: Iterable[int] = (),
    long: Iterable[int] = (),
    kind: str = "",
) -> str:
    """A table of ready markup cells in a box that scrolls by itself, never the page.

    Args:
        numeric, long: columns of numbers, which stand to the right, and of texts that need room.
    """
    classes = {**dict.fromkeys(long, ' class="long"'), **dict.fromkeys(numeric, ' class="num"')}
    head = "".join(
        f'<th scope="col"{classes.get(i, "")}>{text(name)}</th>' for i, name in enumerate(columns)
    )
    body = "".join(
        "<tr>" + "".join(f"<td{classes.get(i, '')}>{c}</td>" for i, c in enumerate(row)) + "</tr>"
        for row in rows
    )
    box = "scroll tall" if kind == "browse" else "scroll"
    return (
        f'<div class="{box}" tabindex="0"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def section(name: str, title: str, content: str, lead: str = "") -> str:
    """A section of the page; an empty one is left out."""
    if not content:
        return ""
    lead = f'<p class="lead">{text(lead)}</p>' if lead else ""
    return f'<section id="{name}"><h2>{text(title)}</h2>{lead}{content}</section>'


def details(summary: str, content: str) -> str:
    """What opens on demand, without JavaScript. `content` is markup."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def code(line: str) -> str:
    """A line to copy; without JavaScript it can be selected with one click."""
    return (
        f'<span class="copyable"><code>{text(line)}</code>'
        '<button type="button" class="copy" hidden>copy</button></span>'
    )


def value_of(value: Any) -> str:
    """A setting or a piece of evidence of any shape, as markup."""
    if isinstance(value, dict):
        return (
            "<br>".join(f"{text(k)}: {value_of(v)}" for k, v in list(value.items())[:64]) or "none"
        )
    if isinstance(value, (list, tuple)):
        listed = ", ".join(value_of(v) for v in value[:64])
        return (listed + (f", … ({len(value)})" if len(value) > 64 else "")) or "none"
    return cell(value)
