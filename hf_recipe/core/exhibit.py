"""Exhibits: what a report draws, as plain values. Stages make them; renderers draw them.

``private`` exhibits show the user's rows; they stay on this machine unless ``log_samples=True``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_recipe.core.finding import Stage

Cell = str | int | float | bool | None


@dataclass(frozen=True)
class Line:
    """One line of a curve: ``y`` over ``x``, with a band ``low``..``high`` where it is known.

    With ``dots`` the points stand alone: what lies beside each other is no course.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """A threshold or level drawn across a curve; ``axis`` "y" is a horizontal line."""

    name: str
    value: float
    axis: str = "y"


@dataclass(frozen=True)
class Curve:
    """Lines over a common axis, with the thresholds they were judged by.

    With `bars` each point stands for itself, as a bar from zero: nothing lies between two of them.
    """

    title: str
    stage: Stage
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    marks: tuple[Mark, ...] = ()
    caption: str = ""
    log_x: bool = False
    log_y: bool = False
    private: bool = False
    bars: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells under named columns.

    With `browse` it is one to search: the page holds all of its rows, with filters and pages.
    `pngs` are pictures in base64, one for each row ("" where a row has none).
    """

    title: str
    stage: Stage
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    private: bool = False
    browse: bool = False
    pngs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Picture:
    """Images side by side, each a PNG in base64 with the text under it."""

    title: str
    stage: Stage
    pngs: tuple[str, ...]
    labels: tuple[str, ...]
    caption: str = ""
    private: bool = True


@dataclass(frozen=True)
class Matrix:
    """A grid of numbers, drawn as shades: (rows, columns)."""

    title: str
    stage: Stage
    row_names: tuple[str, ...]
    column_names: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    caption: str = ""
    private: bool = False


@dataclass(frozen=True)
class Rung:
    """One change, compared with the rung it grew from, on the same rows.

    Attributes:
        change: what was changed, in words.
        loss: mean evaluation loss per row.
        gain: mean paired fall of the loss against the parent (positive is better); None: the
            first rung.
        low, high: 95 % interval of the gain.
        cost: seconds of training.
        kept: True, False, or None where undecided.
    """

    change: str
    loss: float
    gain: float | None = None
    low: float | None = None
    high: float | None = None
    metric: float | None = None
    cost: float = 0.0
    kept: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class Ladder:
    """Changes made one at a time, each compared with the rung it grew from."""

    title: str
    stage: Stage
    rungs: tuple[Rung, ...]
    metric_name: str = "loss"
    caption: str = ""
    private: bool = False


@dataclass(frozen=True)
class Answer:
    """An answer to one of the recipe's questions, with what it rests on."""

    question: str
    stage: Stage
    answer: str
    evidence: dict[str, Any] = field(default_factory=dict)


Exhibit = Curve | Table | Picture | Matrix | Ladder
EXHIBITS: dict[str, type[Exhibit]] = {
    kind.__name__: kind for kind in (Curve, Table, Picture, Matrix, Ladder)
}


class Series:
    """A curve that never outgrows memory: at `limit` points every second one is dropped."""

    def __init__(self, limit: int = 4096) -> None:
        if limit < 2:
            raise ValueError(f"a series needs room for 2 points or more; got limit={limit}")
        self.limit = limit
        self.stride = 1
        self.seen = 0
        self.x: list[float] = []
        self.y: list[float] = []

    def add(self, x: float, y: float) -> None:
        """Keep the point if it falls on the current stride."""
        if self.seen % self.stride == 0:
            if len(self.x) == self.limit:
                del self.x[1::2], self.y[1::2]
                self.stride *= 2
            if self.seen % self.stride == 0:
                self.x.append(float(x))
                self.y.append(float(y))
        self.seen += 1

    def extend(self, x: Sequence[float], y: Sequence[float]) -> None:
        """Add one point after the other; at once where the room is there."""
        kept = slice(-self.seen % self.stride, None, self.stride)
        if len(self.x) + len(x[kept]) > self.limit:
            for point in zip(x, y, strict=True):
                self.add(*point)
            return
        self.x += map(float, x[kept])
        self.y += map(float, y[kept])
        self.seen += len(x)

    def line(self, name: str) -> Line:
        return Line(name, tuple(self.x), tuple(self.y))

    def state(self) -> dict[str, Any]:
        """What `from_state` needs, as JSON of its own: later points do not change it."""
        return {
            "stride": self.stride,
            "seen": self.seen,
            "x": _tagged(self.x),
            "y": _tagged(self.y),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], limit: int = 4096) -> Series:
        series = cls(limit)
        series.stride, series.seen = int(state["stride"]), int(state["seen"])
        series.x, series.y = list(map(float, state["x"])), list(map(float, state["y"]))
        return series


def _tagged(values: list[float]) -> list[float | str]:
    if all(map(math.isfinite, values)):  # written at every flush: it must cost little
        return list(values)
    return [v if math.isfinite(v) else str(v) for v in values]  # JSON has no bare NaN
