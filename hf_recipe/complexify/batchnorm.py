"""How many rows does BatchNorm average over on one device?

Its statistics are those of one device's micro-batch; gradient accumulation does not help. Over
fewer than eight rows they are too noisy to train by, and differ from those of evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_recipe.core.check import Check, Measurement, Probe
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.subject import Subject


@dataclass(frozen=True)
class BatchNormRows(Measurement):
    """BatchNorm layers that use a batch's own statistics, and the rows they average over.

    Attributes:
        layers: BatchNorm layers whose weights train (or that have none).
        rows: rows of a micro-batch on one device; over all of them where the layers synchronise.
        synchronised: whether every layer averages over the processes.
        accumulation: ``gradient_accumulation_steps``.
        first: name of the first layer.
    """

    layers: int
    rows: int
    synchronised: bool
    accumulation: int
    first: str = ""


def measure_rows(subject: Subject) -> Iterator[BatchNormRows]:
    """Count the layers, and read the batch size."""
    found = {
        name: module
        for name, module in subject.model.named_modules()
        if isinstance(module, _BatchNorm) and _trains(module)
    }
    synchronised = all(isinstance(m, nn.SyncBatchNorm) for m in found.values())
    rows = int(subject.args.per_device_train_batch_size)
    if subject.train is not None and len(subject.train):
        rows = min(rows, len(subject.train))
    yield BatchNormRows(
        layers=len(found),
        rows=rows * (int(subject.args.world_size) if synchronised else 1),
        synchronised=synchronised,
        accumulation=int(subject.args.gradient_accumulation_steps),
        first=next(iter(found), ""),
    )


def _trains(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return not own or any(p.requires_grad for p in own)


def small_batch(
    norm: BatchNormRows,
    *,
    rows: Annotated[int, "Wu and He 2018, figure 1: error rises from 8 rows a device down"] = 8,
) -> Iterator[Fault]:
    """Fewer rows than BatchNorm can work with."""
    if not norm.layers or norm.rows >= rows:
        return
    more = (
        f"; accumulating over {norm.accumulation} micro-batches does not help"
        if norm.accumulation > 1
        else ""
    )
    yield Fault(
        f"{norm.layers} BatchNorm layers average over {norm.rows} rows of a micro-batch{more}",
        subject="batch size",
        evidence={"seen": f"{norm.rows} rows", "expected": f"at least {rows}"},
    )


ROWS = Probe("count BatchNorm's rows", "static", (BatchNormRows,), measure_rows)

BATCHNORM_SMALL_BATCH = Check(
    name="batchnorm-small-batch",
    stage="complexify",
    severity="warning",
    moments=("static",),
    why="BatchNorm's statistics come from one device's micro-batch: over a few rows they are "
    "noise, and evaluation uses others.",
    fix="per_device_train_batch_size=16  # or GroupNorm, SyncBatchNorm, frozen statistics",
    source="Wu and He, Group Normalization, 2018 (arXiv:1803.08494)",
    unsure="Layers kept in evaluation mode by an override of train(), which is not seen here.",
    judges=(small_batch,),
)
