"""Are rows drawn in the order of their labels?

Sorted rows under a sampler that does not shuffle give batches of one class: the model forgets one
class while it learns the next. The labels of windows as long as a step's rows, in the order in
which they will be drawn, are compared with the same labels shuffled.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator as Iterate
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import RandomSampler, SequentialSampler

from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.data.source import LABELS
from hf_recipe.instruments.held import held_generators, held_objects, kept
from hf_recipe.instruments.subject import Subject

WINDOWS = 64
ARROW_ROWS, OTHER_ROWS = 16_384, 1_024  # most rows read, of an Arrow and of another data set
QUARTERS = 4  # parts of a pass over the data
BINS = 4  # quantile bins of a regression target


@dataclass(frozen=True)
class DrawnOrder(Measurement):
    """Labels in the order in which they will be drawn.

    Attributes:
        sampler: class name of the sampler.
        shuffles: whether it draws at random, so that the order was not looked at.
        windows, rows: windows looked at, rows in each.
        classes: different labels seen (or bins of a number).
        entropy: mean entropy of a window's labels, in nats.
        shuffled: the same after shuffling all of them.
        composed: whether a sampler puts its windows together from all over the data set, and every
            quarter of a pass holds the labels of the whole.
    """

    sampler: str
    shuffles: bool
    windows: int = 0
    rows: int = 0
    classes: int = 0
    entropy: float = 0.0
    shuffled: float = 0.0
    composed: bool = False


def measure_order(subject: Subject) -> Iterate[DrawnOrder]:
    """Read the labels of evenly spaced windows, where the order is known before it is drawn."""
    rows = subject.rows("train")
    if rows.is_stream:
        raise Skip("a stream's order cannot be seen without reading it")
    sampler = _sampler(subject)
    name = type(sampler).__name__
    if isinstance(sampler, RandomSampler) or "Length" in name or "Rebalance" in name:
        yield DrawnOrder(name, True)
        return
    order = _order(sampler, len(rows))
    size = min(subject.plan.rows_per_step if subject.plan else 8, len(order))
    import datasets

    limit = ARROW_ROWS if isinstance(rows.dataset, datasets.Dataset) else OTHER_ROWS
    count = min(WINDOWS, len(order) // max(size, 1), limit // max(size, 1))
    if size < 2 or count < 2:
        raise Skip("too few rows to compare windows of a step's size")
    starts = [i * (len(order) - size) // (count - 1) for i in range(count)]
    chosen = np.concatenate([order[s : s + size] for s in starts])
    classes = _classes(_labels(subject, chosen)).reshape(count, size)
    mixed = np.random.default_rng(0).permutation(classes.reshape(-1)).reshape(count, size)
    yield DrawnOrder(
        sampler=name,
        shuffles=False,
        windows=count,
        rows=size,
        classes=len(np.unique(classes)),
        entropy=_mean_entropy(classes),
        shuffled=_mean_entropy(mixed),
        composed=_composed(order, classes),
    )


def _composed(order: npt.NDArray[np.int64], classes: npt.NDArray[np.int64]) -> bool:
    """Whether windows (windows, rows) of few labels look like batches made on purpose."""
    if len(classes) < QUARTERS or float((np.diff(order) > 0).mean()) > 0.9:  # as stored, or sorted
        return False
    edges = np.linspace(0, len(classes), QUARTERS + 1).astype(int)
    parts = [classes[a:b].reshape(1, -1) for a, b in itertools.pairwise(edges)]
    whole = _mean_entropy(classes.reshape(1, -1))
    return sum(map(_mean_entropy, parts)) / QUARTERS > 0.9 * whole


def _sampler(subject: Subject) -> Any:
    """The sampler behind the training dataloader, or the one that will be built."""
    trainer = subject.trainer
    loader = trainer.callback_handler.train_dataloader
    if loader is not None:
        inner = getattr(loader, "base_dataloader", loader)
        if len(inner.dataset) != len(subject.rows("train")):
            raise Skip("the dataloader draws from another data set than train_dataset")
        sampler = getattr(inner, "batch_sampler", None)
        for _ in range(6):  # shards and recorders lie around it
            inner = getattr(sampler, "sampler", None) or getattr(sampler, "batch_sampler", None)
            inner = inner or getattr(sampler, "inner", None)
            if inner is None:
                break
            sampler = inner
        return sampler
    if reason := subject.overridden("train"):
        raise Skip(reason)
    if trainer.args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
        raise Skip("rows are grouped by length, at random otherwise")
    return trainer._get_train_sampler()


def _order(sampler: Any, total: int) -> npt.NDArray[np.int64]:
    if isinstance(sampler, SequentialSampler):
        return np.arange(total)
    if not isinstance(sampler, torch.utils.data.Sampler) or hasattr(sampler, "generator"):
        raise Skip(f"the order that {type(sampler).__name__} draws is not known ahead")
    with kept(held_generators(sampler), held_objects(sampler)):
        drawn = list(itertools.islice(_own_copy(sampler), 2 * total))  # one may never end
    if not drawn or not all(isinstance(i, (int, np.integer)) for i in drawn[:100]):
        raise Skip(f"{type(sampler).__name__} does not draw single rows")
    return np.asarray(drawn, dtype=np.int64)


def _own_copy(sampler: Any) -> Any:
    """A copy that may shuffle its numbers in place; what it draws from, it shares."""
    twin = copy.copy(sampler)
    for name, value in list(vars(twin).items()):
        if isinstance(value, (list, dict, set, np.ndarray)):
            setattr(twin, name, copy.copy(value))
        elif isinstance(value, torch.Tensor):
            setattr(twin, name, value.clone())
    return twin


def _labels(subject: Subject, chosen: npt.NDArray[np.int64]) -> list[Any]:
    import datasets

    dataset = subject.rows("train").dataset
    if isinstance(dataset, datasets.Dataset):
        column = next((name for name in LABELS if name in dataset.column_names), None)
        if column is None:
            raise Skip("the training data has no label column")
        return list(dataset.with_format(None).select(chosen)[column])
    return [_label_of(dataset[int(i)]) for i in chosen]


def _label_of(row: Any) -> Any:
    value: Any = None
    if isinstance(row, Mapping):
        value = next((row[name] for name in LABELS if name in row), None)
    elif isinstance(row, (tuple, list)) and len(row) > 1:
        value = row[-1]
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def _classes(labels: Sequence[Any]) -> npt.NDArray[np.int64]:
    """Labels as numbers of classes; a number with many values by its quantile."""
    if not all(isinstance(label, (int, float, str, np.generic)) for label in labels):
        raise Skip("the labels are not one number or name a row")
    values = np.asarray(labels)
    distinct, classes = np.unique(values, return_inverse=True)
    if values.dtype.kind == "f" and len(distinct) > 20:
        edges = np.quantile(values, np.linspace(0, 1, BINS + 1)[1:-1])
        classes = np.searchsorted(edges, values)
    return np.asarray(classes, dtype=np.int64)


def _mean_entropy(classes: npt.NDArray[np.int64]) -> float:
    """The mean over rows of (windows, rows) of the entropy of their classes, in nats."""
    total = 0.0
    for window in classes:
        share = np.unique(window, return_counts=True)[1] / len(window)
        total -= float((share * np.log(share)).sum())
    return total / len(classes)


def ordered_examples(
    drawn: DrawnOrder,
    *,
    fraction: Annotated[
        float, "of the entropy of shuffled windows: half the labels of a window say nothing new"
    ] = 0.5,
) -> Iterate[Fault]:
    """Windows that hold far fewer different labels than shuffled ones would.

    Batches that a sampler composes of few classes, all of which come round, are meant so: metric
    learning needs several rows of a class at a time. They are a note.
    """
    if drawn.shuffles or drawn.classes < 2 or not drawn.shuffled > 0.1 * math.log(2):
        return
    if not drawn.entropy < fraction * drawn.shuffled:
        return
    yield Fault(
        f"rows are drawn in the order of their labels: {drawn.rows} rows in a row have "
        f"{drawn.entropy:.2f} nats of label entropy, {drawn.shuffled:.2f} when shuffled "
        f"({drawn.sampler})",
        subject="order",
        severity="note" if drawn.composed else None,
        evidence={
            "seen": f"{drawn.entropy:.2f} nats",
            "expected": f"{drawn.shuffled:.2f} nats",
            "windows": drawn.windows,
        },
    )


ORDER = Probe("look at the drawing order", "static", (DrawnOrder,), measure_order, ("trainer",))

ORDERED_EXAMPLES = Check(
    name="ordered-examples",
    stage="data",
    severity="warning",
    moments=("static",),
    why="Batches of one class pull the model to that class, and the next ones pull it back.",
    fix="train_dataset = train_dataset.shuffle(seed=42)  # or leave the sampler at random",
    source="Bottou 2012, Stochastic Gradient Descent Tricks; trainlint TL014 (2025)",
    unsure="Time series that must be read in order. Streams are not looked at.",
    judges=(ordered_examples,),
    explains=("input-ignored", "loss-not-decreasing", "loss-spike", "order-repeats"),
)
