"""The recorder: what every step really was, kept on the device and read out together.

Losses and norms stay tensors until a flush, which reads them with one copy and, on several
processes, averages them with one collective. Flushes fall on fixed step numbers, so that all
ranks flush together and a step never waits for the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_recipe.core.exhibit import Series
from hf_recipe.instruments.distributed import mean_over_ranks, world_size
from hf_recipe.instruments.window import Step

FLUSH_EVERY, EARLY, LATE = 16, 128, 512


def flushes_at(step: int) -> bool:
    """Steps 1, 2, 4, 8, every 16th up to 128, every 32nd up to 512, then every 64th.

    Early faults are named early, late ones within a hundred steps, and flushes cost little.
    """
    if step % FLUSH_EVERY:
        return step in (1, 2, 4, 8)
    return step % (FLUSH_EVERY if step <= EARLY else 32 if step <= LATE else 64) == 0


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
    _finite: bool = True

    def add(self, loss: torch.Tensor) -> bool:
        """Take in a micro-batch's loss. False: it is not finite.

        It is read on a CPU alone, where nobody waits for it; elsewhere the next flush will tell.
        """
        self.micro_batches.append(loss)
        if not loss.is_cpu or math.isfinite(loss.item()):
            return True
        self._finite = False
        return False

    def end_step(self, step: int, seconds: float) -> bool:
        """Close the current optimizer step; its numbers wait for the next flush.

        Returns:
            What `add` said of its micro-batches.
        """
        self.last_step = step
        finite = self._finite
        if self.micro_batches:
            held = (self.micro_batches, self.norm, self.learning_rate, tuple(self.rows))
            self._pending.append(_Pending(step, *held, seconds + self.waiting, self.waiting))
        self._next_step()
        return finite

    def _next_step(self) -> None:
        self.micro_batches, self.norm, self.rows, self.waiting = [], None, [], 0.0
        self._finite = True

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
        flat = [loss for item in pending for loss in item.micro]
        stacked = torch.cat([_stack(flat, device), _stack([i.norm for i in pending], device)])
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
        self._next_step()
        self._pending = []


def _stack(values: Sequence[torch.Tensor | float | None], device: torch.device) -> torch.Tensor:
    """One float32 vector of scalars; the usual ones, plain tensors, in one operation."""
    plain = [value for value in values if type(value) is torch.Tensor and value.device == device]
    if len(plain) < len(values):
        plain = [_as_tensor(value, device) for value in values]
    return torch.stack(plain).detach().float().flatten()


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
