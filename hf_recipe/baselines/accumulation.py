"""Does splitting a batch change the loss or the gradient?

The same rows must give the same loss and the same gradient, whether they come as one batch, as k
micro-batches or on W processes. The Trainer (5.x) takes it on trust that a model whose forward has
``**kwargs`` divides by ``num_items_in_batch``; where it does not, nobody divides, and loss and
gradient come out k (and W) times too large. With Adam and clipping the run still learns, so no
curve shows it. A milder form divides each micro-batch by its own labels, so that a label weighs
more the fewer others its micro-batch holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch

from hf_recipe.baselines.loss_units import EmulatedStep, LossUnit, require_stock_steps
from hf_recipe.baselines.step_gradient import never_divided
from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault, Severity
from hf_recipe.instruments.batches import Batch
from hf_recipe.instruments.subject import Subject


@dataclass(frozen=True)
class MicroBatchMeans(Measurement):
    """A per-token mean taken in each micro-batch apart, next to the mean over all tokens.

    Attributes:
        whole: loss of all probed rows in one batch.
        parts: loss of each part of these rows.
        part_items: supervised labels of each part.
        micro_items: supervised labels in micro-batches of the run's own size.
    """

    whole: float
    parts: tuple[float, ...]
    part_items: tuple[int, ...]
    micro_items: tuple[int, ...]


# ---------------------------------------------------------------- the probe


def measure_micro_batch_means(subject: Subject) -> Iterator[MicroBatchMeans]:
    """Yield one batch's loss, whole and in two parts, where the Trainer divides by their number."""
    require_stock_steps(subject.trainer)
    subject.model.eval()
    step = EmulatedStep(subject)
    if step.accumulation < 2:
        raise Skip("nothing is accumulated")
    batch = subject.batch()
    if not step.divides(step.count(batch, 1)):
        raise Skip("the loss is counted over all micro-batches, not averaged in each")
    means = _micro_batch_means(step, batch)
    if means is None:
        raise Skip("labels are not counted by position here")
    yield means


def _micro_batch_means(step: EmulatedStep, batch: Batch) -> MicroBatchMeans | None:
    """The probed rows as one batch and as two; None where labels are not counted by position."""
    labels, size = batch.labels, len(batch)
    if size < 2 or not isinstance(labels, torch.Tensor) or labels.ndim < 2:
        return None
    if labels.is_floating_point() or not _leads_with_rows(batch, size):
        return None
    order = torch.argsort((labels != -100).flatten(1).sum(1), stable=True).tolist()
    parts = [batch.take(order[: size // 2]), batch.take(order[size // 2 :])]
    with torch.no_grad():
        whole, *losses = (float(step.mean(part)) for part in (batch, *parts))
    return MicroBatchMeans(
        whole=whole,
        parts=tuple(losses),
        part_items=tuple(supervised(part) for part in parts),
        micro_items=tuple(_micro_items(step.subject, step.accumulation)),
    )


def _micro_items(subject: Subject, accumulation: int) -> list[int]:
    size = int(subject.args.per_device_train_batch_size)
    batches = subject.batches("train", rows=size * min(accumulation, 8))
    return [supervised(batch) for batch in batches]


def supervised(batch: Batch) -> int:
    """Labels that count in the loss: those that are not -100."""
    return int((batch.labels != -100).sum())


def _leads_with_rows(batch: Batch, size: int) -> bool:
    tensors = [v for v in batch.inputs.values() if isinstance(v, torch.Tensor) and v.ndim]
    return all(tensor.shape[0] == size for tensor in tensors)


MEASURE_MICRO_BATCH_MEANS = Probe(
    name="average micro-batches apart",
    moment="probe",
    measures=(MicroBatchMeans,),
    take=measure_micro_batch_means,
    needs=("unsharded",),
)


# ---------------------------------------------------------------- the check


def scaled_by_splitting(
    unit: LossUnit,
    *,
    tolerance: Annotated[
        float,
        "equal micro-batches repeat one forward, so a right scaling agrees to rounding; 5 % leaves "
        "room for small auxiliary terms (MoE routers) that no model divides",
    ] = 0.05,
) -> Iterator[Fault]:
    """The same rows give another loss when split over micro-batches or processes."""
    k, world = unit.accumulation, unit.world_size
    if k > 1 and not abs(unit.accumulation_factor - 1.0) <= tolerance:
        yield _accumulation_fault(unit)
    if world < 2:
        return
    if unit.honoured < 0.5 and abs(unit.ratio / world - 1.0) <= tolerance:
        yield Fault(
            f"loss and gradient are multiplied by the {world} processes and never divided: "
            f"{unit.ratio:.3g} times the mean loss",
            subject="processes",
            evidence={"seen": f"x{unit.ratio:.3g}", "expected": "x1", "world_size": world},
            fix=_fix(unit),
        )
    elif unit.own_loss_ratio is not None and (
        abs(unit.own_loss_ratio * world - 1.0) <= 1e-3
        or abs(unit.own_loss_ratio / world - 1.0) <= 1e-3
    ):
        yield Fault(
            f"compute_loss returns {unit.own_loss_ratio:.4g} times the model's own loss on "
            f"{world} processes, whose gradients are averaged already",
            subject="processes",
            evidence={"seen": f"x{unit.own_loss_ratio:.4g}", "expected": "x1", "world_size": world},
            fix="return loss  # neither divided nor multiplied by the number of processes",
        )


def _accumulation_fault(unit: LossUnit) -> Fault:
    k, factor = unit.accumulation, unit.accumulation_factor
    gradient = (
        f", the gradient x{unit.gradient_factor:.3g}" if unit.gradient_factor is not None else ""
    )
    severity: Severity = "error"
    if 1.0 < factor < math.sqrt(k):  # a part of the loss only, such as an auxiliary term
        severity = "note" if factor < 1.25 else "warning"
    return Fault(
        f"the same rows split over {k} accumulation steps give a loss x{factor:.3g}{gradient}",
        subject="accumulation",
        severity=severity,
        evidence={
            "seen": f"x{factor:.4g}",
            "expected": "x1",
            "accumulation": k,
            "loss_factor": factor,
            "gradient_factor": unit.gradient_factor,
            "share_divided_by_items": unit.honoured,
        },
        fix=_fix(unit),
    )


def _fix(unit: LossUnit) -> str:
    if unit.computed_by == "compute_loss_func":
        return 'loss = F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch'
    if unit.accumulation_factor < 1.0:
        return "trainer.loss_is_scaled_for_ga = True"
    return "trainer.model_accepts_loss_kwargs = False"


def weighted_by_micro_batch(
    means: MicroBatchMeans,
    *,
    rounding: Annotated[
        float, "relative; the same numbers added in another order, with room for half precision"
    ] = 0.01,
    weight: Annotated[
        float,
        "a token of the shortest micro-batch weighs twice one of the longest: as if its learning "
        "rate were doubled; our choice",
    ] = 2.0,
) -> Iterator[Fault]:
    """A mean per micro-batch weighs a label by how few others its micro-batch holds."""
    items, total = means.part_items, sum(means.part_items)
    if not total or min(items) == 0 or min(means.micro_items, default=0) == 0:
        return
    by_item = sum(m * n for m, n in zip(means.parts, items, strict=True)) / total
    scale = max(abs(means.whole), 1e-12)
    if not abs(by_item - means.whole) <= rounding * scale:
        return  # not a mean over labels, so there is no such weight
    spread = max(means.micro_items) / min(means.micro_items)
    if spread <= 1.0 + rounding:
        return
    yield Fault(
        f"each micro-batch is averaged apart: a label weighs up to {spread:.2g} times another, "
        f"since micro-batches hold {min(means.micro_items)} to {max(means.micro_items)} labels",
        subject="labels",
        severity="warning" if spread >= weight else "note",
        evidence={
            "seen": f"weights x{spread:.2g}",
            "expected": "x1",
            "micro_items": means.micro_items,
        },
        fix='loss = F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch',
    )


LOSS_SCALED_BY_ACCUMULATION = Check(
    name="loss-scaled-by-accumulation",
    stage="baselines",
    severity="error",
    moments=("probe", "run"),
    why="Loss and gradient then grow with the split, not with the rows: rates, clipping and "
    "curves no longer compare between machines.",
    fix="trainer.model_accepts_loss_kwargs = False",
    source="transformers issues 34191 (2024) and 46731 (2026); Karpathy (2019)",
    unsure="An auxiliary term that the model never divides is reported as a note or warning. A "
    "mean per micro-batch over labels of unequal number was the custom for years.",
    judges=(scaled_by_splitting, weighted_by_micro_batch, never_divided),
    explains=("clipping-dominates",),
)
