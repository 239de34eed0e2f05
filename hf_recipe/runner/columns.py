"""Columns: which one holds what, told from names and types, or named by the user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np

from hf_recipe.runner.usage import UsageError, nearest

if TYPE_CHECKING:
    from hf_recipe.runner.options import DataOptions

LABELS = ("label", "labels", "target", "class", "y", "score", "category")
Parts = Mapping[str, datasets.Dataset]


def require(rows: datasets.Dataset, column: str, flag: str) -> str:
    """`column`, if the rows have it; else a UsageError that names the flag and the nearest."""
    columns = rows.column_names
    if column not in columns:
        near = nearest(column, columns)
        listed = "" if near.startswith("; known") else near
        raise UsageError(f"{flag} {column}: no such column; it has {', '.join(columns)}{listed}")
    return column


def find(rows: datasets.Dataset, names: Sequence[str]) -> str | None:
    """The first column that goes by one of these names, whatever its case."""
    for name in names:
        for column in rows.column_names:
            if column.lower() == name:
                return str(column)
    return None


def need(rows: datasets.Dataset, names: Sequence[str], task: str, what: str) -> str:
    """As `find`; a UsageError where there is none."""
    found = find(rows, names)
    if found is None:
        raise UsageError(
            f"--task {task} needs a column of {what} ({' or '.join(names)}); "
            f"the columns are {', '.join(rows.column_names)}"
        )
    return found


def label_column(rows: datasets.Dataset, asked: str | None) -> str:
    """The label's column, as the user named it or by its usual names."""
    if asked is not None:
        return require(rows, asked, "--label_column")
    found = find(rows, LABELS)
    if found is None:
        raise UsageError(
            f"no label column found among {', '.join(rows.column_names)}; "
            "name it with --label_column"
        )
    return found


def input_columns(
    rows: datasets.Dataset, labels: Sequence[str], chosen: DataOptions
) -> tuple[str, tuple[str, ...]]:
    """The kind of input, "image", "text" or "numbers", and its columns."""
    features = rows.features
    for flag, column in (("text", chosen.text_column), ("image", chosen.image_column)):
        if column is not None:
            return flag, (require(rows, column, f"--{flag}_column"),)
    others = [c for c in rows.column_names if c not in labels]
    images = [c for c in others if isinstance(features[c], datasets.Image)]
    if images:
        return "image", (images[0],)
    texts = [c for c in others if is_text(features[c])]
    if texts:
        return "text", (longest(rows, texts),)
    numbers = [c for c in others if is_number(features[c])]
    if numbers:
        return "numbers", tuple(numbers)
    told = ", ".join(repr(label) for label in labels)
    raise UsageError(
        f"no image, text or number column beside the label {told}; "
        f"the columns are {', '.join(rows.column_names)}"
    )


def longest(rows: datasets.Dataset, texts: Sequence[str]) -> str:
    """The text column with the most letters."""
    sample = rows.select(range(min(256, len(rows))))
    lengths = {c: sum(len(str(v)) for v in sample[c]) for c in texts}
    return max(texts, key=lambda c: lengths[c])


def is_text(feature: Any) -> bool:
    """Whether a column holds strings."""
    return getattr(feature, "dtype", "") in ("string", "large_string")


def is_number(feature: Any) -> bool:
    """Whether a column holds numbers or truth values."""
    dtype = str(getattr(feature, "dtype", ""))
    return dtype.startswith(("int", "uint", "float", "bool"))


def is_list(feature: Any) -> bool:
    """Whether a column holds a list in each row."""
    return isinstance(feature, (datasets.List, datasets.LargeList))


def is_whole(values: Sequence[Any]) -> bool:
    """Whether numbers look like classes: whole, and at most a hundred different ones."""
    numbers = np.asarray([v for v in values if v is not None], dtype=float)
    return bool(np.all(numbers == np.round(numbers))) and len(np.unique(numbers)) <= 100


def selected(rows: datasets.Dataset, columns: Sequence[str], what: str) -> datasets.Dataset:
    """These columns alone, with a value in every row.

    Raises:
        UsageError: a column is not there, or has rows without a value.
    """
    for column in columns:
        if column not in rows.column_names:
            raise UsageError(f"{what}: no column {column!r}; it has {', '.join(rows.column_names)}")
    rows = rows.select_columns(list(columns))
    for column in reversed(columns):  # the label, which stands last, is told of first
        if isinstance(rows.features[column], datasets.Image):
            continue
        absent = [i for i, v in enumerate(rows[column]) if v is None or v != v or v == ""]
        if absent:
            raise UsageError(
                f"{what}: {len(absent)} rows have no value in {column!r}, "
                f"the first is row {absent[0]}"
            )
    return rows


def numbered(parts: Parts, column: str = "label") -> tuple[dict[str, datasets.Dataset], Any]:
    """Class numbers in place of whatever names the classes, and these names."""
    feature = parts["train"].features[column]
    if isinstance(feature, datasets.ClassLabel):
        return dict(parts), tuple(feature.names)
    values = sorted({v for part in parts.values() for v in part[column]}, key=sortable)
    if len(values) < 2:
        raise UsageError(f"the label column has {len(values)} class; 2 are the least")
    if len(values) > max(2, len(parts["train"]) // 2):
        raise UsageError(
            f"the label column has {len(values)} different values in {len(parts['train'])} rows: "
            "is it a class? (--label_column, or --task regression)"
        )
    number = {value: k for k, value in enumerate(values)}
    names = tuple(class_name(v) for v in values)
    made = {}
    for name, part in parts.items():
        labels = [number[v] for v in part[column]]
        rest = part.remove_columns(column)
        made[name] = rest.add_column(column, labels).cast_column(
            column, datasets.ClassLabel(names=list(names))
        )
    return made, names


def numbered_lists(
    parts: Parts, column: str, first: str | None = None
) -> tuple[dict[str, datasets.Dataset], tuple[str, ...]]:
    """As `numbered`, for a column with a list of classes in each row.

    Args:
        first: the class that gets number 0, where it occurs ("O" of tags).
    """
    feature = parts["train"].features[column].feature
    if isinstance(feature, datasets.ClassLabel):
        return dict(parts), tuple(feature.names)
    seen = {v for part in parts.values() for row in part[column] for v in row}
    if len(seen) < 2:
        raise UsageError(f"column {column!r} has {len(seen)} class; 2 are the least")
    values = sorted(seen, key=lambda v: (v != first, *sortable(v)))
    number = {value: k for k, value in enumerate(values)}
    names = tuple(class_name(v) for v in values)
    made = {}
    for name, part in parts.items():
        lists = [[number[v] for v in row] for row in part[column]]
        rest = part.remove_columns(column)
        made[name] = rest.add_column(column, lists).cast_column(
            column, datasets.List(datasets.ClassLabel(names=list(names)))
        )
    return made, names


def sortable(value: Any) -> tuple[str, Any]:
    """A key that sorts numbers before words."""
    return ("", value) if isinstance(value, (int, float)) else ("text", str(value))


def class_name(value: Any) -> str:
    """How a class is called: 1.0 is "1"."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
