"""Labels as they stand in a data set, and as the collator hands them to the network.

Most collators leave labels alone; one that makes others of them (one-hot vectors, other numbers)
is looked at through the batches that it makes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from hf_recipe.core.check import Skip
from hf_recipe.data.hashing import flat_array, is_list, is_number, list_parts, numbers
from hf_recipe.data.labels import IGNORED, LabelCounts, count_labels
from hf_recipe.data.source import Roles, Source
from hf_recipe.instruments.subject import Subject

COLLATED = 256  # rows that are collated where the stored labels are not those of the batches


def values_of(source: Source, roles: Roles) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
    """Every label that counts, flat, with the data set row it belongs to."""
    rows, values, start = [], [], 0
    for chunk in source.chunks([roles.label or ""]):
        array = flat_array(chunk.column(0))
        numbered = source.rows[start : start + len(array)]
        start += len(array)
        if is_list(array.type):
            elements, offsets = list_parts(array)
            array, numbered = flat_array(elements), np.repeat(numbered, np.diff(offsets))
        if not is_number(array.type):
            raise Skip(f"the {source.name} labels are not numbers")
        flat = numbers(array)
        there = np.asarray(array.is_valid()) & np.isfinite(flat) & (flat != IGNORED)
        rows.append(numbered[there])
        values.append(flat[there])
    return np.concatenate(rows), np.concatenate(values)


def labels_as_collated(
    subject: Subject, split: str, counts: LabelCounts
) -> tuple[LabelCounts, npt.NDArray[np.int64], npt.NDArray[Any]]:
    """The labels of a few batches, where the collator makes others of those that are stored."""
    labels: list[Any] = []
    rows: list[int] = []
    for batch in subject.batches(split, rows=COLLATED):
        if not isinstance(batch.labels, torch.Tensor) or batch.labels.ndim > 2 or not batch.rows:
            raise Skip(f"the {split} labels are changed on their way into the batch")
        labels += batch.labels.detach().cpu().tolist()
        rows += batch.rows
    numbered = np.asarray(rows, dtype=np.int64)
    table = pa.table({counts.column: pa.array(labels)})
    made = Source(split, counts.total, numbered, (counts.column,), {}, table)
    roles = Roles(counts.column, ())
    return count_labels(made, roles), *values_of(made, roles)


def collated_as_read(subject: Subject, source: Source, roles: Roles) -> bool:
    """Whether a small batch carries the labels that stand in the data set."""
    if subject.cache.get("raw"):
        return True  # the rows are looked at by themselves, without a collator
    rows = subject.rows(source.name)
    chosen = [int(i) for i in source.rows[:: max(1, len(source) // 8)][:8]]
    batch = rows.batch(chosen)
    if not isinstance(batch.labels, torch.Tensor):
        return False
    collated = batch.labels.detach().cpu().double().flatten()
    raw = [_flat_numbers(label) for label in _stored_labels(rows.dataset, chosen, roles.label)]
    wanted = torch.tensor([v for row in raw for v in row], dtype=torch.float64)
    if collated.numel() != wanted.numel():  # padded
        collated, wanted = collated[collated != IGNORED], wanted[wanted != IGNORED]
    return collated.shape == wanted.shape and bool(
        torch.allclose(collated, wanted, rtol=1e-3, equal_nan=True)
    )


def _stored_labels(dataset: Any, chosen: Sequence[int], label: str | None) -> list[Any]:
    """The labels as they are stored: a `set_transform` may rename them on the fly."""
    import datasets

    if isinstance(dataset, datasets.Dataset):
        return list(dataset.select_columns([label]).with_format(None).select(chosen)[label])
    rows = [dataset[i] for i in chosen]
    return [row[label] if isinstance(row, Mapping) else row[int(label or 0)] for row in rows]


def _flat_numbers(value: Any) -> list[float]:
    if isinstance(value, str) or value is None:
        return [math.nan]
    return np.asarray(value, dtype=np.float64).reshape(-1).tolist()
