"""The recorder: what every step really was, kept on the device and read out together.

Losses and norms stay tensors until a flush, which reads them with one copy and, on several
processes, averages them with one collective. Flushes fall on fixed step numbers, so that all
ranks flush together and a step never waits for the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_recipe.core.exhibit import Series
from hf_recipe.instruments.distributed import mean_over_ranks, world_size
from hf_recipe.instruments.window import Step

FLUSH_EVERY = 16


def flushes_at(step: int) -> bool:
    """Steps 1, 2, 4, 8 and every 16th: early faults are named early, later flushes cost little."""
    return step % FLUSH_EVERY == 0 or step in (1, 2, 4, 8)


@dataclass
class _Pending:
    """A finished step whose numbers still lie on the device."""

    step: int
    micro: list[torch.Tensor]
    norm: torch.Tensor | float | None
    learning_rate: float
    rows: tuple[int, ...]
    seconds: float
    waiting: float


@dataclass
class Recorder:
    """Collects one run's steps. `active` False makes every method return at once.

    Attributes:
        micro_batches: losses of the current step's micro-batches so far, on the device.
        curves: bounded series of loss, learning rate and gradient norm by step.
    """

    active: bool = True
    micro_batches: list[torch.Tensor] = field(default_factory=list)
    norm: torch.Tensor | float | None = None
    rows: list[int] = field(default_factory=list)
    waiting: float = 0.0
    learning_rate: float = math.nan
    last_step: int = 0
    curves: dict[str, Series] = field(default_factory=dict)
    _pending: list[_Pending] = field(default_factory=list)

    def end_step(self, step: int, seconds: float) -> None:
        """Close the current optimizer step; its numbers wait for the next flush."""
        self.last_step = step
        if self.micro_batches:
            self._pending.append(
                _Pending(
                    step=step,
                    micro=self.micro_batches,
                    norm=self.norm,
                    learning_rate=self.learning_rate,
                    rows=tuple(self.rows),
                    seconds=seconds + self.waiting,
                    waiting=self.waiting,
                )
            )
        self.micro_batches, self.norm, self.rows, self.waiting = [], None, [], 0.0

    def last_is_finite(self) -> bool:
        """Whether the last finished step's losses are finite; reads them: cheap on a CPU only."""
        return not self._pending or all(
            math.isfinite(float(loss)) for loss in self._pending[-1].micro
        )

    def flush(self, factor: Callable[[int], float]) -> tuple[Step, ...]:
        """Read out the finished steps, averaged over ranks.

        Args:
            factor: micro-batches of a step -> what the sum of their losses is divided by to give
                the mean loss in the model's own unit.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return ()
        device = pending[0].micro[0].device
        flat = [loss.detach().float().to(device) for item in pending for loss in item.micro]
        norms = [_as_tensor(item.norm, device) for item in pending]
        stacked = torch.stack([*flat, *norms])
        values = (mean_over_ranks(stacked) if world_size() > 1 else stacked).tolist()
        losses, grad_norms = values[: len(flat)], values[len(flat) :]
        steps, place = [], 0
        for item, norm in zip(pending, grad_norms, strict=True):
            count = len(item.micro)
            own = losses[place : place + count]
            place += count
            scale = factor(count)
            steps.append(
                Step(
                    step=item.step,
                    loss=sum(own) / scale,
                    learning_rate=item.learning_rate,
                    grad_norm=None if item.norm is None else norm,
                    micro_losses=tuple(value * count / scale for value in own),
                    rows=item.rows,
                    seconds=item.seconds,
                    waiting=item.waiting,
                )
            )
        self._draw(steps)
        return tuple(steps)

    def _draw(self, steps: list[Step]) -> None:
        for step in steps:
            for name, value in (
                ("loss", step.loss),
                ("learning rate", step.learning_rate),
                ("gradient norm", step.grad_norm),
            ):
                if value is not None and math.isfinite(value):
                    self.curves.setdefault(name, Series()).add(step.step, value)

    def drop(self) -> None:
        """Forget what has not been flushed: a step that was not finished, an earlier attempt."""
        self.micro_batches, self.norm, self.rows, self.waiting = [], None, [], 0.0
        self._pending = []


def _as_tensor(value: torch.Tensor | float | None, device: torch.device) -> torch.Tensor:
    if value is None:
        return torch.zeros((), device=device)
    if not isinstance(value, torch.Tensor):
        return torch.tensor(float(value), device=device)
    whole: torch.Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole.detach().float().to(device)


class RowRecorder(torch.utils.data.BatchSampler):
    """A batch sampler that remembers, in order, which rows it handed out.

    Everything else is passed through to the sampler it wraps, so that Accelerate finds the
    attributes (``sampler``, ``batch_sampler``, ``set_epoch``) that it looks for.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.drawn: list[tuple[int, ...]] = []

    def __iter__(self) -> Any:
        self.drawn.clear()
        for batch in self.inner:
            self.drawn.append(tuple(batch) if isinstance(batch, (list, tuple)) else ())
            yield batch

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def take(self) -> tuple[int, ...]:
        """The rows of the oldest batch not yet taken; empty where none is known."""
        return self.drawn.pop(0) if self.drawn else ()
