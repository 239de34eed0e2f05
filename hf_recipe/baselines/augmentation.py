"""Does the same row come out the same twice?

The recipe leaves augmentation off until the model overfits. Whatever draws at random on the way
from row to batch shows when the same rows are read and collated twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hf_recipe.core.check import Check, Located, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.batches import Batch, Rows, stream_reason
from hf_recipe.instruments.subject import Subject

ROWS = 4
IMAGES = ("pixel_values", "image", "images", "pixels")


@dataclass(frozen=True)
class Redrawn(Measurement):
    """The same rows, read and collated twice.

    Attributes:
        split: whose rows.
        rows: how many.
        differing: batch columns that differ.
        masking: whether the difference is that of masked-token training: labels at the few
            positions that were masked.
        training: whether they are training rows.
    """

    split: str
    rows: int
    differing: tuple[str, ...]
    masking: bool
    training: bool


def measure_redrawn(subject: Subject) -> Iterator[Located]:
    """Collate a few rows of every split twice."""
    sets = [subject.train] if subject.train is not None else []
    sets += list(subject.evaluation.values())
    readable = [
        rows
        for rows in sets
        if not stream_reason(rows) and len(rows) and not subject.overridden(rows.name)
    ]
    if not readable:
        raise Skip("there are no rows that can be read ahead")
    for rows in readable:
        yield Located(_redraw(rows, rows is subject.train), rows.name)


def _redraw(rows: Rows, training: bool) -> Redrawn:
    chosen = rows.evenly_spaced(ROWS)
    first, second = rows.batch(chosen), rows.batch(chosen)
    differing = tuple(
        name for name, value in first.inputs.items() if not _same(value, second.inputs.get(name))
    )
    masking = bool(differing) and set(differing) <= {"input_ids", "labels"} and _masked(first)
    return Redrawn(rows.name, len(chosen), differing, masking, training)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return set(a) == set(b) and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and (not isinstance(a, (str, int, float, bool)) or bool(a == b))


def _masked(batch: Batch) -> bool:
    """Whether labels stand at some positions of a sequence only, as masking sets them."""
    labels, ids = batch.labels, batch.inputs.get("input_ids")
    if not isinstance(labels, torch.Tensor) or not isinstance(ids, torch.Tensor):
        return False
    return labels.shape == ids.shape and bool((labels == -100).any())


def augmentation_on(drawn: Redrawn) -> Iterator[Fault]:
    """Something draws at random; a warning where evaluation's own pictures are drawn."""
    if not drawn.differing:
        return
    names = ", ".join(drawn.differing[:5])
    if drawn.masking:
        message = (
            f"{drawn.split} rows are masked anew each time ({names}): losses vary with the draw"
        )
    else:
        message = f"the same {drawn.rows} {drawn.split} rows come out differently twice ({names})"
    pictures = not drawn.training and any(name in IMAGES for name in drawn.differing)
    if pictures:
        message += ": evaluation goes through a random transform"
    yield Fault(
        message,
        subject=drawn.differing[0],
        severity="warning" if pictures else None,
        evidence={"seen": f"{names} differ", "expected": "the same twice"},
    )


REDRAW = Probe("draw rows twice", "batch", (Redrawn,), measure_redrawn)

AUGMENTATION_ON = Check(
    name="augmentation-on",
    stage="baselines",
    severity="note",
    moments=("batch",),
    why="Augmentation regularizes: the recipe adds it last, and never to what is evaluated.",
    fix="dataset.set_transform(to_tensor_only)  # until the model overfits",
    source="Karpathy, A Recipe for Training Neural Networks (2019)",
    unsure="Noise that belongs to the task, as in masking or diffusion.",
    judges=(augmentation_on,),
)
