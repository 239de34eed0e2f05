"""In which unit the Trainer counts the loss, and whether splitting a batch changes it.

"Complexify only one at a time": the same rows must give the same loss and the same gradient,
whether they come as one batch, as k micro-batches or on W processes. The Trainer (5.x) takes it on
trust that a model whose forward has ``**kwargs`` divides by ``num_items_in_batch``; where it does
not, nobody divides, and loss and gradient come out k (and W) times too large. With Adam and
clipping the run still learns, so no curve shows it.

The test is exact and needs no second batch: a batch repeated k times has the mean loss of the
batch. So one batch's loss is taken as the first of k equal micro-batches, as the Trainer would
(its count of items, its division), and k times that is compared with the batch alone. This holds
for every loss, also for one that compares rows with each other.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch

from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault, Severity
from hf_recipe.instruments.batches import Batch
from hf_recipe.instruments.overrides import overrides, replaces
from hf_recipe.instruments.quiet import restore_random_state, save_random_state
from hf_recipe.instruments.subject import Subject


@dataclass(frozen=True)
class LossUnit:
    """What one call of ``training_step`` returns, next to the mean loss of its batch.

    Attributes:
        mean_loss: loss of the probed batch alone, no count of items passed, in nats (or the
            loss's own unit).
        ratio: what ``compute_loss`` gives when told the batch's own count of items, over
            `mean_loss`: 1; (L-1)/L where the count includes a position that the loss shifts
            away; the number of processes where the Trainer multiplies and the loss never divides.
        honoured: share of the loss that falls as 1/count when the count grows, 0 to 1.
        divided: whether ``training_step`` divides by the number of micro-batches.
        accumulation, world_size: micro-batches per step, processes.
        accumulation_factor: loss of `accumulation` equal micro-batches over that of one; 1.
        gradient_factor: the same for the gradient's norm; None where it was not taken.
        own_loss_ratio: `mean_loss` over the loss in the model's outputs; None where there is none.
        computed_by: "model", "compute_loss" (overridden) or "compute_loss_func".
    """

    mean_loss: float
    ratio: float
    honoured: float
    divided: bool
    accumulation: int
    world_size: int
    accumulation_factor: float = 1.0
    gradient_factor: float | None = None
    own_loss_ratio: float | None = None
    accepts_loss_kwargs: bool = False
    average_tokens_across_devices: bool = True
    computed_by: str = "model"


@dataclass(frozen=True)
class MicroBatchMeans:
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


def step_factor(unit: LossUnit | None, micro_batches: int, world_size: int) -> float:
    """By what a step's loss must be divided to be the mean loss of its rows.

    A step's loss is the sum over its micro-batches of what ``training_step`` returned, averaged
    over the processes. 1.0 where the unit is not known.

    Raises:
        ValueError: `unit` was measured with another number of processes.
    """
    if unit is None:
        return 1.0
    if world_size != unit.world_size:
        raise ValueError(
            f"this loss unit holds for {unit.world_size} processes; got {world_size}: measure again"
        )
    undivided = unit.honoured + (1.0 - unit.honoured) * micro_batches
    return unit.ratio * undivided / (micro_batches if unit.divided else 1)


# ---------------------------------------------------------------- the probe


def measure_loss_unit(subject: Subject) -> Iterator[Measurement]:
    """Yield the `LossUnit`, and `MicroBatchMeans` where micro-batches are averaged apart."""
    trainer = subject.trainer
    if trainer is None:
        raise Skip("without the Trainer its own scaling of the loss cannot be seen")
    _require_stock_steps(trainer)
    subject.model.eval()  # no dropout, fixed statistics: only the scaling is left to differ
    size = min(PROBED_ROWS, int(subject.args.per_device_train_batch_size))
    batch = subject.batch(size=size)
    step = _Step(subject)
    unit = _unit(step, batch)
    yield unit
    if unit.accumulation > 1 and unit.divided and unit.honoured < 0.5:
        means = _micro_batch_means(step, batch)
        if means is not None:
            yield means


def _require_stock_steps(trainer: Any) -> None:
    for name in ("training_step", "get_batch_samples"):
        if replaces(trainer, name):
            raise Skip(f"{name} is replaced, so how it scales the loss is not known")
    if trainer.is_deepspeed_enabled:
        raise Skip("DeepSpeed scales the loss in its own engine")
    if trainer.args.n_gpu > 1:
        raise Skip("DataParallel averages over its own replicas")


class _Step:
    """What the Trainer's ``training_step`` does with a loss, without the step.

    Args:
        subject: with a trainer whose training loop is the stock one.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject, self.trainer = subject, subject.trainer
        self.accumulation = int(self.trainer.args.gradient_accumulation_steps)
        self.world = int(self.trainer.accelerator.num_processes)
        self.random_state = save_random_state()

    def count(self, batch: Batch, copies: int) -> Any:
        """Items in `copies` of the batch over all processes, as the Trainer counts them."""
        with local_count(self.trainer.args) as averaged:
            items = self.trainer._get_num_items_in_batch(
                [batch.inputs] * copies, self.subject.device
            )
        return items * self.world if averaged and items is not None else items

    def loss(self, batch: Batch, items: Any, accumulation: int) -> torch.Tensor:
        """``compute_loss`` of the run that accumulates `accumulation` micro-batches."""
        restore_random_state(self.random_state)
        args, trainer = self.trainer.args, self.trainer
        kept = args.gradient_accumulation_steps
        args.gradient_accumulation_steps = accumulation
        try:
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(
                    self.subject.model, dict(batch.inputs), num_items_in_batch=items
                )
        finally:
            args.gradient_accumulation_steps = kept
        return loss[0] if isinstance(loss, tuple) else loss

    def divides(self, items: Any) -> bool:
        """Whether ``training_step`` divides by the number of micro-batches."""
        declared = self.trainer.loss_is_scaled_for_ga
        if declared is not None:
            return not declared
        counted = self.trainer.model_accepts_loss_kwargs and items is not None
        return not (counted or self.trainer.compute_loss_func is not None)

    def of_equal_micro_batches(self, batch: Batch, micro_batches: int) -> torch.Tensor:
        """Sum of what `micro_batches` copies of the batch return."""
        items = self.count(batch, micro_batches)
        loss = self.loss(batch, items, micro_batches) * micro_batches
        return loss / micro_batches if self.divides(items) else loss

    def mean(self, batch: Batch) -> torch.Tensor:
        """The batch's mean loss; a loss that cannot do without its count is given it."""
        try:
            return self.loss(batch, None, 1)
        except TypeError:
            return self.loss(batch, self.count(batch, 1), 1)


@contextlib.contextmanager
def local_count(args: Any) -> Iterator[bool]:
    """Count items without asking the other processes; yields whether the run would ask them."""
    kept = bool(args.average_tokens_across_devices)
    args.average_tokens_across_devices = False
    try:
        yield kept
    finally:
        args.average_tokens_across_devices = kept


def _unit(step: _Step, batch: Batch) -> LossUnit:
    trainer, k = step.trainer, step.accumulation
    one, two = step.count(batch, 1), step.count(batch, 2)
    with torch.no_grad():
        mean = float(step.mean(batch))
        with_one = float(step.loss(batch, one, k))
        with_two = float(step.loss(batch, two, k)) if one is not None else with_one
    if not math.isfinite(mean) or mean == 0 or not with_one:
        raise Skip(f"the loss of the probed batch is {mean}: there is nothing to compare")
    loss_factor, gradient_factor = _factors(step, batch) if k > 1 else (1.0, None)
    return LossUnit(
        mean_loss=mean,
        ratio=with_one / mean,
        honoured=min(max(2.0 * (1.0 - with_two / with_one), 0.0), 1.0),
        divided=step.divides(one),
        accumulation=k,
        world_size=step.world,
        accumulation_factor=loss_factor,
        gradient_factor=gradient_factor,
        own_loss_ratio=_own_loss_ratio(step, batch, mean) if step.world > 1 else None,
        accepts_loss_kwargs=bool(trainer.model_accepts_loss_kwargs),
        average_tokens_across_devices=bool(trainer.args.average_tokens_across_devices),
        computed_by=_computed_by(trainer),
    )


def _computed_by(trainer: Any) -> str:
    if overrides(trainer, "compute_loss"):
        return "compute_loss"
    return "model" if trainer.compute_loss_func is None else "compute_loss_func"


def _factors(step: _Step, batch: Batch) -> tuple[float, float | None]:
    """Loss, and gradient norm, of k equal micro-batches over those of one."""
    parameters = [p for p in step.subject.model.parameters() if p.requires_grad]
    losses, norms = [], []
    for micro_batches in (1, step.accumulation):
        loss = step.of_equal_micro_batches(batch, micro_batches)
        losses.append(float(loss))
        if loss.requires_grad:
            loss.backward()
        gradients = [p.grad for p in parameters if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0)
        for parameter in parameters:
            parameter.grad = None
    gradient_factor = norms[1] / norms[0] if norms[0] else None
    return (losses[1] / losses[0] if losses[0] else math.nan), gradient_factor


def _own_loss_ratio(step: _Step, batch: Batch, mean: float) -> float | None:
    """The run's mean loss over the loss that the model itself put into its outputs."""
    if not overrides(step.trainer, "compute_loss"):
        return None
    restore_random_state(step.random_state)
    with torch.no_grad(), step.trainer.compute_loss_context_manager():
        outputs = step.subject.model(**batch.inputs)
    own = outputs.get("loss") if isinstance(outputs, dict) else None
    return mean / float(own) if own is not None and float(own) else None


def _micro_batch_means(step: _Step, batch: Batch) -> MicroBatchMeans | None:
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


MEASURE_LOSS_UNIT = Probe(
    name="measure the loss's unit",
    moment="probe",
    measures=(LossUnit, MicroBatchMeans),
    take=measure_loss_unit,
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
    moments=("probe",),
    why="Loss and gradient then grow with the split, not with the rows: rates, clipping and "
    "curves no longer compare between machines.",
    fix="trainer.model_accepts_loss_kwargs = False",
    source="transformers issues 34191 (2024) and 46731 (2026); Karpathy (2019)",
    unsure="An auxiliary term that the model never divides is reported as a note or warning. A "
    "mean per micro-batch over labels of unequal number was the custom for years.",
    judges=(scaled_by_splitting, weighted_by_micro_batch),
)

