"""What monitors get: the host numbers of one flush, the same on all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from typing import NamedTuple

from hf_recipe.instruments.subject import Plan


class Step(NamedTuple):
    """One optimizer step, as it really was.

    Attributes:
        step: its number, from 1.
        loss: mean over its micro-batches and all ranks, in the unit of the model's own mean loss
            (accumulation, world size and other scalings divided out), before the Trainer's NaN
            filter and before any logging; may be NaN or infinite.
        learning_rate: the rate this step was taken with (first parameter group).
        grad_norm: norm of the gradient before clipping, in the run's own scale; None: not seen.
        micro_losses: each micro-batch's loss on rank 0, in the same unit.
        rows: data set rows of this step over all ranks, where they are known.
        seconds: wall time of the step, without logging, evaluation and saving.
        waiting: part of it spent waiting for data.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float | None = None
    micro_losses: tuple[float, ...] = ()
    rows: tuple[int, ...] = ()
    seconds: float = 0.0
    waiting: float = 0.0


@dataclass(frozen=True)
class Evaluation:
    """One pass over an evaluation set.

    Attributes:
        step: optimizer steps done when it ran.
        split: the evaluation set's name.
        row_losses: the loss of each row in the set's order, where it could be had; may hold NaN.
        batch_losses: the loss of each evaluation batch, as `prediction_step` returned it.
        metrics: what the Trainer reported, names as in its log.
    """

    step: int
    split: str
    row_losses: tuple[float, ...] = ()
    batch_losses: tuple[float, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Window:
    """The numbers of one flush: some steps, or one evaluation, or the end of training.

    Attributes:
        steps: finished optimizer steps since the last flush, in order.
        evaluation: set when this flush is an evaluation (then `steps` is empty).
        plan: the run as planned; None where unknown.
        ended: the last window of a run.
    """

    steps: tuple[Step, ...] = ()
    evaluation: Evaluation | None = None
    plan: Plan | None = None
    ended: bool = False

    @cached_property
    def finite(self) -> tuple[Step, ...]:
        """The steps whose loss is finite."""
        return tuple([step for step in self.steps if isfinite(step.loss)])

    @cached_property
    def losses(self) -> list[float]:
        """The losses that are finite."""
        return [step.loss for step in self.finite]

    @cached_property
    def rates(self) -> list[float]:
        """The learning rates that are finite."""
        return [step.learning_rate for step in self.steps if isfinite(step.learning_rate)]
