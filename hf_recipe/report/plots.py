"""Curves, matrices and interval bars as inline SVG: hand-written, no library, no script.

Colours come from classes, so that the page's light and dark themes hold here too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hf_recipe.core.exhibit import Curve, Line, Mark, Matrix, Rung
from hf_recipe.report.markup import number, text

WIDTH, HEIGHT = 520.0, 270.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 12.0, 14.0, 44.0
MOST_POINTS = 400  # of one line: what a screen can show
MOST_DOTS = 40  # points drawn one by one, each with its value on hover
MOST_LINES = 24
MOST_CELLS = 40  # rows or columns of a matrix
COLOURS = 8


@dataclass(frozen=True)
class Scale:
    """Maps values of one axis to the picture, linearly or by logarithm."""

    low: float
    high: float
    start: float
    stop: float
    log: bool

    def __call__(self, value: float) -> float:
        low, high = _on(self.low, self.log), _on(self.high, self.log)
        share = (_on(value, self.log) - low) / (high - low)
        return self.start + share * (self.stop - self.start)

    def shows(self, value: float) -> bool:
        """Whether `value` has a place on this axis."""
        return _usable(value, self.log)

    def ticks(self) -> list[float]:
        """Round values between the ends: four to eight of them."""
        if self.log and self.high > 4 * self.low:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            step = max(1, math.ceil((last - first) / 7))
            digits = (1, 2, 5) if last - first <= 3 else (1,)
            found = [d * 10.0**p for p in range(first, last + 1, step) for d in digits]
        else:
            rough = (self.high - self.low) / 5
            power = 10.0 ** math.floor(math.log10(rough))
            step_size = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
            first = math.ceil(self.low / step_size)
            found = [
                i * step_size for i in range(first, math.floor(self.high / step_size + 1e-9) + 1)
            ]
        slack = 1e-9 * max(abs(self.low), abs(self.high))
        return [t for t in found if self.low - slack <= t <= self.high + slack]


def draw_curve(curve: Curve) -> str:
    """A curve with its lines, bands, thresholds, ticks and legend."""
    lines = curve.lines[:MOST_LINES]
    xs = [v for line in lines for v in line.x]
    ys = [v for line in lines for values in (line.y, line.low, line.high) for v in values]
    if curve.bars and xs:
        xs, ys = [*xs, min(xs) - _gap(xs) / 2, max(xs) + _gap(xs) / 2], [*ys, 0.0]
    x_axis = _axis(xs, [m.value for m in curve.marks if m.axis == "x"], curve.log_x)
    y_axis = _axis(ys, [m.value for m in curve.marks if m.axis != "x"], curve.log_y, pad=0.06)
    if x_axis is None or y_axis is None:
        return '<p class="faint">Nothing finite to draw.</p>'
    across = Scale(*x_axis, LEFT, WIDTH - RIGHT, curve.log_x)
    up = Scale(*y_axis, HEIGHT - BOTTOM, TOP, curve.log_y)
    parts = [*_frame(curve, across, up)]
    for place, line in enumerate(lines):
        if curve.bars:
            parts += _bars(line, place, len(lines), _gap(xs[:-2]), across, up)
        else:
            parts += _drawn(line, place, across, up)
    for mark in curve.marks:
        parts += _threshold(mark, across, up)
    title = f"{text(curve.title)}: {text(curve.y_label)} over {text(curve.x_label)}"
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" '
        f'aria-label="{title}">{"".join(parts)}</svg>{_legend(curve, lines, across, up)}'
    )


def _frame(curve: Curve, across: Scale, up: Scale) -> Iterator[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for tick in up.ticks():
        y = up(tick)
        yield f'<path class="grid" d="M{LEFT:g} {y:.1f}H{right:g}"/>'
        yield f'<text class="tick" x="{LEFT - 6:g}" y="{y + 4:.1f}" text-anchor="end">'
        yield f"{number(tick, 3)}</text>"
    for tick in across.ticks():
        x = across(tick)
        yield f'<path class="axis" d="M{x:.1f} {bottom:g}v4"/>'
        yield f'<text class="tick" x="{x:.1f}" y="{bottom + 17:g}" text-anchor="middle">'
        yield f"{number(tick, 3)}</text>"
    yield f'<path class="axis" d="M{LEFT:g} {bottom:g}H{right:g}"/>'
    middle = (LEFT + right) / 2
    yield f'<text class="name" x="{middle:g}" y="{HEIGHT - 8:g}" text-anchor="middle">'
    yield f"{text(_short(curve.x_label, 60))}{' (log)' if curve.log_x else ''}</text>"
    middle = (TOP + bottom) / 2
    yield f'<text class="name" transform="translate(13 {middle:g}) rotate(-90)" '
    yield f'text-anchor="middle">{text(_short(curve.y_label, 32))}'
    yield f"{' (log)' if curve.log_y else ''}</text>"


def _gap(xs: Sequence[float]) -> float:
    """The least distance between two different values; 1 where there is one value alone."""
    known = sorted({x for x in xs if math.isfinite(x)})
    return min((b - a for a, b in itertools.pairwise(known)), default=1.0)


def _bars(
    line: Line, place: int, lines: int, gap: float, across: Scale, up: Scale
) -> Iterator[str]:
    """A bar from zero for each point, beside those of the other lines."""
    width = 0.8 * (across(across.low + gap) - across(across.low)) / lines
    for x, y in zip(line.x, line.y, strict=False):
        if not (across.shows(x) and up.shows(y)):
            continue
        left = across(x) + width * (place - lines / 2)
        top, bottom = sorted((up(y), up(0.0)))
        yield f'<rect class="bar c{place % COLOURS}" x="{left:.1f}" y="{top:.1f}" '
        yield f'width="{max(width - 1, 0.5):.1f}" height="{bottom - top:.1f}">'
        yield f"<title>{text(line.name)}: {number(y)} at {number(x)}</title></rect>"


def _drawn(line: Line, place: int, across: Scale, up: Scale) -> Iterator[str]:
    points = list(zip(line.x, line.y, strict=False))
    band = list(zip(line.x, line.low, line.high, strict=False))
    colour = f"c{place % COLOURS}" + (" dashed" if place >= COLOURS else "")
    seen = [(x, lo, hi) for x, lo, hi in band if all(map(up.shows, (lo, hi))) and across.shows(x)]
    if len(seen) > 1:
        seen = seen[:: math.ceil(len(seen) / MOST_POINTS)]
        rim = [(x, hi) for x, _, hi in seen] + [(x, lo) for x, lo, _ in reversed(seen)]
        outline = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in rim)
        yield f'<polygon class="band {colour}" points="{outline}"/>'
    finite = [y for _, y in points if math.isfinite(y)]
    if not finite:
        return
    about = (
        f"{line.name}: last {number(finite[-1])}, "
        f"lowest {number(min(finite))}, highest {number(max(finite))}"
    )
    for run in () if line.dots else _runs(points, across, up):
        kept = thinned(run, MOST_POINTS)
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in kept)
        if len(kept) > 1:
            yield f'<polyline class="line {colour}" points="{path}"><title>{text(about)}</title>'
            yield "</polyline>"
    if line.dots or len(points) <= MOST_DOTS or len(finite) <= MOST_DOTS:
        for x, y in points[:: math.ceil(len(points) / MOST_POINTS)]:
            if across.shows(x) and up.shows(y):
                yield f'<circle class="dot {colour}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="3">'
                yield f"<title>{text(line.name)}: {number(y)} at {number(x)}</title></circle>"
    lost = [x for x, y in points if across.shows(x) and not math.isfinite(y)]
    for x in lost[:: max(1, len(lost) // MOST_DOTS)]:
        yield f'<text class="lost" x="{across(x):.1f}" y="{TOP + 10:g}" text-anchor="middle">×'
        yield f"<title>{text(line.name)}: not finite at {number(x)}</title></text>"


def _runs(
    points: Sequence[tuple[float, float]], across: Scale, up: Scale
) -> Iterator[list[tuple[float, float]]]:
    """The stretches of a line between values that cannot be drawn."""
    run: list[tuple[float, float]] = []
    for x, y in points:
        if across.shows(x) and up.shows(y):
            run.append((x, y))
        elif run:
            yield run
            run = []
    if run:
        yield run


def thinned(points: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most `most` points: the lowest and highest of each stretch, so that no spike is lost."""
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / max(1, most // 2 - 1))
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        kept.add(min(stretch, key=lambda i: points[i][1]))
        kept.add(max(stretch, key=lambda i: points[i][1]))
    return [points[i] for i in sorted(kept)]


def _threshold(mark: Mark, across: Scale, up: Scale) -> Iterator[str]:
    scale = across if mark.axis == "x" else up
    if not (scale.shows(mark.value) and scale.low <= mark.value <= scale.high):
        return
    place = scale(mark.value)
    about = f"<title>{text(mark.name)}: {number(mark.value)}</title>"
    label = f"{text(_short(mark.name, 34))}"
    if mark.axis == "x":
        flip = place > (LEFT + WIDTH) / 2
        yield f'<path class="mark" d="M{place:.1f} {TOP:g}V{HEIGHT - BOTTOM:g}">{about}</path>'
        yield f'<text class="marked" x="{place + (-5 if flip else 5):.1f}" y="{TOP + 10:g}" '
        yield f'text-anchor="{"end" if flip else "start"}">{label}</text>'
    else:
        below = place < TOP + 16
        yield f'<path class="mark" d="M{LEFT:g} {place:.1f}H{WIDTH - RIGHT:g}">{about}</path>'
        yield f'<text class="marked" x="{WIDTH - RIGHT - 4:g}" '
        yield f'y="{place + (13 if below else -5):.1f}" text-anchor="end">{label}</text>'


def _legend(curve: Curve, lines: Sequence[Line], across: Scale, up: Scale) -> str:
    items = []
    if len(lines) > 1 or (lines and lines[0].name):
        for place, line in enumerate(lines):
            dashed = " dashed" if place >= COLOURS else ""
            items.append(f'<li class="c{place % COLOURS}{dashed}">{text(line.name, 80)}</li>')
    if len(curve.lines) > len(lines):
        items.append(f'<li class="plain">{len(curve.lines) - len(lines)} more not drawn</li>')
    for mark in curve.marks:
        scale = across if mark.axis == "x" else up
        drawn = scale.shows(mark.value) and scale.low <= mark.value <= scale.high
        off = "" if drawn else ", off the chart"
        items.append(f'<li class="marked">{text(mark.name, 80)} ({number(mark.value)}{off})</li>')
    return f'<ul class="legend">{"".join(items)}</ul>' if items else ""


def _axis(
    values: Sequence[float], marks: Sequence[float], log: bool, pad: float = 0.0
) -> tuple[float, float] | None:
    """The ends of an axis: all values, and those thresholds that do not squash them."""
    known = [_on(v, log) for v in values if _usable(v, log)]
    if not known:
        return None
    low, high = min(known), max(known)
    reach = 3 * (high - low) if high > low else math.inf
    for mark in (_on(m, log) for m in marks if _usable(m, log)):
        if low - reach <= mark <= high + reach:
            low, high = min(low, mark), max(high, mark)
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        margin = 0.5 if log else max(abs(high) * 0.1, 0.5 if high == 0 else 0.0)
        low, high = low - margin, high + margin
    low, high = low - pad * (high - low), high + pad * (high - low)
    back: Callable[[float], float] = (lambda v: 10.0**v) if log else float
    return back(low), back(high)


def _usable(value: float, log: bool) -> bool:
    """Whether `value` can be drawn; the extremes of a float would overflow the arithmetic."""
    return abs(value) < 1e150 and (value > 1e-150 or not log)


def _on(value: float, log: bool) -> float:
    return math.log10(value) if log else value


def draw_matrix(matrix: Matrix) -> str:
    """A grid of shades; where it is small, with the numbers in it."""
    rows = list(zip(matrix.row_names, matrix.values, strict=False))[:MOST_CELLS]
    columns = matrix.column_names[:MOST_CELLS]
    finite = [abs(v) for _, values in rows for v in values[:MOST_CELLS] if math.isfinite(v)]
    strongest = max(finite, default=0.0) or 1.0
    side = 46.0 if len(columns) <= 8 else 34.0 if len(columns) <= 12 else 16.0
    high = min(side, 30.0)
    left, top = 112.0, 62.0
    width = left + side * len(columns) + 40
    parts = []
    for place, name in enumerate(columns):
        x = left + side * (place + 0.5)
        parts.append(
            f'<text class="tick" transform="translate({x:.1f} {top - 6:g}) rotate(-35)">'
            f"{text(_short(name, 12))}<title>{text(name, 200)}</title></text>"
        )
    for row, (name, values) in enumerate(rows):
        y = top + high * row
        parts.append(
            f'<text class="tick" x="{left - 8:g}" y="{y + high / 2 + 4:.1f}" text-anchor="end">'
            f"{text(_short(name, 15))}<title>{text(name, 200)}</title></text>"
        )
        for column, value in enumerate(values[: len(columns)]):
            share = abs(value) / strongest if math.isfinite(value) else 0.0
            x = left + side * column
            about = f"{name}, {columns[column]}: {number(value)}"
            parts.append(
                f'<rect class="{"cell" if value >= 0 else "cell negative"}" x="{x + 1:.1f}" '
                f'y="{y + 1:.1f}" width="{side - 2:.1f}" height="{high - 2:.1f}" rx="2" '
                f'fill-opacity="{0.06 + 0.94 * share:.3f}"><title>{text(about)}</title></rect>'
            )
            if side >= 30:
                on = ' class="in strong"' if share > 0.55 else ' class="in"'
                parts.append(
                    f'<text{on} x="{x + side / 2:.1f}" y="{y + high / 2 + 4:.1f}" '
                    f'text-anchor="middle">{number(value, 2)}</text>'
                )
    height = top + high * len(rows) + 6
    cut = len(matrix.values) > len(rows) or len(matrix.column_names) > len(columns)
    note = (
        f'<p class="faint">The first {len(rows)} rows and {len(columns)} columns.</p>'
        if cut
        else ""
    )
    return (
        f'<div class="scroll" tabindex="0"><svg class="matrix" width="{width:g}" '
        f'height="{height:g}" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{text(matrix.title)}">{"".join(parts)}</svg></div>{note}'
    )


def draw_interval(rung: Rung, reach: float) -> str:
    """The gain of one rung with its 95 % interval, about the line of no change."""
    width, height = 180.0, 22.0
    middle = width / 2

    def at(value: float) -> float:
        return middle + max(-1.0, min(1.0, value / reach)) * (middle - 6)

    parts = [f'<path class="axis" d="M{middle:g} 1V{height - 1:g}"/>']
    known = [v for v in (rung.gain, rung.low, rung.high) if v is not None and math.isfinite(v)]
    if rung.gain is not None and len(known) == 3:
        low, gain, high = sorted((rung.low or 0.0, rung.gain, rung.high or 0.0))
        side = "better" if low > 0 else "worse" if high < 0 else "unsure"
        about = f"{number(rung.gain)} ({number(low)} to {number(high)})"
        parts.append(
            f'<g class="{side}"><title>{text(about)}</title>'
            f'<path class="span" d="M{at(low):.1f} {height / 2:g}H{at(high):.1f}"/>'
            f'<circle cx="{at(gain):.1f}" cy="{height / 2:g}" r="4"/></g>'
        )
    return (
        f'<svg class="interval" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" aria-hidden="true">{"".join(parts)}</svg>'
    )


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
