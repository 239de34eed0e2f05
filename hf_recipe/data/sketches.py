"""Sketches of a column that add up: lowest keys, different values, moments.

Sources: Chan et al. 1983 (moments); Cohen 1997 and Bar-Yossef et al. 2002 (bottom-k samples).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

VALUES = 4_096
SPAN = 2.0**64


@dataclass
class Lowest:
    """The `limit` items with the lowest keys, each with a number and a data set row."""

    limit: int
    keys: npt.NDArray[Any]
    numbers: npt.NDArray[Any]
    rows: Integers

    @classmethod
    def empty(cls, limit: int, key: Any = np.uint64) -> Lowest:
        nothing = np.zeros(0)
        return cls(limit, nothing.astype(key), nothing, nothing.astype(np.int64))

    def add(self, keys: npt.NDArray[Any], values: npt.NDArray[Any], rows: Integers) -> None:
        """Take in items; what cannot be among the lowest is never stored."""
        if len(self.keys) == self.limit:
            last = self.keys[-1]
            near = keys < last
            ties = np.flatnonzero(keys == last)
            near[ties] = rows[ties] < self.rows[-1]  # the same items whatever the order
            if not near.any():
                return
            keys, values, rows = keys[near], values[near], rows[near]
        order = np.lexsort((rows, keys))[: self.limit]
        keys, values, rows = keys[order], values[order], rows[order]
        if len(self.keys) and len(rows) and rows.min() < self.rows.max():  # a shard is merged
            keys = np.concatenate([self.keys, keys])
            values = np.concatenate([self.numbers, values])
            rows = np.concatenate([self.rows, rows])
            order = np.lexsort((rows, keys))[: self.limit]
            self.keys, self.numbers, self.rows = keys[order], values[order], rows[order]
            return
        at = np.searchsorted(self.keys, keys, side="right")  # rows come in order: ties go behind
        self.numbers = np.insert(self.numbers, at, values)[: self.limit]
        self.keys = np.insert(self.keys, at, keys)[: self.limit]
        self.rows = np.insert(self.rows, at, rows)[: self.limit]


@dataclass
class Distinct:
    """Different values: the lowest hashes with their exact counts and the first row of each."""

    hashes: Hashes = field(default_factory=lambda: np.zeros(0, np.uint64))
    counts: Integers = field(default_factory=lambda: np.zeros(0, np.int64))
    rows: Integers = field(default_factory=lambda: np.zeros(0, np.int64))

    def add_rows(self, hashes: Hashes, rows: Integers) -> None:
        """Take in the hash of every row's value."""
        if len(self.hashes) == VALUES:
            near = hashes <= self.hashes[-1]
            hashes, rows = hashes[near], rows[near]
        if len(hashes):
            distinct, first, counts = np.unique(hashes, return_index=True, return_counts=True)
            self.add(distinct, counts, rows[first])

    def add(self, hashes: Hashes, counts: Integers, rows: Integers) -> None:
        """Take in hashes of values, each seen `counts` times, first in `rows`."""
        every = np.concatenate([self.hashes, hashes])
        kept, places = np.unique(every, return_inverse=True)
        first = np.full(len(kept), np.iinfo(np.int64).max)
        np.minimum.at(first, places, np.concatenate([self.rows, rows]))
        total = np.bincount(places, weights=np.concatenate([self.counts, counts]))
        self.hashes, self.rows = kept[:VALUES], first[:VALUES]
        self.counts = total[:VALUES].astype(np.int64)

    @property
    def is_exact(self) -> bool:
        return len(self.hashes) < VALUES

    @property
    def estimate(self) -> int:
        """How many different values there are."""
        if self.is_exact:
            return len(self.hashes)
        return round((VALUES - 1) / (float(self.hashes[-1]) / SPAN))


@dataclass
class Moments:
    """Count, mean, and sums of squared and cubed deviations from it."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    cubes: float = 0.0

    @classmethod
    def of(cls, values: Floats) -> Moments:
        if not len(values):
            return cls()
        mean = float(values.mean())
        moved = values - mean
        powers = moved * moved
        return cls(len(values), mean, float(powers.sum()), float((powers * moved).sum()))

    def merge(self, other: Moments) -> None:
        """Add `other`'s values (Chan et al. 1983)."""
        a, b = self.count, other.count
        if not b:
            return
        n, gap = a + b, other.mean - self.mean
        self.cubes += other.cubes + gap**3 * a * b * (a - b) / n**2
        self.cubes += 3 * gap * (a * other.squares - b * self.squares) / n
        self.squares += other.squares + gap**2 * a * b / n
        self.mean += gap * b / n
        self.count = n

    @property
    def deviation(self) -> float:
        return math.sqrt(max(self.squares, 0.0) / self.count) if self.count else math.nan

    @property
    def skewness(self) -> float:
        spread = self.deviation
        return self.cubes / self.count / spread**3 if self.count and spread > 0 else math.nan
