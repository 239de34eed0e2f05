"""The recorder: what every step really was, kept on the device and read out together.

Losses and norms stay tensors until a flush, which reads them with one copy and, on several
processes, averages them with one collective. Flushes fall on fixed step numbers, so that all
ranks flush together and a step never waits for the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from hf_recipe.core.exhibit import Series
from hf_recipe.instruments.distributed import mean_over_ranks, world_size
from hf_recipe.instruments.layers import whole
from hf_recipe.instruments.window import Step

FLUSH_EVERY, EARLY, LATE = 16, 128, 512


def flushes_at(step: int) -> bool:
    """Steps 1, 2, 4, 8, every 16th up to 128, every 32nd up to 512, then every 64th.

    Early faults are named early, late ones within a hundred steps, and flushes cost little.
    """
    if step % FLUSH_EVERY:
        return step in (1, 2, 4, 8)
    return step % (FLUSH_EVERY if step <= EARLY else 32 if step <= LATE else 64) == 0


class _Done(NamedTuple):
    """A finished step; on an accelerator its losses and its norm still lie there."""

    step: int
    losses: list[torch.Tensor | float]
    norm: torch.Tensor | float | None
    learning_rate: float
    rows: list[int]
    seconds: float
    waiting: float


@dataclass
class Recorder:
    """Collects one run's steps. `active` False makes every method return at once.

    Attributes:
        micro_batches: losses of the current step's micro-batches so far: numbers on a CPU, where
            nobody waits for them; elsewhere tensors.
        curves: bounded series of loss, learning rate and gradient norm by step.
    """

    active: bool = True
    micro_batches: list[torch.Tensor | float] = field(default_factory=list)
    norm: torch.Tensor | float | None = None
    rows: list[int] = field(default_factory=list)
    waiting: float = 0.0
    learning_rate: float = math.nan
    last_step: int = 0
    curves: dict[str, Series] = field(default_factory=dict)
    _done: list[_Done] = field(default_factory=list)
    _finite: bool = True

    def add(self, loss: torch.Tensor) -> bool:
        """Take in a micro-batch's loss. False: it is not finite, as far as a CPU alone can tell."""
        if not loss.is_cpu:
            self.micro_batches.append(loss)
            return True
        value = loss.item()
        self.micro_batches.append(value)
        if math.isfinite(value):
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
            held = (self.micro_batches, self.norm, self.learning_rate, self.rows)
            self._done.append(_Done(step, *held, seconds + self.waiting, self.waiting))
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
        done, self._done = self._done, []
        if not done:
            return ()
        losses = read_out([loss for item in done for loss in item.losses] + [i.norm for i in done])
        norms = losses[-len(done) :]
        scales = {count: factor(count) for count in {len(item.losses) for item in done}}
        steps, place = [], 0
        for item, norm in zip(done, norms, strict=True):
            count = len(item.losses)
            unit = scales[count] / count
            micro = [loss / unit for loss in losses[place : place + count]]
            place += count
            steps.append(
                Step(
                    item.step,
                    sum(micro) / count,
                    item.learning_rate,
                    None if item.norm is None else norm,
                    tuple(micro),
                    tuple(item.rows),
                    item.seconds,
                    item.waiting,
                )
            )
        self._draw(steps)
        return tuple(steps)

    def _draw(self, steps: list[Step]) -> None:
        for name, values in (
            ("loss", [(step.step, step.loss) for step in steps]),
            ("learning rate", [(step.step, step.learning_rate) for step in steps]),
            ("gradient norm", [(s.step, s.grad_norm) for s in steps if s.grad_norm is not None]),
        ):
            points = [point for point in values if math.isfinite(point[1])]
            if points:
                self.curves.setdefault(name, Series()).extend(points)

    def drop(self) -> None:
        """Forget what has not been flushed: a step that was not finished, an earlier attempt."""
        self._next_step()
        self._done = []


def read_out(values: Sequence[torch.Tensor | float | None]) -> list[float]:
    """Scalars as numbers, averaged over ranks; None as 0. One copy and one collective for all."""
    devices = {value.device for value in values if isinstance(value, torch.Tensor)}
    device = next((each for each in devices if each.type != "cpu"), None)
    if device is None:
        numbers = [whole(v).item() if isinstance(v, torch.Tensor) else v or 0.0 for v in values]
        return numbers if world_size() == 1 else mean_over_ranks(torch.tensor(numbers)).tolist()
    scalars = [value for value in values if type(value) is torch.Tensor and not value.ndim]
    if len(devices) > 1 or len(scalars) < len(values):
        scalars = [_scalar(value, device) for value in values]
    return mean_over_ranks(torch.stack(scalars).detach().float()).tolist()


def _scalar(value: torch.Tensor | float | None, device: torch.device) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        return torch.tensor(value or 0.0, device=device)
    return whole(value).detach().float().to(device).reshape(())


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
