"""Which rows of a data set are the longest once they are in a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hf_recipe.instruments.batches import Rows

READ = 4096  # rows that are read where lengths cannot be had from the columns
SEQUENCES = ("input_ids", "input_values", "input_features", "pixel_values", "inputs_embeds")


def longest_rows(rows: Rows, count: int) -> tuple[list[int], int]:
    """Up to `count` indices of the longest rows, longest first, and the length of the first.

    A row's length is that of its tokens, samples or pixels; 0 where rows are no sequences. Columns
    of a `datasets.Dataset` are measured whole, other rows by an evenly spaced sample.
    """
    known = _of_columns(rows)
    lengths = known if known is not None else _read(rows)
    ordered = sorted(lengths, key=lambda index: (-lengths[index], index))[:count]
    return ordered, lengths[ordered[0]]


def _of_columns(rows: Rows) -> dict[int, int] | None:
    """Lengths out of an Arrow list column, without making a row; None where there is none."""
    import datasets
    import pyarrow.compute as compute

    data = rows.read
    plain = isinstance(data, datasets.Dataset) and data.format["type"] != "custom"
    name = next((n for n in SEQUENCES if plain and n in data.column_names), None)
    if name is None or not isinstance(data.features[name], (datasets.List, datasets.LargeList)):
        return None
    lengths = compute.list_value_length(data.data.column(name)).to_pylist()
    places = range(len(data)) if data._indices is None else data._indices.column(0).to_pylist()
    return {index: int(lengths[place] or 0) for index, place in enumerate(places)}


def _read(rows: Rows) -> dict[int, int]:
    return {index: _length(rows.read[index]) for index in rows.evenly_spaced(READ)}


def _length(row: Any) -> int:
    if not isinstance(row, Mapping):
        return 0
    named = [row[name] for name in SEQUENCES if name in row]
    return max((_size(value) for value in named), default=0)


def _size(value: Any) -> int:
    if isinstance(value, torch.Tensor) or hasattr(value, "shape"):
        size = 1
        for each in value.shape:
            size *= int(each)
        return size
    return len(value) if isinstance(value, (list, tuple)) else 0
