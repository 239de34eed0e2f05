"""The unit of the run's losses: what a Trainer's numbers are divided by to mean nats per item."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from hf_recipe.baselines.loss_units import (
    LossUnit,
    evaluation_factor,
    measure_loss_unit,
    step_factor,
)
from hf_recipe.core.check import Skip
from hf_recipe.examiner import Examiner
from hf_recipe.instruments.distributed import from_rank_0, world_size
from hf_recipe.instruments.subject import Subject


class Units:
    """Measured once per run, by a forward pass over a few rows; until then losses come as is."""

    def __init__(self) -> None:
        self.unit: LossUnit | None = None
        self._for: Any = None

    def measure(
        self,
        examiner: Examiner,
        subject: Subject,
        guard: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Take the unit that a probe has measured for this run, or measure it now."""
        known = examiner.latest.get(LossUnit.kind())
        if isinstance(known, LossUnit) and known.world_size == world_size():
            self.unit = known
            return
        if self.unit is not None and self._for is subject.model:
            return
        self._for = subject.model
        take = measure_loss_unit if subject.trainer is not None else _of_the_model
        found = None
        try:
            with guard():
                found = next(iter(take(subject)), None)
        except (Skip, RuntimeError, TypeError, ValueError, KeyError, IndexError):
            found = None  # a stream, or a model that fails by itself in a moment
        self.unit = from_rank_0(found)

    def step(self, micro_batches: int) -> float:
        """Divisor for the sum over a step's micro-batches."""
        return step_factor(self.unit, micro_batches, world_size()) or 1.0

    def evaluation(self) -> float:
        """Divisor for one evaluation batch's loss."""
        return evaluation_factor(self.unit) or 1.0


def _of_the_model(subject: Subject) -> list[LossUnit]:
    """What the model's own loss, as a hook hears it, is next to the mean of its batch.

    The Trainer tells a model that takes keyword arguments how many items all micro-batches hold;
    a model that divides by that count returns shares that add up to the mean, others return means.
    """
    model, world = subject.model, world_size()
    model.eval()
    batch = subject.batch(size=4)
    labels = batch.labels
    if not isinstance(labels, torch.Tensor):
        return []
    told = getattr(model, "accepts_loss_kwargs", None) is not False
    count = labels.ne(-100).sum()
    with torch.no_grad():
        mean = float(subject.compute_loss(batch.inputs))
        values = []
        for items in (count, 2 * count):
            try:
                inputs = {**batch.inputs, "num_items_in_batch": items}
                values.append(float(subject.compute_loss(inputs)) if told else mean)
            except TypeError:  # its forward takes no keyword arguments
                values.append(mean)
    if not mean or not values[0]:
        return []
    honoured = min(max(2.0 * (1.0 - values[1] / values[0]), 0.0), 1.0)
    ratio = values[0] / mean / (world if honoured > 0.5 else 1)
    accumulation = int(subject.args.gradient_accumulation_steps)
    return [
        LossUnit(
            mean_loss=mean,
            ratio=ratio,
            honoured=honoured,
            divided=False,
            accumulation=accumulation,
            world_size=world,
        )
    ]
