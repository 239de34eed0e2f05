"""What the data checks read: the columns of a data set, in chunks, with the row numbers kept.

Whatever a user trains on becomes Arrow tables of a few thousand rows: a `datasets.Dataset` is read
where it lies (memory-mapped, images undecoded), a map-style torch data set row by row, a stream
by its first rows. Beyond a limit, evenly spaced rows stand for all of them, and `note` says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import xxhash

from hf_recipe.core.check import Skip
from hf_recipe.instruments.batches import Rows, has_rows
from hf_recipe.instruments.subject import Subject

Integers = npt.NDArray[np.int64]

ARROW_ROWS = 100_000  # the budget of the data checks is set per 100,000 rows
SMALL_ROWS = 20_000  # rows of a torch data set that are a few numbers
LARGE_ROWS = 2_048  # rows of a torch data set that are images or the like
CHUNK = 4_096
LARGE = 2_048  # values in one cell beyond which its hash and moments stand for it
STREAM_ROWS = 10_000
STREAM_BYTES = 2**28  # of texts and small arrays; a stream of long rows is read less far

LABELS = ("labels", "label", "label_ids")
MODEL_INPUTS = frozenset(
    {"input_ids", "pixel_values", "input_values", "input_features", "inputs_embeds"}
)
IDENTIFIER = re.compile(r"(^|_)(id|idx|index|uuid|guid|row|key|index_level_0__)$", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """One split's rows as Arrow tables.

    Attributes:
        name: the split.
        total: rows in the whole split; None for a stream.
        rows: data set row number of each row that is read.
        columns: names of the columns.
        features: the `datasets` feature of each column, where there are any.
        data: a `datasets.Dataset` or a table of the rows that are read.
        varies: whether reading a row twice gave two different rows (augmentation).
        kept: what was derived from the rows once, for others to use.
    """

    name: str
    total: int | None
    rows: Integers
    columns: tuple[str, ...]
    features: Mapping[str, Any]
    data: Any = field(repr=False)
    varies: bool = False
    kept: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def is_sample(self) -> bool:
        return self.total is None or self.total > len(self.rows)

    @property
    def note(self) -> str:
        """What a sentence about this split must add when not all of it was read."""
        if self.total is None:
            return f"the first {len(self.rows):,} rows of the stream"
        if self.is_sample:
            return f"{len(self.rows):,} of {self.total:,} rows, evenly spaced"
        return ""

    @property
    def schema(self) -> pa.Schema:
        """The columns' types, without reading a row."""
        if isinstance(self.data, pa.Table):
            return self.data.schema
        schema: pa.Schema = self.data.features.arrow_schema
        return schema

    def part(self, place: int, parts: int) -> Source:
        """The rows of process `place` of `parts`, in whole chunks."""
        chunks = -(-len(self) // CHUNK)
        low, high = (min(len(self), chunks * i // parts * CHUNK) for i in (place, place + 1))
        whole = isinstance(self.data, pa.Table)
        data = self.data.slice(low, high - low) if whole else self.data.select(range(low, high))
        return replace(self, rows=self.rows[low:high], data=data, kept={})

    def chunks(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Tables of up to `CHUNK` rows, in order."""
        names = list(columns if columns is not None else self.columns)
        if isinstance(self.data, pa.Table):
            table = self.data.select(names)
            for start in range(0, table.num_rows, CHUNK):
                yield table.slice(start, CHUNK)
        elif len(self.data) and names:
            yield from self.data.select_columns(names).with_format("arrow").iter(batch_size=CHUNK)


def source_of(subject: Subject, split: str) -> Source:
    """The split's rows, read once per subject.

    Raises:
        Skip: there is no such split, it is a stream, or it has no rows.
    """
    key = f"source:{split}"
    if key not in subject.cache:
        rows = subject.rows(split)
        if rows.is_stream:
            raise Skip(f"the {rows.name} data is a stream: reading ahead would eat it")
        subject.cache[key] = read_source(rows)
    found: Source = subject.cache[key]
    if not len(found):
        raise Skip(f"the {split} data has no rows")
    return found


def splits_of(subject: Subject) -> list[str]:
    """The names of the splits there are, the training set first."""
    return (["train"] if subject.train is not None else []) + list(subject.evaluation)


def read_source(rows: Rows, *, limit: int = ARROW_ROWS) -> Source:
    """`rows.dataset` as a source; at most `limit` rows of an Arrow data set."""
    import datasets

    dataset = rows.dataset
    if isinstance(dataset, datasets.Dataset):
        chosen = np.asarray(rows.evenly_spaced(limit), dtype=np.int64)
        data = dataset if len(chosen) == len(dataset) else dataset.select(chosen)
        features = dict(dataset.features)
        return Source(rows.name, len(dataset), chosen, tuple(dataset.column_names), features, data)
    if not len(rows):
        return Source(rows.name, 0, np.zeros(0, np.int64), (), {}, pa.table({}))
    first = _cells(dataset[0])
    large = any(isinstance(_cell(v), _Large) for v in first.values())
    chosen = np.asarray(
        rows.evenly_spaced(min(limit, LARGE_ROWS if large else SMALL_ROWS)), dtype=np.int64
    )
    table = table_of_rows(dataset[int(i)] for i in chosen)
    again = table_of_rows(dataset[int(i)] for i in chosen[:4])
    varies = not again.equals(table.slice(0, 4).select(again.column_names))
    return Source(rows.name, len(rows), chosen, tuple(table.column_names), {}, table, varies=varies)


def read_stream(name: str, stream: Any, *, limit: int = STREAM_ROWS) -> Source:
    """The first `limit` rows of an iterable data set, which is consumed that far."""
    table = table_of_rows(_front(stream, limit))
    features = dict(getattr(stream, "features", None) or {})
    chosen = np.arange(table.num_rows, dtype=np.int64)
    return Source(name, None, chosen, tuple(table.column_names), features, table)


def _front(stream: Any, limit: int) -> Iterator[dict[str, Any]]:
    """The first rows, one at a time and no more than memory is meant to hold."""
    held = 0
    for count, row in enumerate(stream, start=1):
        cells = {name: _cell(value) for name, value in _cells(row).items()}
        yield cells
        held += sum(_size(cell) for cell in cells.values())
        if count == limit or held > STREAM_BYTES:
            return


def _size(cell: Any) -> int:
    if isinstance(cell, np.ndarray):
        return cell.nbytes
    return len(cell) if isinstance(cell, (str, bytes)) else 8


# ---------------------------------------------------------------- rows into tables


@dataclass(frozen=True)
class _Large:
    """An image or another large array, as its hash and moments."""

    digest: int
    size: int
    low: float
    high: float
    mean: float
    std: float


def _cells(row: Any) -> dict[str, Any]:
    """A row as named cells, whatever a torch data set returns."""
    if isinstance(row, Mapping):
        return {str(k): v for k, v in row.items()}
    if isinstance(row, (tuple, list)):
        return {str(i): v for i, v in enumerate(row)}
    return {"0": row}


def _cell(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    elif hasattr(value, "getbands"):  # a PIL image
        value = np.asarray(value)
    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, np.ndarray):
        return value
    if value.ndim == 0:
        return value.item()
    if value.size <= LARGE:
        return np.ascontiguousarray(value).reshape(-1)
    shape = str((value.shape, value.dtype.str)).encode()
    raw = np.ascontiguousarray(value)
    digest = xxhash.xxh3_64_intdigest(shape + raw.tobytes())
    real = raw.astype(np.float64) if raw.dtype.kind in "biuf" else np.zeros(1)
    return _Large(
        digest - 2**63,
        int(raw.size),
        float(real.min()),
        float(real.max()),
        float(real.mean()),
        float(real.std()),
    )


def table_of_rows(rows: Any) -> pa.Table:
    """Rows of any kind as one table; cells of mixed types become their hash."""
    columns: dict[str, list[Any]] = {}
    for count, row in enumerate(rows):
        for name, value in _cells(row).items():
            columns.setdefault(name, [None] * count).append(_cell(value))
        for column in columns.values():
            if len(column) == count:  # this row lacks it
                column.append(None)
    return pa.table({name: _array(values) for name, values in columns.items()})


def _array(values: list[Any]) -> pa.Array:
    if any(isinstance(value, _Large) for value in values):
        return pa.array([vars(v) if isinstance(v, _Large) else None for v in values])
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        return pa.array([_digest_of(value) for value in values])


def _digest_of(value: Any) -> int | None:
    if value is None:
        return None
    return xxhash.xxh3_64_intdigest(repr(value).encode("utf-8", "surrogatepass")) - 2**63


# ---------------------------------------------------------------- what a column is for


@dataclass(frozen=True)
class Roles:
    """Which column holds the label, and which ones the model sees."""

    label: str | None
    inputs: tuple[str, ...]


def roles_of(subject: Subject, source: Source) -> Roles:
    """The roles of a split's columns: as the user named them, else as the Trainer reads them."""
    chosen = subject.cache.get("roles")
    if chosen is not None:
        label = chosen.label if chosen.label in source.columns else None
        return Roles(label, tuple(c for c in chosen.inputs if c in source.columns))
    named = tuple(subject.trainer.label_names or ()) if subject.trainer is not None else ()
    label = next((c for c in (*named, *LABELS) if c in source.columns), None)
    if label is None and source.columns and all(c.isdigit() for c in source.columns):
        label = source.columns[-1] if len(source.columns) > 1 else None
    rows = subject.rows(source.name)
    kept = getattr(rows.read, "column_names", None) or source.columns
    inputs = [c for c in kept if c in source.columns and c not in (*named, *LABELS, label)]
    return Roles(label, tuple(input_columns(inputs)))


def input_columns(columns: Sequence[str]) -> list[str]:
    """The columns whose content is the input: the model's own names, or all but row numbers."""
    known = [c for c in columns if c in MODEL_INPUTS]
    return known or [c for c in columns if not IDENTIFIER.search(c)] or list(columns)


def is_readable(dataset: Any) -> bool:
    """Whether rows of `dataset` can be had by their number."""
    return has_rows(dataset)
