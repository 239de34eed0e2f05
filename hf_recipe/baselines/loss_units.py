"""In which unit the Trainer counts the loss.

What ``training_step`` returns is no mean: depending on the model's signature it is divided by the
number of labels in all micro-batches, or by the number of micro-batches, or by neither, and it may
be multiplied by the number of processes. Before anybody judges a loss, it is brought back to the
mean over its rows; by what it must be divided is measured here, on one small batch.

The measurement is exact and needs no second batch: a batch repeated k times has the mean loss of
the batch. So one batch's loss is taken as the first of k equal micro-batches, as the Trainer would
(its count of items, its division), and k times that is compared with the batch alone. This holds
for every loss, also for one that compares rows with each other.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from hf_recipe.core.check import Measurement, Probe, Skip
from hf_recipe.instruments.batches import Batch
from hf_recipe.instruments.overrides import overrides, replaces
from hf_recipe.instruments.quiet import restore_random_state, save_random_state
from hf_recipe.instruments.subject import Subject

PROBED_ROWS = 4  # the scaling does not depend on how many rows there are


@dataclass(frozen=True)
class LossUnit(Measurement):
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


def evaluation_factor(unit: LossUnit | None) -> float:
    """By what an evaluation batch's loss must be divided to be the mean loss of its rows."""
    return 1.0 if unit is None else unit.ratio


# ---------------------------------------------------------------- the probe


def measure_loss_unit(subject: Subject) -> Iterator[LossUnit]:
    """Yield the `LossUnit` of a few rows, in evaluation mode."""
    require_stock_steps(subject.trainer)
    subject.model.eval()  # no dropout, fixed statistics: only the scaling is left to differ
    size = min(PROBED_ROWS, int(subject.args.per_device_train_batch_size))
    batch = subject.batch(size=size)
    yield _unit(EmulatedStep(subject), batch)


def require_stock_steps(trainer: Any) -> None:
    """Raise Skip where this module's idea of a training step would be another one."""
    if trainer is None:
        raise Skip("without the Trainer its own scaling of the loss cannot be seen")
    for name in ("training_step", "get_batch_samples"):
        if replaces(trainer, name):
            raise Skip(f"{name} is replaced, so how it scales the loss is not known")
    if trainer.is_deepspeed_enabled:
        raise Skip("DeepSpeed scales the loss in its own engine")
    if trainer.args.n_gpu > 1:
        raise Skip("DataParallel averages over its own replicas")


class EmulatedStep:
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
                loss: Any = trainer.compute_loss(
                    self.subject.model, dict(batch.inputs), num_items_in_batch=items
                )
        finally:
            args.gradient_accumulation_steps = kept
        mean: torch.Tensor = loss[0] if isinstance(loss, tuple) else loss
        return mean

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


def _unit(step: EmulatedStep, batch: Batch) -> LossUnit:
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


def _factors(step: EmulatedStep, batch: Batch) -> tuple[float, float | None]:
    """Loss, and gradient norm, of k equal micro-batches over those of one."""
    parameters = [p for p in step.subject.model.parameters() if p.requires_grad]
    losses, norms = [], []
    for micro_batches in (1, step.accumulation):
        loss = step.of_equal_micro_batches(batch, micro_batches)
        losses.append(float(loss.detach()))
        if loss.requires_grad:
            torch.autograd.backward(loss)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0)
        for parameter in parameters:
            parameter.grad = None
    gradient_factor = norms[1] / norms[0] if norms[0] else None
    return (losses[1] / losses[0] if losses[0] else math.nan), gradient_factor


def _own_loss_ratio(step: EmulatedStep, batch: Batch, mean: float) -> float | None:
    """The run's mean loss over the loss that the model itself put into its outputs."""
    if not overrides(step.trainer, "compute_loss"):
        return None
    restore_random_state(step.random_state)
    with torch.no_grad(), step.trainer.compute_loss_context_manager():
        outputs = step.subject.model(**batch.inputs)
    own = outputs.get("loss") if isinstance(outputs, dict) else None
    return mean / float(own) if own is not None and float(own) else None


MEASURE_LOSS_UNIT = Probe(
    name="measure the loss's unit",
    moment="probe",
    measures=(LossUnit,),
    take=measure_loss_unit,
    needs=("unsharded",),
)
