"""Looking at suspects one by one: a patch file of what was decided, and the step that applies it.

The patch file is a journal: its header names the label, the inputs and the classes; each line
holds a row's number, a hash of its inputs and the decision. Nothing is changed in place: applying
the patch is a step of the pipeline, with a fingerprint of its own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from hf_recipe.data.label_probe import Witnessed, cross_validate
from hf_recipe.data.preprocess import Row, Step, row_hashes
from hf_recipe.data.source import Roles, Source
from hf_recipe.data.suspect_label import margins_of
from hf_recipe.instruments.batches import Rows
from hf_recipe.instruments.interview import Interview, Question
from hf_recipe.instruments.journal import Journal, standing

KIND = "hf_recipe labels patch"
KEEP, DROP = "keep the label", "drop the row"
EVERY = 10**9


def suspects_of(
    rows: Rows, source: Source, roles: Roles, *, most: int = EVERY
) -> tuple[Witnessed, list[tuple[int, int, int]]]:
    """The probe's view, and (row number, label's class, likelier class), worst first."""
    if roles.label is None:
        raise ValueError("the data has no label column; give --label")
    seen = cross_validate(rows, source, roles.inputs, roles.label, most=EVERY)
    margins, others = margins_of(seen.probabilities, seen.labels)
    worst = np.argsort(margins, kind="stable")[: min(most, int((margins < 0).sum()))]
    return seen, [(int(seen.rows[i]), int(seen.labels[i]), int(others[i])) for i in worst]


def review_of(
    dataset: datasets.Dataset,
    suspects: Sequence[tuple[int, int, int]],
    seen: Witnessed,
    roles: Roles,
    path: str | os.PathLike[str],
) -> Interview:
    """The interview over `suspects`; its journal is the patch file.

    Raises:
        ValueError: `path` holds the review of another data set.
    """
    names = class_names(dataset, str(roles.label), seen.classes)
    chosen = dataset.select([row for row, _, _ in suspects])
    hashes = row_hashes(chosen, roles.inputs)
    questions = [
        question_of(
            chosen[i],
            row,
            roles.inputs,
            hint=f"row {row}: labelled {names[given]}, looks like {names[other]}",
            facts={"hash": f"{int(hashes[i]):016x}"},
        )
        for i, (row, given, other) in enumerate(suspects)
    ]
    header = {
        "kind": KIND,
        "version": 1,
        "label": roles.label,
        "inputs": list(roles.inputs),
        "classes": list(seen.classes),
        "suspects": f"{len(suspects)} from row {suspects[0][0] if suspects else None}",
    }
    return Interview(questions, (*names, KEEP, DROP), Journal(path, header))


def class_names(dataset: datasets.Dataset, label: str, classes: Sequence[Any]) -> list[str]:
    """What the classes are called: as the data set declares, else as they stand."""
    declared = getattr(dataset.features.get(label), "names", None)
    return [
        declared[c] if declared and isinstance(c, int) and 0 <= c < len(declared) else str(c)
        for c in classes
    ]


def question_of(
    row: Row, number: int, inputs: Sequence[str], *, hint: str = "", facts: Any = None
) -> Question:
    """A row as a question: its pictures drawn, all else written out."""
    picture, parts = None, []
    for name in inputs:
        value = row[name]
        if hasattr(value, "getbands"):
            picture = value
        elif (drawn := _as_picture(value)) is not None and picture is None:
            picture = drawn
        else:
            written = value if isinstance(value, str) else str(value)
            parts.append(written if len(inputs) == 1 else f"{name}: {written}")
    return Question(number, "\n".join(parts), picture, hint, dict(facts or {}))


def _as_picture(value: Any) -> Any:
    """A square, or a list of a square number of values, as a grey picture; None otherwise."""
    from PIL import Image

    if not isinstance(value, list) or not value:
        return None
    try:
        values = np.asarray(value, dtype=np.float64)
    except (ValueError, TypeError):
        return None
    side = round(values.size**0.5)
    squared = values.ndim == 2 or (values.ndim == 1 and side * side == values.size and side >= 6)
    if not squared or not np.isfinite(values).all():
        return None
    values = values if values.ndim == 2 else values.reshape(side, side)
    low, high = values.min(), values.max()
    scaled = (values - low) / (high - low if high > low else 1) * 255
    return Image.fromarray(scaled.astype(np.uint8))


@dataclass(frozen=True)
class ApplyReview(Step):
    """Set the labels that a review decided on, and drop the rows it dropped.

    Args:
        path: the patch file; its content, not its place, is part of the fingerprint.

    Raises (in `transform`):
        ValueError: a reviewed row is not in the data, or has other inputs than it had.
    """

    path: str

    def decisions(self) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
        """The header, and the last line of each question that stands."""
        header, lines = standing(self.path, KIND, "labels patch")
        return header, {n: line for n, line in lines.items() if line["choice"] is not None}

    def parameters(self) -> dict[str, Any]:
        return {"patch": self.decisions()}

    def __call__(self, row: Row) -> Any:
        raise TypeError("a patch goes by row numbers: use ApplyReview(...).transform(data)")

    def transform(self, data: datasets.Dataset) -> datasets.Dataset:
        header, decided = self.decisions()
        label, classes = header["label"], header["classes"]
        hashes = row_hashes(data, tuple(header["inputs"]))
        where = {f"{int(h):016x}": i for i, h in reversed(list(enumerate(hashes)))}
        labels, kept = list(data[label]), np.ones(len(data), dtype=bool)
        for line in decided.values():
            here = line["row"] if line["row"] < len(data) else -1
            if here < 0 or f"{int(hashes[here]):016x}" != line["hash"]:
                here = where.get(line["hash"], -1)
            if here < 0:
                raise ValueError(f"{self.path}: row {line['row']} is not in this data")
            if line["choice"] < len(classes):
                labels[here] = classes[line["choice"]]
            elif line["choice"] == len(classes) + 1:
                kept[here] = False
        feature = data.features[label]
        fingerprint = self.fingerprint(data._fingerprint)
        order = data.column_names
        plain = data.remove_columns(label).add_column(label, labels, feature=feature)
        return plain.select_columns(order).select(np.flatnonzero(kept), new_fingerprint=fingerprint)
