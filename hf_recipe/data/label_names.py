"""What the classes are called, where it is another column than the labels' that says so.

A `map` that lays word tags over pieces makes plain numbers of them: the names stay behind in the
column of tags. Many data sets keep the class as a word beside its number.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from hf_recipe.data.hashing import flat_array
from hf_recipe.data.labels import IGNORED, class_names
from hf_recipe.data.source import Source

ROWS = 200  # rows that are compared
MOST_NAMES = 50


def names_beside(source: Source, label: str) -> tuple[str, ...]:
    """The names of the classes 0, 1, ... by another column that says the same; else empty."""
    chunk = next(source.chunks(), None)
    if chunk is None:
        return ()
    few = chunk.slice(0, ROWS)
    labels = flat_array(few.column(label)).to_pylist()
    for name in source.columns:
        if name == label:
            continue
        names = class_names(source.features.get(name))
        kind = getattr(source.features.get(name), "dtype", "")
        if names and _same(labels, flat_array(few.column(name)).to_pylist()):
            return names
        if kind in ("string", "large_string"):
            names = _one_to_one(labels, flat_array(few.column(name)).to_pylist())
            if names:
                return names
    return ()


def _same(labels: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether each row's labels are the other column's, in their order: some are left out at the
    end, and a word in pieces has its label once or on all of them."""
    told = 0
    for mine, other in zip(labels, others, strict=True):
        given, meant = _runs(mine), _runs(other)
        if given != meant[: len(given)]:
            return False
        told += len(given)
    return told >= len(labels) > 0


def _runs(labels: Any) -> list[Any]:
    """The labels that count, with neighbours that are alike as one."""
    row = labels if isinstance(labels, list) else [labels]
    counted = [label for label in row if label is not None and label != IGNORED]
    return [label for label, _ in itertools.groupby(counted)]


def _one_to_one(labels: Sequence[Any], words: Sequence[Any]) -> tuple[str, ...]:
    """The word that goes with each class, where every class has one and no two have the same."""
    pairs = {
        (label, word)
        for label, word in zip(labels, words, strict=True)
        if isinstance(label, int) and word is not None
    }
    if not 2 <= len(pairs) <= MOST_NAMES:
        return ()
    by_class = dict(sorted(pairs))
    whole = list(by_class) == list(range(len(pairs)))
    return tuple(by_class.values()) if whole and len(set(by_class.values())) == len(pairs) else ()
