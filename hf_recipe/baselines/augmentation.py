"""Does the same row come out the same twice?

The recipe leaves augmentation off until the model overfits. Whatever draws at random on the way
from row to batch shows when the same rows are read and collated twice; where workers read them, as
a worker would too, since a data set may vary its rows there alone. No worker is started.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data._utils import worker as torch_worker

from hf_recipe.core.check import Check, Located, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.batches import Batch, Rows, stream_reason
from hf_recipe.instruments.subject import Subject

ROWS = 4
BASELINE = "baselines_stage"  # key of a subject's cache, set where augmentation is meant to be off
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
        in_workers: whether they differ only where a worker reads them.
        baseline: whether augmentation is meant to be off: at the main job's baselines.
    """

    split: str
    rows: int
    differing: tuple[str, ...]
    masking: bool
    training: bool
    in_workers: bool = False
    baseline: bool = False


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
    workers = int(getattr(subject.args, "dataloader_num_workers", 0) or 0)
    for rows in readable:
        drawn = _redraw(rows, rows is subject.train, workers)
        yield Located(replace(drawn, baseline=BASELINE in subject.cache), rows.name)


def _redraw(rows: Rows, training: bool, workers: int) -> Redrawn:
    chosen = rows.evenly_spaced(ROWS)
    first, differing = _twice(rows, chosen)
    in_workers = False
    if workers and not differing:
        with _as_worker(rows.read, workers):
            first, differing = _twice(rows, chosen)
        in_workers = bool(differing)
    masking = bool(differing) and set(differing) <= {"input_ids", "labels"} and _masked(first)
    return Redrawn(rows.name, len(chosen), differing, masking, training, in_workers)


def _twice(rows: Rows, chosen: list[int]) -> tuple[Batch, tuple[str, ...]]:
    first, second = rows.batch(chosen), rows.batch(chosen)
    differing = tuple(
        name for name, value in first.inputs.items() if not _same(value, second.inputs.get(name))
    )
    return first, differing


@contextmanager
def _as_worker(dataset: Any, workers: int) -> Iterator[None]:
    """What is read inside believes itself in a worker (``torch.utils.data.get_worker_info()``)."""
    kept = torch_worker._worker_info
    torch_worker._worker_info = torch_worker.WorkerInfo(
        id=0, num_workers=workers, seed=torch.initial_seed(), dataset=dataset
    )
    try:
        yield
    finally:
        torch_worker._worker_info = kept


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
    if drawn.in_workers:
        message += ", where a worker reads them"
    yield Fault(
        message,
        subject=drawn.differing[0],
        severity="warning" if pictures or (drawn.baseline and not drawn.masking) else None,
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
