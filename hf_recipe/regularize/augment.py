"""Augmentation: "the next best thing to real data is half-fake data".

Changes are made to the collated batch, so that they work with any data set, and to training
batches alone: `Augmentation` is a callback that lays them over the training dataloader's own
collator when training begins. Evaluation, and every probe of the recipe, reads the rows as they
are.

    trainer.add_callback(hf_recipe.Augmentation(Move(shift=0.08), Noise(0.05)))

A change must keep the label. `label_kept` asks a trained model whether it does: a digit that was
flipped, or a sentence without its verb, is another row.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import nn
from transformers import TrainerCallback

from hf_recipe.core.check import Measurement
from hf_recipe.core.exhibit import Cell, Exhibit, Picture, Table
from hf_recipe.data.preview import is_image, png
from hf_recipe.instruments.row_losses import logits_of

logger = logging.getLogger(__name__)

Values = dict[str, Any]
LABELS = ("labels", "label", "label_ids")
GOLDEN = 0x9E3779B97F4A7C15  # spreads ranks over the seeds


class Change(Protocol):
    """One way to vary a batch: a copy of `batch` with new tensors, drawn from `draw`."""

    def __call__(self, batch: Values, draw: torch.Generator) -> Values: ...


def stronger(change: Any, factor: float) -> Any:
    """The same change at `factor` times its strength: its shares, angles and spreads."""
    values = {f.name: getattr(change, f.name) for f in fields(change)}
    return replace(change, **{k: v * factor for k, v in values.items() if type(v) is float})


class Augmented:
    """A collator that varies what another one has collated.

    Every batch draws its seed from torch's global generator, which dataloaders seed anew for each
    worker and epoch and which the Trainer restores on a resume; the rank is mixed in, since all
    ranks begin with the same one.

    Args:
        collate: list of rows -> dict of tensors.
        changes: made in this order.
        rank: of this process.
    """

    def __init__(
        self,
        collate: Callable[[Any], Mapping[str, Any]],
        changes: Sequence[Change],
        rank: int = 0,
    ) -> None:
        self.collate, self.changes, self.rank = collate, tuple(changes), rank

    def __call__(self, rows: Any) -> Values:
        batch = dict(self.collate(rows))
        seed = int(torch.randint(2**62, ())) ^ (GOLDEN * self.rank) % 2**62
        draw = torch.Generator().manual_seed(seed)
        for change in self.changes:
            batch = change(batch, draw)
        return batch


class Augmentation(TrainerCallback):  # type: ignore[misc]
    """Varies the training batches of a Trainer, and nothing else.

    Args:
        changes: such as `augment_images.Move` or `augment_rows.TokenDropout`, in this order.

    Raises:
        ValueError: no change was given.
    """

    def __init__(self, *changes: Change) -> None:
        if not changes:
            raise ValueError("Augmentation needs one change or more, e.g. Augmentation(Noise(0.1))")
        self.changes = changes
        self._restore: Callable[[], None] = lambda: None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Lay the changes over the training dataloader's collator."""
        loader = kwargs.get("train_dataloader")
        base: Any = getattr(loader, "base_dataloader", loader)  # under Accelerate's wrapper
        collate = getattr(base, "collate_fn", None)
        if collate is None:
            logger.warning(
                "augmentation is off: the training dataloader (%s) has no collate_fn; "
                "wrap its collator in hf_recipe.Augmented",
                type(base).__name__,
            )
            return
        base.collate_fn = Augmented(collate, self.changes, int(args.process_index))

        def restore() -> None:
            base.collate_fn = collate

        self._restore = restore

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the dataloader as it was."""
        self._restore()
        self._restore = lambda: None


# ---------------------------------------------------------------- what changes are made of


def uniform(
    draw: torch.Generator, *shape: int, low: float = -1.0, high: float = 1.0
) -> torch.Tensor:
    """Uniform numbers of this shape, on the CPU."""
    return low + (high - low) * torch.rand(shape, generator=draw)


def labels_of(batch: Values) -> tuple[str, torch.Tensor] | None:
    """Name and tensor of the labels, or None."""
    for name in LABELS:
        if isinstance(batch.get(name), torch.Tensor):
            return name, batch[name]
    return None


def per_row_labels(batch: Values, what: str) -> tuple[str, torch.Tensor] | None:
    """The labels, one for each row (or a vector of floats).

    Raises:
        ValueError: each row has many: what moves or mixes rows would leave them behind.
    """
    found = labels_of(batch)
    if found is None:
        return None
    name, labels = found
    vectors = labels.ndim == 2 and labels.is_floating_point()
    if labels.ndim > 1 and labels.shape[-1] != 1 and not vectors:
        raise ValueError(
            f"{what} needs one label per row; {name} has shape {tuple(labels.shape)}: the labels "
            "inside a row would no longer fit it"
        )
    return name, labels


def inputs_of(batch: Values) -> dict[str, torch.Tensor]:
    """Float tensors that lead with rows and are not labels: pixels, features."""
    return {
        name: value
        for name, value in batch.items()
        if isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.ndim >= 2
        and name not in LABELS
        and "mask" not in name
    }


def need(condition: bool, message: str) -> None:
    """Raise ValueError with `message` unless `condition`."""
    if not condition:
        raise ValueError(message)


# ---------------------------------------------------------------- does the label survive?


@dataclass(frozen=True)
class LabelKept(Measurement):
    """What a trained model makes of rows before and after the changes.

    Attributes:
        rows: labelled rows that were asked.
        before, after: share that it gets right, in 0..1.
        error: standard error of their paired difference.
    """

    rows: int
    before: float
    after: float
    error: float

    @property
    def verdict(self) -> bool | None:
        """False: the changes destroy labels; True: they do not, by 5 points or more; else None."""
        fall, reach = self.before - self.after, 2 * max(self.error, 0.5 / max(1, self.rows))
        if fall - reach > 0.05:
            return False
        return True if fall + reach < 0.05 else None


def label_kept(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    *changes: Change,
    seed: int = 0,
) -> LabelKept:
    """Ask a trained `model` whether `changes` keep the labels of collated, labelled `batches`.

    A model that was trained without them will lose a little to any change; one that loses more
    than 5 points sees other labels, or has never seen such rows: look at the preview.

    Raises:
        ValueError: no class label per row, or no logits.
    """
    draw = torch.Generator().manual_seed(seed)
    hits: list[list[torch.Tensor]] = [[], []]
    mode = model.training
    model.eval()
    try:
        for batch in batches:
            changed: Values = dict(batch)
            found = labels_of(changed)
            need(
                found is not None and not found[1].is_floating_point() and found[1].ndim == 1,
                "label_kept needs one class label per row",
            )
            assert found is not None
            for change in changes:
                changed = change(changed, draw)
            for side, inputs in enumerate((batch, changed)):
                with torch.no_grad():
                    logits = logits_of(model(**inputs))
                if logits is None:
                    raise ValueError(f"{type(model).__name__} returns no logits")
                hits[side].append((logits.argmax(-1).cpu() == found[1].cpu()).double())
    finally:
        model.train(mode)
    before, after = (torch.cat(side) for side in hits)
    error = float((before - after).std()) / math.sqrt(len(before)) if len(before) > 1 else math.nan
    return LabelKept(len(before), float(before.mean()), float(after.mean()), error)


# ---------------------------------------------------------------- what it looks like


def preview(
    batch: Mapping[str, Any],
    *changes: Change,
    processing_class: Any = None,
    rows: int = 8,
    seed: int = 0,
) -> tuple[Exhibit, ...]:
    """The same rows before and after, as pictures or tables; they show the user's rows.

    Args:
        batch: collated rows.
        processing_class: decodes tokens, where it can.
    """
    small = {k: v[:rows] if isinstance(v, torch.Tensor) and v.ndim else v for k, v in batch.items()}
    changed: Values = dict(small)
    draw = torch.Generator().manual_seed(seed)
    for change in changes:
        changed = change(changed, draw)
    names = ", ".join(type(change).__name__ for change in changes)
    exhibits: list[Exhibit] = []
    for name, old in small.items():
        new = changed.get(name)
        if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
            continue
        if name in LABELS or torch.equal(old, new):
            continue
        title = f"{name} before and after {names}"
        if is_image(old):
            exhibits.append(_pictures(title, old, new))
        elif name == "input_ids":
            exhibits.append(_texts(title, old, new, processing_class))
        elif old.is_floating_point() and old.ndim == 2:
            exhibits.append(_numbers(title, old, new))
    return tuple(exhibits)


def _pictures(title: str, old: torch.Tensor, new: torch.Tensor) -> Picture:
    low, high = float(old.min()), float(old.max())
    pngs, labels = [], []
    for i, (before, after) in enumerate(zip(old, new, strict=True)):
        for text, image in ((f"{i}", before), (f"{i}, changed", after)):
            pngs.append(png((image.float() - low) / max(high - low, 1e-12)))
            labels.append(text)
    return Picture(title, "regularize", tuple(pngs), tuple(labels))


def _texts(title: str, old: torch.Tensor, new: torch.Tensor, processing_class: Any) -> Table:
    def text(ids: torch.Tensor) -> str:
        if hasattr(processing_class, "decode"):
            return str(processing_class.decode(ids.tolist()))[:500]
        return " ".join(map(str, ids.tolist()))[:500]

    cells = tuple((i, text(a), text(b)) for i, (a, b) in enumerate(zip(old, new, strict=True)))
    return Table(title, "regularize", ("row", "before", "after"), cells, private=True)


def _numbers(title: str, old: torch.Tensor, new: torch.Tensor, columns: int = 8) -> Table:
    cells: tuple[tuple[Cell, ...], ...] = tuple(
        (i, side, *(round(float(v), 4) for v in values[:columns]))
        for i, (a, b) in enumerate(zip(old, new, strict=True))
        for side, values in (("before", a), ("after", b))
    )
    head = ("row", "", *(str(k) for k in range(min(columns, old.shape[1]))))
    return Table(title, "regularize", head, cells, private=True)


@contextmanager
def augmented(trainer: Any, *changes: Change) -> Iterator[Augmentation]:
    """`Augmentation` on a Trainer for the trainings inside the block."""
    callback = Augmentation(*changes)
    trainer.add_callback(callback)
    try:
        yield callback
    finally:
        trainer.remove_callback(callback)
