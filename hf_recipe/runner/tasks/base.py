"""What a task is: one object that says how its rows become a loss, a metric and a network.

The stages ask it and never its name. `Task` is the contract; `RowTask` (tasks/rows.py) stands for
tasks with one answer per row, `TokenTask` here for those with many answers in each row.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from transformers import BertConfig, ViTConfig

from hf_recipe.complexify.architectures import Design
from hf_recipe.core.exhibit import Answer, Cell, Table
from hf_recipe.runner.columns import Parts
from hf_recipe.runner.feed import Feed, TextFeed

if TYPE_CHECKING:
    from hf_recipe.runner.data import Data
    from hf_recipe.runner.options import DataOptions

IGNORED = -100
PARTS = ("train", "validation", "test")
QUESTION = "How good is an answer that never looks at its input?"


@dataclass(frozen=True)
class Read:
    """The columns that a task has found.

    Attributes:
        kind: of the input: "image", "text" or "numbers".
        parts: the given parts, with the columns `inputs` and `targets` alone.
        inputs, targets: names of columns; a language model has no targets of its own.
        classes: names of the classes; empty where there are none.
    """

    kind: str
    parts: Parts
    inputs: tuple[str, ...]
    targets: tuple[str, ...] = ("label",)
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Looked:
    """What the data checks are given: raw parts, and what their columns are.

    Attributes:
        parts: may be other columns than the network's (words joined to texts).
        label: None: no column holds one label per row.
        columns: "text" or "image" -> column or columns.
    """

    parts: Parts
    label: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


class Task(ABC):
    """One task.

    Attributes:
        name: as ``--task`` has it.
        metric: the one that is shown beside the loss; one of those that `metrics_of` computes.
        feeds: how rows are made, by the kind of input; its keys are the kinds it takes.
        patience: how many times the epochs of its ladder a fresh network is given.
        counted: whether n-gram models or a counting tagger stand beside the simplest model.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    feeds: ClassVar[Mapping[str, type[Feed]]]
    patience: ClassVar[float] = 1.0
    counted: ClassVar[bool] = False

    # ------------------------------------------------------------ data

    @abstractmethod
    def fits(self, rows: datasets.Dataset, chosen: DataOptions) -> bool:
        """Whether these columns tell that it is this task."""

    @abstractmethod
    def read(self, parts: Parts, chosen: DataOptions, what: str) -> Read:
        """Find the columns; UsageError where one is missing or holds what it cannot."""

    def strata(self, rows: datasets.Dataset) -> Sequence[int] | None:
        """A class for each row, by which parts are cut; None: all alike."""
        return None

    def strata_of_rows(self, feed: Feed, part: str) -> list[int] | None:
        """The same for the rows that a feed makes."""
        return None

    def settle(self, data: Data) -> None:  # noqa: B027
        """Learn from the training part what targets are measured in."""

    def labels(self, data: Data, part: str) -> np.ndarray[Any, Any]:
        """Targets as the network gets them, one for each row of a part."""
        return np.asarray(data.splits[part]["label"])

    def looked_at(self, data: Data) -> Looked:
        """What the data checks are to look at."""
        parts = {k: part.select_columns(list(data.inputs)) for k, part in data.splits.items()}
        return Looked(parts, None, {data.kind: list(data.inputs)})

    # ------------------------------------------------------------ network

    def ladder(self, kind: str) -> str:
        """Which ladder of published architectures its networks come from."""
        return kind

    @abstractmethod
    def auto(self, kind: str) -> Any:
        """The auto class whose ``from_config`` makes its networks."""

    @abstractmethod
    def head(self, data: Data) -> dict[str, Any]:
        """What a config must know of the outputs."""

    @abstractmethod
    def config(self, feed: Feed, design: Design, dropout: float, head: Mapping[str, Any]) -> Any:
        """The config of a fresh network."""

    @abstractmethod
    def simplest(self, feed: Feed, head: Mapping[str, Any]) -> Any:
        """The simplest model that is worth to be beaten."""

    # ------------------------------------------------------------ measures

    @property
    def condense(self) -> Callable[[Any, Any], Any] | None:
        """Logits and labels of a batch -> what is kept of them; None: the logits themselves."""
        return None

    @abstractmethod
    def row_losses(self, predictions: Any, labels: Any) -> tuple[float, ...]:
        """The loss of each row, of what ``Trainer.predict`` gives: nats, or squared units."""

    @abstractmethod
    def metrics_of(self, data: Data) -> Callable[[Any], dict[str, float]]:
        """A `compute_metrics` for the Trainer."""

    @abstractmethod
    def blind_losses(self, feed: Feed) -> tuple[float, ...]:
        """Validation losses of the best constant answer: the training labels' distribution."""

    # ------------------------------------------------------------ words

    @abstractmethod
    def table(self, feed: Feed) -> Table:
        """The parts, and how their targets are spread."""

    @abstractmethod
    def prior(self, feed: Feed) -> Answer:
        """What is known without any input."""

    @abstractmethod
    def uniform(self, feed: Feed) -> str:
        """The loss of a network that knows nothing, as a line of text."""

    def interval(self, result: Mapping[str, Any]) -> str:
        """What stands behind the metric of the test reading: an interval, if there is one."""
        return ""


def bert_config(feed: Feed, design: Design, dropout: float, head: Mapping[str, Any]) -> BertConfig:
    """A small BERT for a feed of texts."""
    assert isinstance(feed, TextFeed)
    return BertConfig(
        vocab_size=feed.shape[0],
        max_position_embeddings=max(16, feed.max_length),
        pad_token_id=feed.processing_class.pad_token_id,
        hidden_size=design.width,
        num_hidden_layers=design.depth,
        num_attention_heads=design.heads,
        intermediate_size=4 * design.width,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **head,
    )


def vit_config(feed: Feed, design: Design, dropout: float, head: Mapping[str, Any]) -> ViTConfig:
    """A small vision transformer for a feed of pictures."""
    channels, side, _ = feed.shape
    return ViTConfig(
        image_size=side,
        patch_size=4 if side <= 32 else 8,
        num_channels=channels,
        hidden_size=design.width,
        num_hidden_layers=design.depth,
        num_attention_heads=design.heads,
        intermediate_size=4 * design.width,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **head,
    )


def first_of(outputs: Any) -> Any:
    """The logits, where a network's outputs are several."""
    return outputs[0] if isinstance(outputs, (tuple, list)) else outputs


def class_head(classes: Sequence[str]) -> dict[str, Any]:
    """The outputs of a config by the names of its classes."""
    names = dict(enumerate(classes))
    return {
        "num_labels": len(names),
        "id2label": names,
        "label2id": {name: k for k, name in names.items()},
    }


class TokenTask(Task):
    """Many answers in each row, one for each supervised position.

    A row's loss is the mean over its supervised positions. Logits are not kept: a batch gives
    each row's loss and each position's answer, so that a vocabulary's worth of numbers for every
    token never leaves the batch.
    """

    shifted: ClassVar[bool] = False  # position t answers for label t + 1
    item: ClassVar[str] = "position"  # what is supervised

    def aligned(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[Any, Any]:
        """Logits with classes last, and the label that each of them answers for."""
        if self.shifted:
            return logits[:, :-1], labels[:, 1:]
        return logits, labels

    @property
    def condense(self) -> Callable[[Any, Any], Any]:
        def keep(logits: Any, labels: Any) -> tuple[torch.Tensor, torch.Tensor]:
            made, true = self.aligned(first_of(logits), labels)
            each = F.cross_entropy(
                made.float().flatten(0, -2), true.flatten(), ignore_index=IGNORED, reduction="none"
            ).view(true.shape)
            counted = true.ne(IGNORED).flatten(1).sum(1)
            return each.flatten(1).sum(1) / counted, made.argmax(-1)

        return keep

    def row_losses(self, predictions: Any, labels: Any) -> tuple[float, ...]:
        return tuple(float(loss) for loss in np.asarray(predictions[0], dtype=np.float64))

    def supervised(self, labels: Any) -> np.ndarray[Any, Any]:
        """The labels, in the shape of the answers; -100 where there is none."""
        whole: np.ndarray[Any, Any] = np.asarray(labels)
        return whole[:, 1:] if self.shifted else whole

    def row_targets(self, feed: Feed, part: str) -> list[np.ndarray[Any, Any]]:
        """The supervised labels of each row of a part."""
        start = 1 if self.shifted else 0
        rows = (np.asarray(labels)[start:].reshape(-1) for labels in feed.rows(part)["labels"])
        return [labels[labels != IGNORED] for labels in rows]

    def frequencies(self, feed: Feed) -> np.ndarray[Any, Any]:
        """Shares of the classes among the training rows' supervised labels; half a count each."""
        seen = np.concatenate(self.row_targets(feed, "train"))
        counts = np.bincount(seen, minlength=self.outputs(feed)) + 0.5
        shares: np.ndarray[Any, Any] = counts / counts.sum()
        return shares

    def outputs(self, feed: Feed) -> int:
        """How many classes there are: those that are named, or the vocabulary."""
        return len(feed.data.classes) or feed.shape[0]

    def blind_losses(self, feed: Feed) -> tuple[float, ...]:
        logs = -np.log(self.frequencies(feed))
        return tuple(float(logs[labels].mean()) for labels in self.row_targets(feed, "validation"))

    def table(self, feed: Feed) -> Table:
        rows: list[tuple[Cell, ...]] = []
        names = feed.data.classes
        for part in PARTS:
            targets = self.row_targets(feed, part)
            counts: list[int] = []
            if names:
                seen = np.bincount(np.concatenate(targets), minlength=len(names))
                counts = [int(count) for count in seen]
            source = len(feed.data.splits[part])
            rows.append((part, source, len(targets), sum(map(len, targets)), *counts))
        columns = ("part", "rows", "sequences", f"supervised {self.item}s", *names)
        return Table("The three parts", "data", columns, tuple(rows))

    def prior(self, feed: Feed) -> Answer:
        shares = self.frequencies(feed)
        entropy = float(-(shares * np.log(shares)).sum())
        return Answer(
            QUESTION,
            "data",
            f"loss {entropy:.4f} per {self.item} (uniform: "
            f"{math.log(len(shares)):.4f}), accuracy {shares.max():.1%}",
            {"loss": entropy, "accuracy": float(shares.max())},
        )

    def uniform(self, feed: Feed) -> str:
        outputs = self.outputs(feed)
        return f"-log(1/{outputs}) = {math.log(outputs):.4f}"
