"""Which rows lie far outside their column's spread: in value, length or brightness?

The recipe looks at the outliers, since they almost always uncover a bug in the data: a price in
cents, a document that was never split, a black picture. A row's distance from the median is
measured in deviations that the column itself shows on that side, tails included (up to its 99th
percentile), on a log scale where that is the more even one; so a long tail is no outlier, and
what is left of it stands apart. The places of a vector are columns too; there are many, so what is
told of one has to stand apart by a void.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

from hf_recipe.core.check import Check, Located, Measurement, Probe, Skip, private
from hf_recipe.core.exhibit import Table
from hf_recipe.core.finding import Fault
from hf_recipe.data.column_exhibits import shown, take_cells
from hf_recipe.data.column_numbers import FEW_VALUES
from hf_recipe.data.columns import summaries_of
from hf_recipe.data.near_prints import MOST_PICTURES, grey_pictures
from hf_recipe.data.sample import vectors_of
from hf_recipe.data.source import Source, roles_of, source_of, splits_of
from hf_recipe.data.summaries import EXTREMES, Summary
from hf_recipe.instruments.subject import Subject

FEWEST = 60
# Of vectors: places that are looked at, rows that give their spread, places that are read again,
# and how many times as far as any other row an outlier lies.
WIDEST_VECTOR, ROWS_OF_VECTORS, MOST_PLACES, VOID = 512, 2_048, 16, 8.0
SHOWN = 10
# Quantiles that give a spread on their side, the normal deviate each stands for, and the rows from
# which it is more than the extreme rows themselves.
SPREADS = ((0.25, 0.6745, FEWEST), (0.05, 1.6449, FEWEST), (0.01, 2.3263, 500))


@dataclass(frozen=True)
class ColumnTail:
    """The extreme rows of one column.

    Attributes:
        column: its name; of: "value", "length", "mean" (of large arrays) or "brightness".
        rows: rows with such a number; log: whether distances are taken on a log scale.
        median: of the numbers.
        distances: of the extreme rows, in deviations, the furthest first (at most 512).
        numbers: theirs; places: their data set rows.
        cut: whether more rows than these may lie as far out.
    """

    column: str
    of: str
    rows: int
    median: float
    log: bool = False
    distances: tuple[float, ...] = ()
    numbers: tuple[float, ...] = private(default=())
    places: tuple[int, ...] = ()
    cut: bool = False


@dataclass(frozen=True)
class Tails(Measurement):
    """The extreme rows of a split's columns."""

    version = 2

    columns: tuple[ColumnTail, ...]
    rows: int
    note: str = ""


def take_tails(subject: Subject) -> Iterator[Located | Table]:
    """Measure the extreme rows of every split's inputs and targets."""
    reasons = []
    for split in splits_of(subject):
        try:
            source = source_of(subject, split)
            tails = tuple(_tails(subject, split, source))
            if not tails:
                raise Skip(f"no column of the {split} data has a spread that rows could leave")
            yield Located(Tails(tails, len(source), source.note), split)
            yield from _shown(source, tails)
        except Skip as reason:
            reasons.append(str(reason))
    if len(reasons) == len(splits_of(subject)):
        raise Skip("; ".join(dict.fromkeys(reasons)) or "there is no data set")


def _tails(subject: Subject, split: str, source: Source) -> Iterator[ColumnTail]:
    roles = roles_of(subject, source)
    summaries = summaries_of(subject, split)
    for name in (*roles.inputs, *([roles.label] if roles.label else [])):
        summary = summaries[name]
        if summary.kind == "image" and not summary.moments.count:
            yield from _brightness(subject, source, name)
            continue
        codes = summary.whole and summary.distinct.estimate <= FEW_VALUES
        if summary.kind == "other" or (summary.kind == "number" and codes):
            continue
        if summary.kind == "numbers" and not source.varies:
            yield from _of_elements(source, summary, name)
        of = {"number": "value", "image": "mean"}.get(summary.kind, "length")
        found = tail_of(name, of, summary)
        if found is not None:
            yield found


def _brightness(subject: Subject, source: Source, name: str) -> Iterator[ColumnTail]:
    """Image files are decoded where a data set is inspected, not before a training."""
    if not subject.cache.get("raw") or len(source) > MOST_PICTURES:
        return
    grey, readable = grey_pictures(source, name)
    found = Summary()
    found.add_scores(grey.mean(axis=(1, 2)).astype(np.float64), source.rows, readable)
    tail = tail_of(name, "brightness", found)
    if tail is not None:
        yield tail


def _of_elements(source: Source, summary: Summary, name: str) -> Iterator[ColumnTail]:
    """The tails of a vector's places that a number far outside their first rows' spread stands in.

    Most places of most vectors have none, so the rows are read again only for those that do.
    """
    low, high = summary.element_low, summary.element_high
    if low is None or high is None or summary.whole or not 1 < len(low) <= WIDEST_VECTOR:
        return
    some = vectors_of(next(source.chunks([name])).column(name), len(low))[:ROWS_OF_VECTORS]
    if len(some) < FEWEST:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a place without a number has none
        middle = np.nanmedian(some, axis=0)
        usual = np.nanquantile(np.abs(some - middle), 0.99, axis=0)
    reach = np.maximum(high - middle, middle - low)
    far = np.flatnonzero((usual > 0) & (reach > VOID * usual))
    far = far[np.argsort(-reach[far] / usual[far], kind="stable")][:MOST_PLACES]
    found = [Summary() for _ in far]
    done = 0
    for table in source.chunks([name]) if len(far) else ():
        grid = vectors_of(table.column(name), len(low))
        rows = source.rows[done : done + len(table)]
        done += len(table)
        for place, one in zip(far, found, strict=True):
            values = grid[:, place]
            one.rows += len(values)
            one.add_scores(values, rows, np.isfinite(values))
    for place, one in zip(far, found, strict=True):
        tail = tail_of(f"{name}[{place}]", "value", one)
        apart = 0 if tail is None else beyond_a_void(tail.distances)
        if tail is not None and apart:
            yield replace(
                tail,
                distances=tail.distances[:apart],
                numbers=tail.numbers[:apart],
                places=tail.places[:apart],
                cut=False,
            )


def beyond_a_void(distances: tuple[float, ...]) -> int:
    """How many of the distances, the furthest first, lie `VOID` times as far as the next one."""
    nearest = 3.0  # rows nearer than that are not kept
    pairs = pairwise((*distances, nearest))
    return max((i for i, (far, near) in enumerate(pairs, 1) if far > VOID * near), default=0)


def tail_of(name: str, of: str, summary: Summary) -> ColumnTail | None:
    """The extreme rows of a summarised column; None where half of it is one value, or few rows."""
    sample = summary.sample.numbers
    if len(sample) < FEWEST:
        return None
    every = np.concatenate([summary.highest.numbers, summary.lowest.numbers])
    places = np.concatenate([summary.highest.rows, summary.lowest.rows])
    places, first = np.unique(places, return_index=True)
    every = every[first]
    log = bool(sample.min() > 0 or (of != "value" and sample.min() >= 0)) and _lopsided(
        np.log1p(sample)
    ) < _lopsided(sample)
    distances = _distances(np.log1p(every) if log else every, np.log1p(sample) if log else sample)
    order = np.argsort(-distances, kind="stable")
    order = order[distances[order] > 3]
    return ColumnTail(
        column=name,
        of=of,
        rows=summary.rows or len(summary.sample.keys),
        median=float(np.median(sample)),
        log=log,
        distances=tuple(distances[order].tolist()),
        numbers=tuple(every[order].tolist()),
        places=tuple(places[order].tolist()),
        cut=len(summary.highest.rows) == EXTREMES,
    )


def _lopsided(values: npt.NDArray[np.float64]) -> float:
    """How unlike the two sides of a column are; 0: symmetric."""
    low, middle, high = np.quantile(values, (0.1, 0.5, 0.9))
    if not low < middle < high:
        return math.inf
    return abs(math.log((high - middle) / (middle - low)))


def _distances(
    values: npt.NDArray[np.float64], sample: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """How many deviations of its own side each value lies from the median."""
    middle = float(np.median(sample))
    above = below = 0.0
    for share, deviate, rows in SPREADS:
        if len(sample) >= rows:
            low, high = np.quantile(sample, (share, 1 - share))
            below = max(below, (middle - float(low)) / deviate)
            above = max(above, (float(high) - middle) / deviate)
    # A side without any spread has no measure of its own; the other one's stands for it.
    below, above = below or above, above or below
    if not above > 0:
        return np.zeros(len(values))
    gap = values - middle
    return np.asarray(np.where(gap > 0, gap / above, -gap / below))


def _shown(source: Source, tails: tuple[ColumnTail, ...]) -> Iterator[Table]:
    rows: list[tuple[Any, ...]] = []
    for tail in tails:
        far = [i for i, distance in enumerate(tail.distances[:SHOWN]) if distance > 6]
        places = np.searchsorted(source.rows, [tail.places[i] for i in far])
        cells = [""] * len(far)
        if tail.of == "length" and far:
            cells = [str(v)[:200] for v in take_cells(source, tail.column, places).to_pylist()]
        rows += [
            (tail.column, tail.of, tail.places[i], shown(tail.numbers[i]),
             shown(tail.distances[i]), cell)
            for i, cell in zip(far, cells, strict=True)
        ]  # fmt: skip
    if rows:
        head = ("column", "of", "row", "number", "deviations", "begins")
        yield Table(f"Outliers of {source.name}", "data", head, tuple(rows), private=True)


# ---------------------------------------------------------------- verdicts


def outlier_example(
    seen: Tails,
    *,
    deviations: Annotated[
        float, "beyond the column's own 99th percentile scaled up; a normal column has none"
    ] = 8.0,
    fraction: Annotated[
        float, "share of rows from which they are no outliers but the column's nature; judged"
    ] = 0.01,
    most: Annotated[int, "columns told one by one; notes are to be few"] = 3,
) -> Iterator[Fault]:
    """A note on the rows that stand far outside their column."""
    found = []
    for tail in seen.columns:
        count = sum(distance > deviations for distance in tail.distances)
        if not count or count > max(fraction * tail.rows, 1) or (tail.cut and count >= EXTREMES):
            continue
        found.append((tail.distances[0], count, tail))
    found.sort(key=lambda entry: -entry[0])
    for distance, count, tail in found[:most]:
        scale = " on a log scale" if tail.log else ""
        yield Fault(
            message=f"{count:,} of {tail.rows:,} rows of {tail.column} lie far outside its spread "
            f"({tail.of}, up to {distance:.3g} deviations from the median{scale})",
            subject=tail.column,
            evidence={
                "seen": f"{distance:.3g} deviations",
                "expected": f"under {deviations:g}",
                "count": count,
                "columns": len(found),
            },
            examples=tail.places[: min(count, 20)],
            quotes=tuple(f"{number:.6g}" for number in tail.numbers[: min(count, 5)]),
        )


TAILS = Probe("look at the extreme rows", "dataset", (Tails,), take_tails)

OUTLIER_EXAMPLE = Check(
    name="outlier-example",
    stage="data",
    severity="note",
    moments=("dataset",),
    why="Outliers almost always uncover a bug in the data: another unit, a file read wrongly, a "
    "row that was never cut.",
    fix="look at the rows in `examples`; mend, clip or drop them",
    source="Karpathy 2019 (become one with the data); Hampel 1974",
    judges=(outlier_example,),
    unsure="Rare but true values; columns with a few far modes.",
)
