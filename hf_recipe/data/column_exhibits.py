"""Columns as the report shows them: a table, distributions by split, numbers by class."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from hf_recipe.core.exhibit import Curve, Exhibit, Line, Table
from hf_recipe.data.audio import audio_table, is_audio
from hf_recipe.data.column_numbers import Columns
from hf_recipe.data.source import Roles, Source
from hf_recipe.data.summaries import Summary

MOST_CURVES, MOST_CLASSES, BINS, COMMONEST = 12, 50, 30, 5
LONGEST = 80
FEW_TEXTS = 20
LONG = ("text", "numbers")  # kinds whose cells have a length


def column_tables(measured: Columns, split: str) -> Iterator[Table]:
    """The columns in two tables for the report: what one looks at first, and the rest."""
    head = ("column", "type", "role", "missing", "distinct", "low", "median", "high", "mean",
            "deviation")  # fmt: skip
    rows = tuple(
        (c.name, c.kind, c.role, c.nulls + c.nonfinite, c.distinct, shown(c.low), shown(c.median),
         shown(c.high), shown(c.mean), shown(c.deviation))
        for c in measured.columns
    )  # fmt: skip
    told = f"{measured.rows:,} rows; median: of the rows' numbers, or of their lengths"
    caption = f"{told}; {measured.note}" if measured.note else told
    yield Table(f"Columns of {split}", "data", head, rows, caption=caption)
    head = ("column", "blank", "zeros", "lower quartile", "upper quartile", "skewness", "shortest",
            "longest", "mean length", "words")  # fmt: skip
    rest = tuple(
        (c.name, c.blank, c.zeros if c.kind == "number" else None, shown(c.lower_quartile),
         shown(c.upper_quartile), shown(c.skewness),
         *((c.shortest, c.longest, shown(c.mean_length)) if c.kind in LONG else (None,) * 3),
         c.words if c.kind == "text" else None)
        for c in measured.columns
    )  # fmt: skip
    yield Table(f"Columns of {split}: the rest", "data", head, rest)


def shown(value: float) -> float | None:
    """Four digits, or nothing where there is no number."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def distributions(seen: Mapping[str, Mapping[str, Summary]], roles: Roles) -> Iterator[Curve]:
    """One picture per input or label column: the share of rows by value or length, every split."""
    names = [*roles.inputs, *([roles.label] if roles.label else [])]
    drawn = 0
    for name in names:
        parts = {split: s[name] for split, s in seen.items() if name in s}
        parts = {split: s for split, s in parts.items() if len(s.sample.numbers) > 1}
        if not parts or drawn == MOST_CURVES or all(map(_is_category, parts.values())):
            continue
        low = min(float(s.sample.numbers.min()) for s in parts.values())
        high = max(float(s.sample.numbers.max()) for s in parts.values())
        if not low < high:
            continue
        drawn += 1
        kind = next(iter(parts.values())).kind
        codes = sorted({v for s in parts.values() for v in s.sample.numbers.tolist()})
        whole = kind in LONG or all(s.whole for s in parts.values())
        bars = whole and len(codes) <= BINS
        bins, span = _bins(low, high) if whole else (BINS, (low, high))
        lines = []
        for split, summary in parts.items():
            if bars:  # codes are no quantities: nothing lies between them
                where = np.searchsorted(codes, summary.sample.numbers)
                counts = np.bincount(where, minlength=len(codes))
                lines.append(Line(split, tuple(codes), tuple((counts / counts.sum()).tolist())))
                continue
            shares, edges = summary.histogram(bins, span)
            middle = (edges[:-1] + edges[1:]) / 2
            lines.append(Line(split, tuple(middle.tolist()), tuple(shares.tolist())))
        what = {"text": "characters", "numbers": "elements"}.get(kind, "value")
        title = f"Distribution of {name}"
        yield Curve(title, "data", what, "share of rows", tuple(lines), bars=bars)


def _is_category(summary: Summary) -> bool:
    """A text of few different values: its commonest ones say more than its length."""
    few = summary.distinct.estimate <= FEW_TEXTS
    return summary.kind == "text" and few and summary.rows > 2 * FEW_TEXTS


def _bins(low: float, high: float) -> tuple[int, tuple[float, float]]:
    """Bins that each hold as many whole numbers: others would make teeth of a smooth curve."""
    width = math.ceil((high - low + 1) / BINS)
    bins = math.ceil((high - low + 1) / width)
    return bins, (low - 0.5, low - 0.5 + bins * width)


def split_exhibits(
    source: Source, summaries: Mapping[str, Summary], roles: Roles
) -> Iterator[Exhibit]:
    """The commonest values of a split, its recordings, and its columns by class."""
    yield from _commonest(source, summaries)
    for name in summaries:
        if is_audio(source, name):
            yield audio_table(source, name)
    if roles.label is not None and roles.label in summaries:
        yield from _by_class(source, summaries, roles.label)


def _commonest(source: Source, summaries: Mapping[str, Summary]) -> Iterator[Table]:
    """The values that occur most, where some repeat; they stay on this machine."""
    rows: list[tuple[Any, ...]] = []
    for name, summary in summaries.items():
        if summary.kind in ("image", "audio", "other", "numbers"):
            continue
        told = summary.commonest(COMMONEST)
        values = _cells(source, name, [row for row, _ in told])
        rows += [
            (name, value, times, shown(times / summary.rows))
            for value, (_, times) in zip(values, told, strict=True)
        ]
    if rows:
        head = ("column", "value", "times", "share")
        title = f"Commonest values of {source.name}"
        yield Table(title, "data", head, tuple(rows), private=True)


def _cells(source: Source, name: str, rows: list[int]) -> list[str]:
    """The values of a column at data set rows, as short texts."""
    if not rows:
        return []
    places = np.searchsorted(source.rows, rows)
    return [str(value)[:LONGEST] for value in take_cells(source, name, places).to_pylist()]


def take_cells(source: Source, name: str, places: Any) -> pa.Array:
    """The values of a column at places among the rows that were read."""
    if isinstance(source.data, pa.Table):
        return source.data.column(name).take(pa.array(places)).combine_chunks()
    chosen = source.data.select_columns([name]).with_format("arrow").select(places)
    column: pa.Array = chosen[:].column(name).combine_chunks()
    return column


def _by_class(source: Source, summaries: Mapping[str, Summary], label: str) -> Iterator[Table]:
    """Rows, mean and deviation of every number or length within each class, on sampled rows.

    All columns sample the same rows, so their numbers can be laid side by side.
    """
    sample = summaries[label].sample
    if not summaries[label].distinct.is_exact or len(summaries[label].distinct.hashes) < 2:
        return
    if len(summaries[label].distinct.hashes) > MOST_CLASSES or not len(sample.rows):
        return
    rows = np.sort(sample.rows)
    cells = take_cells(source, label, np.searchsorted(source.rows, rows))
    if pa.types.is_nested(cells.type):
        return
    named = [str(value)[:LONGEST] for value in cells.to_pylist()]
    classes, codes = np.unique(named, return_inverse=True)
    columns: list[tuple[str, Any, Any]] = []
    for name, summary in summaries.items():
        if name == label or not len(summary.sample.rows):
            continue
        there = np.isin(summary.sample.rows, rows)
        places = np.searchsorted(rows, summary.sample.rows[there])
        columns.append((name, codes[places], summary.sample.numbers[there]))
    if not columns:
        return
    counts = np.bincount(codes, minlength=len(classes))
    table = []
    for code, shown_class in enumerate(classes.tolist()):
        row: list[Any] = [shown_class, int(counts[code])]
        for _, which, values in columns[:MOST_CURVES]:
            own = values[which == code]
            row += [shown(float(own.mean())) if len(own) else None,
                    shown(float(own.std())) if len(own) else None]  # fmt: skip
        table.append(tuple(row))
    head = ["class", "rows"]
    for name, _, _ in columns[:MOST_CURVES]:
        head += [f"{name}: mean", "deviation"]
    caption = f"of {len(rows):,} rows; texts and lists by their length"
    title = f"Columns of {source.name} by class"
    yield Table(title, "data", tuple(head), tuple(table), caption=caption, private=True)
