"""What is judged of each column: its numbers, as a measurement."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hf_recipe.core.check import Measurement
from hf_recipe.data.summaries import Summary

FEW_VALUES = 64  # whole numbers of so few values are codes, not quantities


@dataclass(frozen=True)
class ColumnNumbers:
    """One column of one split.

    Attributes:
        name, kind: the column and its type ("text", "number", "numbers", "image", "other").
        role: "input", "label" or "" for what the model does not get.
        rows, nulls: rows read, rows that are null.
        nonfinite: rows that hold NaN or infinity.
        blank: rows of white space, of length zero, or (images) of one colour.
        constant: whether all rows are the same; never said of a single row.
        low, high, mean, deviation: of the numbers, elements of lists included.
        shortest, longest, mean_length: characters, or elements; 0 for scalars.
        bad_rows: data set rows that are NaN, infinite or null; blank_rows: that are blank.
        distinct: different values (an estimate, to 2 %, beyond 4,096 of them).
        whole: whether all numbers are whole; zeros: how many are zero.
        skewness: of the numbers; lower_quartile, median, upper_quartile: of the rows' numbers, or
            of their lengths where rows are no single numbers.
        words: in all texts.
        still: places of the column's lists that hold one number in all rows, and one that is rare
            in the other places; elements: places in each list, where all are as long.
    """

    name: str
    kind: str
    role: str
    rows: int
    nulls: int = 0
    nonfinite: int = 0
    blank: int = 0
    constant: bool = False
    low: float = math.nan
    high: float = math.nan
    mean: float = math.nan
    deviation: float = math.nan
    shortest: int = 0
    longest: int = 0
    mean_length: float = 0.0
    bad_rows: tuple[int, ...] = ()
    blank_rows: tuple[int, ...] = ()
    distinct: int = 0
    whole: bool = False
    zeros: int = 0
    skewness: float = math.nan
    lower_quartile: float = math.nan
    median: float = math.nan
    upper_quartile: float = math.nan
    words: int = 0
    still: tuple[int, ...] = ()
    elements: int = 0

    @property
    def categories(self) -> bool:
        """Whether its numbers look like codes of a few categories rather than quantities."""
        return self.whole and self.distinct <= FEW_VALUES


@dataclass(frozen=True)
class Columns(Measurement):
    """Every column of one split; `note` says how much was read, where not all was.

    `training` tells the training set, where a constant column is a fault, from a small
    evaluation set, where it may be chance; `raw`: rows looked at by themselves, which nobody has
    prepared for a network yet.
    """

    columns: tuple[ColumnNumbers, ...]
    rows: int
    note: str = ""
    training: bool = True
    raw: bool = False


def column_numbers(summary: Summary, name: str, role: str) -> ColumnNumbers:
    """What the checks judge of a column's summary."""
    there = summary.moments.count > 0
    low, median, high = summary.quantiles(0.25, 0.5, 0.75)
    return ColumnNumbers(
        name=name,
        kind=summary.kind,
        role=role,
        rows=summary.rows,
        nulls=summary.nulls,
        nonfinite=summary.nonfinite,
        blank=summary.blank,
        constant=summary.constant,
        low=summary.low if there else math.nan,
        high=summary.high if there else math.nan,
        mean=summary.moments.mean if there else math.nan,
        deviation=summary.moments.deviation,
        shortest=summary.shortest if summary.longest else 0,
        longest=summary.longest,
        mean_length=summary.lengths.mean,
        bad_rows=tuple(summary.bad),
        blank_rows=tuple(summary.blanks),
        distinct=summary.distinct.estimate,
        whole=summary.whole,
        zeros=summary.zeros,
        skewness=summary.moments.skewness,
        lower_quartile=low,
        median=median,
        upper_quartile=high,
        words=summary.words,
    )
