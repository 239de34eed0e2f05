"""Several yes-or-no answers for each row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np

from hf_recipe.core.exhibit import Answer, Cell, Table
from hf_recipe.runner import columns
from hf_recipe.runner.columns import Parts
from hf_recipe.runner.feed import Feed
from hf_recipe.runner.tasks.base import PARTS, QUESTION, Looked, Read, Task, class_head, first_of
from hf_recipe.runner.tasks.rows import RowTask
from hf_recipe.runner.usage import UsageError
from hf_recipe.trainer.metrics import MultiLabelF1

if TYPE_CHECKING:
    from hf_recipe.runner.data import Data
    from hf_recipe.runner.options import DataOptions

SEPARATORS = ("|", ";", ",")


class MultiLabelClassification(RowTask):
    """Any number of classes for each row.

    The label is a list in each row; or a text that ``|``, ``;`` or ``,`` parts ("sport|news");
    or several columns of 0 and 1, named as ``--label_column sport,news,arts``. A row without any
    class is an empty list or text.
    """

    name = "multi-label-classification"
    metric = "f1_micro"

    def fits(self, rows: datasets.Dataset, chosen: DataOptions) -> bool:
        if chosen.label_column is not None and "," in chosen.label_column:
            return chosen.label_column not in rows.column_names
        label = chosen.label_column or columns.find(rows, columns.LABELS)
        if label is None or label not in rows.column_names:
            return False
        if any(columns.is_list(f) for name, f in rows.features.items() if name != label):
            return False  # words and their tags
        return columns.is_list(rows.features[label])

    def read(self, parts: Parts, chosen: DataOptions, what: str) -> Read:
        first = parts["train"]
        asked = (chosen.label_column or "").split(",")
        if len(asked) > 1 and chosen.label_column not in first.column_names:
            labels = [columns.require(first, name.strip(), "--label_column") for name in asked]
        else:
            labels = [columns.label_column(first, chosen.label_column)]
        kind, inputs = columns.input_columns(first, labels, chosen)
        made = {}
        for name, part in parts.items():
            if len(labels) == 1 and columns.is_text(part.features.get(labels[0])):
                part = part.map(_whole_text, fn_kwargs={"column": labels[0]})
            part = columns.selected(part, (*inputs, *labels), f"{what}, {name}")
            lists = _lists(part, labels, f"{what}, {name}")
            made[name] = part.remove_columns(labels).add_column("label", lists)
        if len(labels) > 1:
            feature = datasets.List(datasets.ClassLabel(names=labels))
            made = {k: part.cast_column("label", feature) for k, part in made.items()}
        elif isinstance(first.features[labels[0]], datasets.List):
            made = {
                k: part.cast_column("label", first.features[labels[0]]) for k, part in made.items()
            }
        numbered, classes = columns.numbered_lists(made, "label")
        return Read(kind, numbered, inputs, classes=classes)

    def looked_at(self, data: Data) -> Looked:
        return replace(Task.looked_at(self, data))

    def labels(self, data: Data, part: str) -> np.ndarray[Any, Any]:
        rows = data.splits[part]["label"]
        made = np.zeros((len(rows), len(data.classes)), dtype=np.float32)
        for place, classes in enumerate(rows):
            made[place, list(classes)] = 1.0
        return made

    def strata(self, rows: datasets.Dataset) -> Sequence[int]:
        """The rarest class of each row: it is what a careless cut loses."""
        counts: dict[int, int] = {}
        for classes in rows["label"]:
            for k in classes:
                counts[k] = counts.get(k, 0) + 1
        return [min(row, key=lambda k: (counts[k], k), default=-1) for row in rows["label"]]

    def head(self, data: Data) -> dict[str, Any]:
        return {**class_head(data.classes), "problem_type": "multi_label_classification"}

    def row_losses(self, predictions: Any, labels: Any) -> tuple[float, ...]:
        z = np.asarray(first_of(predictions)).astype(np.float64)
        each = np.logaddexp(0, z) - z * np.asarray(labels)
        return tuple(float(loss) for loss in each.mean(-1))

    def metrics_of(self, data: Data) -> Callable[[Any], dict[str, float]]:
        metric = MultiLabelF1()

        def compute(prediction: Any) -> dict[str, float]:
            logits = np.asarray(first_of(prediction.predictions))
            seen = (logits > 0).astype(int)
            return metric.of(seen, np.asarray(prediction.label_ids).astype(int))

        return compute

    def blind_losses(self, feed: Feed) -> tuple[float, ...]:
        labels = feed.data.labels("train")
        shares = (labels.sum(0) + 0.5) / (len(labels) + 1.0)
        truth = feed.data.labels("validation")
        losses = -(truth * np.log(shares) + (1 - truth) * np.log(1 - shares)).mean(-1)
        return tuple(float(loss) for loss in losses)

    def table(self, feed: Feed) -> Table:
        data, rows = feed.data, list[tuple[Cell, ...]]()
        for part in PARTS:
            labels = data.labels(part)
            none = int((labels.sum(1) == 0).sum())
            rows.append((part, len(labels), none, *(int(c) for c in labels.sum(0))))
        names = ("part", "rows", "without any", *data.classes)
        return Table("The three parts", "data", names, tuple(rows))

    def prior(self, feed: Feed) -> Answer:
        shares = np.clip(feed.data.labels("train").mean(0), 1e-9, 1 - 1e-9)
        entropy = float(-(shares * np.log(shares) + (1 - shares) * np.log(1 - shares)).mean())
        told = f"loss {entropy:.4f} per label (uniform: {math.log(2):.4f})"
        return Answer(QUESTION, "data", told, {"loss": entropy})

    def uniform(self, feed: Feed) -> str:
        return f"-log(1/2) = {math.log(2):.4f} for each of {len(feed.data.classes)} labels"


def _whole_text(row: dict[str, Any], column: str) -> dict[str, Any]:
    return {column: row[column] or ""}


def _lists(rows: datasets.Dataset, labels: Sequence[str], what: str) -> list[list[Any]]:
    """The classes of each row, out of a list, a text, or columns of 0 and 1."""
    if len(labels) > 1:
        table = np.stack([np.asarray(rows[name]) for name in labels], axis=1)
        if not np.isin(table, (0, 1)).all():
            raise UsageError(f"{what}: the columns {', '.join(labels)} must hold 0 and 1 alone")
        return [np.flatnonzero(row).tolist() for row in table.astype(int)]
    (label,) = labels
    if columns.is_list(rows.features[label]):
        return [sorted(set(row)) for row in rows[label]]
    if not columns.is_text(rows.features[label]):
        raise UsageError(
            f"{what}: column {label!r} holds neither lists of classes nor texts; "
            "name columns of 0 and 1 as --label_column a,b,c"
        )
    texts = [str(text) for text in rows[label]]
    sign = next((s for s in SEPARATORS if any(s in text for text in texts)), SEPARATORS[0])
    return [sorted({w.strip() for w in text.split(sign)} - {""}) for text in texts]
