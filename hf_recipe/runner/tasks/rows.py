"""One answer per row: a class, a number, or several yes-or-no answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from hf_recipe.complexify.architectures import Design
from hf_recipe.core.exhibit import Answer, Cell, Table
from hf_recipe.runner import columns
from hf_recipe.runner.columns import Parts
from hf_recipe.runner.feed import Feed, ImageFeed, NumberFeed, TextFeed
from hf_recipe.runner.simple import SimpleConfig, SimpleModel
from hf_recipe.runner.tasks.base import (
    PARTS,
    QUESTION,
    Looked,
    Read,
    Task,
    bert_config,
    class_head,
    first_of,
    vit_config,
)
from hf_recipe.runner.usage import UsageError
from hf_recipe.trainer.metrics import compute_metrics_for

if TYPE_CHECKING:
    from hf_recipe.runner.data import Data
    from hf_recipe.runner.options import DataOptions


class RowTask(Task):
    """One label per row, beside pictures, texts or numbers."""

    feeds = {"text": TextFeed, "numbers": NumberFeed, "image": ImageFeed}

    def auto(self, kind: str) -> Any:
        image = kind == "image"
        return AutoModelForImageClassification if image else AutoModelForSequenceClassification

    def read(self, parts: Parts, chosen: DataOptions, what: str) -> Read:
        first = parts["train"]
        label = columns.label_column(first, chosen.label_column)
        kind, inputs = columns.input_columns(first, (label,), chosen)
        self.check(first, label, kind)
        made = {}
        for name, part in parts.items():
            part = columns.selected(part, (*inputs, label), f"{what}, {name}")
            made[name] = part if label == "label" else part.rename_column(label, "label")
        return self.target(Read(kind, made, inputs))

    def check(self, rows: datasets.Dataset, label: str, kind: str) -> None:
        """UsageError where the input or the label cannot be this task's."""
        if kind not in self.feeds:
            raise UsageError(
                f"--task {self.name} needs {' or '.join(_NEEDS[k] for k in self.feeds)}; "
                f"the input found is {'images' if kind == 'image' else kind}"
            )

    def target(self, read: Read) -> Read:
        """The column "label" as numbers."""
        parts, classes = columns.numbered(read.parts)
        return replace(read, parts=parts, classes=classes)

    def looked_at(self, data: Data) -> Looked:
        named = {data.kind: data.inputs[0]} if data.kind in ("text", "image") else {}
        return Looked(data.splits, "label", named)

    # ------------------------------------------------------------ network

    def head(self, data: Data) -> dict[str, Any]:
        return {**class_head(data.classes), "problem_type": "single_label_classification"}

    def config(self, feed: Feed, design: Design, dropout: float, head: Mapping[str, Any]) -> Any:
        if isinstance(feed, NumberFeed):
            width, depth = design.width, design.depth
            return SimpleConfig("numbers", feed.shape[0], width, depth, dropout, **head)
        make = vit_config if isinstance(feed, ImageFeed) else bert_config
        return make(feed, design, dropout, head)

    def simplest(self, feed: Feed, head: Mapping[str, Any]) -> Any:
        return SimpleModel(SimpleConfig(feed.data.kind, math.prod(feed.shape), 0, **head))

    # ------------------------------------------------------------ measures

    def row_losses(self, predictions: Any, labels: Any) -> tuple[float, ...]:
        logits = np.asarray(first_of(predictions)).astype(np.float64)
        labels = np.asarray(labels).reshape(-1)
        top = logits.max(-1, keepdims=True)
        total = np.log(np.exp(logits - top).sum(-1)) + top[:, 0]
        losses = total - logits[np.arange(len(labels)), labels.astype(int)]
        return tuple(float(loss) for loss in losses)

    def metrics_of(self, data: Data) -> Callable[[Any], dict[str, float]]:
        return compute_metrics_for(self.name, scale=data.scale)


class Classification(RowTask):
    """One of several classes."""

    metric = "accuracy"

    def fits(self, rows: datasets.Dataset, chosen: DataOptions) -> bool:
        label = columns.label_column(rows, chosen.label_column)
        return columns.input_columns(rows, (label,), chosen)[0] in self.feeds

    def strata(self, rows: datasets.Dataset) -> Sequence[int]:
        return [int(label) for label in rows["label"]]

    def strata_of_rows(self, feed: Feed, part: str) -> list[int] | None:
        labels: list[int] = self.labels(feed.data, part).tolist()
        return labels

    def labels(self, data: Data, part: str) -> np.ndarray[Any, Any]:
        return np.asarray(data.splits[part]["label"]).astype(np.int64)

    def blind_losses(self, feed: Feed) -> tuple[float, ...]:
        data = feed.data
        counts = np.bincount(data.labels("train"), minlength=len(data.classes)).astype(float) + 1e-9
        logs = -np.log(counts / counts.sum())
        return tuple(float(logs[y]) for y in data.labels("validation"))

    def table(self, feed: Feed) -> Table:
        data, rows = feed.data, list[tuple[Cell, ...]]()
        for part in PARTS:
            counts = np.bincount(data.labels(part), minlength=len(data.classes))
            rows.append((part, len(data.splits[part]), *(int(c) for c in counts)))
        return Table("The three parts", "data", ("part", "rows", *data.classes), tuple(rows))

    def prior(self, feed: Feed) -> Answer:
        labels, outputs = feed.data.labels("train"), len(feed.data.classes)
        shares = np.bincount(labels, minlength=outputs) / len(labels)
        entropy = float(-sum(p * math.log(p) for p in shares if p > 0))
        return Answer(
            QUESTION,
            "data",
            f"loss {entropy:.4f} (uniform: {math.log(outputs):.4f}), accuracy {shares.max():.1%}",
            {"loss": entropy, "accuracy": float(shares.max())},
        )

    def uniform(self, feed: Feed) -> str:
        outputs = len(feed.data.classes)
        return f"-log(1/{outputs}) = {math.log(outputs):.4f}"

    def interval(self, result: Mapping[str, Any]) -> str:
        from hf_recipe.runner.gates import wilson

        rows = int(result["rows"])
        low, high = wilson(round(result["accuracy"] * rows), rows)
        return f" [{low:.4f}, {high:.4f}] of {rows}"


class ImageClassification(Classification):
    """A class for each picture."""

    name = "image-classification"
    feeds = {"image": ImageFeed}


class SequenceClassification(Classification):
    """A class for each text, or for each row of numbers."""

    name = "sequence-classification"
    feeds = {"text": TextFeed, "numbers": NumberFeed}


class Regression(RowTask):
    """A number for each row."""

    name = "regression"
    metric = "r2"

    def fits(self, rows: datasets.Dataset, chosen: DataOptions) -> bool:
        label = columns.label_column(rows, chosen.label_column)
        dtype = str(getattr(rows.features[label], "dtype", ""))
        return dtype.startswith("float") and not columns.is_whole(rows[label])

    def check(self, rows: datasets.Dataset, label: str, kind: str) -> None:
        super().check(rows, label, kind)
        if not columns.is_number(rows.features[label]):
            dtype = str(getattr(rows.features[label], "dtype", "")) or "?"
            raise UsageError(f"--task regression needs numbers; column {label!r} holds {dtype}")

    def target(self, read: Read) -> Read:
        return read

    def settle(self, data: Data) -> None:
        targets = np.asarray(data.splits["train"]["label"], dtype=float)
        data.center, data.scale = float(targets.mean()), float(targets.std()) or 1.0

    def strata(self, rows: datasets.Dataset) -> Sequence[int]:
        values = np.asarray(rows["label"]).astype(float)
        edges = np.quantile(values, np.linspace(0, 1, 11)[1:-1])
        return [int(place) for place in np.searchsorted(edges, values)]

    def labels(self, data: Data, part: str) -> np.ndarray[Any, Any]:
        values = np.asarray(data.splits[part]["label"]).astype(np.float64)
        return ((values - data.center) / data.scale).astype(np.float32)

    def head(self, data: Data) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def row_losses(self, predictions: Any, labels: Any) -> tuple[float, ...]:
        seen = np.asarray(first_of(predictions)).astype(np.float64).reshape(-1)
        return tuple(float(loss) for loss in (seen - np.asarray(labels).reshape(-1)) ** 2)

    def blind_losses(self, feed: Feed) -> tuple[float, ...]:
        # the standardised training mean is 0
        return tuple(float(y) ** 2 for y in feed.data.labels("validation"))

    def table(self, feed: Feed) -> Table:
        rows: list[tuple[Cell, ...]] = []
        for part in PARTS:
            labels = np.asarray(feed.data.splits[part]["label"])
            rows.append((part, len(labels), float(labels.mean()), float(labels.std())))
        columns_ = ("part", "rows", "mean", "standard deviation")
        return Table("The three parts", "data", columns_, tuple(rows))

    def prior(self, feed: Feed) -> Answer:
        text = "squared error 1 in units of the target's variance"
        return Answer(QUESTION, "data", text, {"loss": 1.0})

    def uniform(self, feed: Feed) -> str:
        return "the standardised target's variance = 1.0000"


_NEEDS = {"image": "a column of images", "text": "a text column", "numbers": "columns of numbers"}
