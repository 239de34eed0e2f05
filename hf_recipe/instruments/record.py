"""The recorder: what every step really was, kept on the device and read out together.

On an accelerator losses and norms stay tensors until a flush, which reads them with one copy and,
on several processes, averages them with one collective. Flushes fall on fixed step numbers, so
that all ranks flush together and a step never waits for the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from math import isfinite
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

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


def flushes_after(step: int) -> int:
    """The next step after `step` that `flushes_at` names."""
    if step < 8:
        return next(early for early in (1, 2, 4, 8) if early > step)
    every = FLUSH_EVERY if step < EARLY else 32 if step < LATE else 64
    return (step // every + 1) * every


Rows = tuple[int, ...]
Scalar = Tensor | float  # on an accelerator it still lies there
# step, losses of its micro-batches, norm, learning rate, rows, seconds, of them waiting
_Done = tuple[int, list[Scalar], Scalar | None, float, list[Rows], float, float]


@dataclass
class Recorder:
    """Collects one run's steps; none ends while `active` is False.

    What runs at every step is written to touch few objects: after a step of the model the caches
    are cold, and each new object that is looked at costs more than what is done with it.

    Attributes:
        micro_batches: losses of the current step's micro-batches so far: numbers on a CPU, where
            nobody waits for them; elsewhere tensors.
        closely: whether the step that runs is looked at by others too, not recorded alone.
        finite: whether every loss since the last flush was, as far as a CPU alone can tell.
        drawn: rows of the batches that were handed out and have not run, where they are known.
        rows: of the current step's micro-batches so far.
        attends: the next step of which there is more to do than to keep it.
        norm: of the current step's gradient; like the losses.
        began: when the current step began, in seconds of `perf_counter`.
        curves: bounded series of loss, learning rate and gradient norm by step.
    """

    active: bool = True
    closely: bool = True
    finite: bool = True
    micro_batches: list[Scalar] = field(default_factory=list)
    norm: Scalar | None = None
    drawn: list[Rows] = field(default_factory=list)
    rows: list[Rows] = field(default_factory=list)
    attends: int = 0
    began: float = 0.0
    waiting: float = 0.0
    learning_rate: float = math.nan
    last_step: int = 0
    curves: dict[str, Series] = field(default_factory=dict)
    _done: list[_Done] = field(default_factory=list)

    def add(self, loss: Tensor) -> bool:
        """Take in a micro-batch's loss; the rows it is of are the oldest in `drawn`.

        Returns:
            False: the loss is not finite, as far as a CPU alone can tell.
        """
        drawn = self.drawn
        self.rows.append(drawn.pop(0) if drawn else ())
        if not loss.is_cpu:
            self.micro_batches.append(loss)
            return True
        value = loss.item()
        self.micro_batches.append(value)
        if isfinite(value):
            return True
        self.finite = False
        return False

    def take_norm(self, norm: Scalar | None) -> None:
        """The gradient is complete: its norm before clipping, where somebody measured it."""
        if type(norm) is Tensor and norm.is_cpu:
            norm = norm.item()
        self.norm = norm

    def take_rate(self, optimizer: Any) -> None:
        """The optimizer, or Accelerate's around it, has stepped: at the rate of its first group."""
        groups = getattr(getattr(optimizer, "optimizer", optimizer), "param_groups", None)
        rate = groups[0]["lr"] if groups else math.nan
        self.learning_rate = rate if type(rate) is float else float(rate)

    def end_step(self, step: int) -> bool:
        """Close the current optimizer step; its numbers wait for the next flush.

        Returns:
            Whether that was all: it is no step to attend to, and every loss was finite.
        """
        if not self.active:
            return True
        self.last_step = step
        losses = self.micro_batches
        if losses:
            waiting = self.waiting
            seconds = perf_counter() - self.began + waiting
            self._done.append(
                (step, losses, self.norm, self.learning_rate, self.rows, seconds, waiting)
            )
            self.micro_batches, self.rows = [], []
        self.norm, self.waiting = None, 0.0
        return self.finite and step < self.attends and not self.closely

    def flush(self, factor: Callable[[int], float]) -> tuple[Step, ...]:
        """Read out the finished steps, averaged over ranks.

        Args:
            factor: micro-batches of a step -> what the sum of their losses is divided by to give
                the mean loss in the model's own unit.
        """
        done, self._done, self.finite = self._done, [], True
        if not done:
            return ()
        numbers, held, seen, rates, parts, seconds, waiting = zip(*done, strict=True)
        read = read_out([*chain.from_iterable(held), *seen])
        norms = [None if s is None else n for s, n in zip(seen, read[-len(done) :], strict=True)]
        if all(len(losses) == 1 for losses in held):  # at once: most runs accumulate nothing
            unit = factor(1)
            means = [loss / unit for loss in read[: len(done)]]
            micro: list[tuple[float, ...]] = list(zip(means, strict=True))
            rows = [each[0] for each in parts]
        else:
            micro = list(_in_unit(held, iter(read), factor))
            means = [sum(losses) / len(losses) for losses in micro]
            rows = [tuple(chain.from_iterable(each)) for each in parts]
        for name, values in (("loss", means), ("learning rate", rates), ("gradient norm", norms)):
            self._draw(name, numbers, values)
        columns = (numbers, means, rates, norms, micro, rows, seconds, waiting)
        return tuple(map(Step._make, zip(*columns, strict=True)))

    def _draw(self, name: str, steps: Sequence[int], values: Sequence[float | None]) -> None:
        points = [(x, y) for x, y in zip(steps, values, strict=True) if y is not None]
        points = [point for point in points if isfinite(point[1])]
        if points:
            self.curves.setdefault(name, Series()).extend(*zip(*points, strict=True))

    def stop(self) -> None:
        """Record nothing more until `start`."""
        self.active, self.closely = False, True
        self.drop()

    def start(self) -> None:
        """Record from here on; what passed since `stop` is no step's."""
        self.active, self.attends = True, 0
        self.drop()

    def drop(self) -> None:
        """Forget what has not been flushed: a step that was not finished, an earlier attempt."""
        self.micro_batches, self.rows, self._done = [], [], []
        self.norm, self.waiting, self.finite = None, 0.0, True


def _in_unit(
    held: Sequence[list[Scalar]], read: Iterator[float], factor: Callable[[int], float]
) -> Iterator[tuple[float, ...]]:
    """Each step's losses, as they were read, in the model's own unit."""
    units = {count: factor(count) / count for count in {len(losses) for losses in held}}
    for losses in held:
        unit = units[len(losses)]
        yield tuple([loss / unit for loss in islice(read, len(losses))])


def read_out(values: Sequence[Scalar | None]) -> list[float]:
    """Scalars as numbers, averaged over ranks; None as 0. One copy and one collective for all."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    device = next((each.device for each in tensors if not each.is_cpu), None)
    if device is None:
        read = iter(_numbers(tensors))
        numbers = [next(read) if isinstance(v, Tensor) else v or 0.0 for v in values]
        return numbers if world_size() == 1 else mean_over_ranks(torch.tensor(numbers)).tolist()
    scalars = [value for value in values if type(value) is Tensor and not value.ndim]
    if len(scalars) < len(values) or any(value.device != device for value in scalars):
        scalars = [_scalar(value, device) for value in values]
    return mean_over_ranks(torch.stack(scalars).detach().float()).tolist()


def _numbers(tensors: list[Tensor]) -> list[float]:
    """One number of each tensor on a CPU; at once where they are plain scalars."""
    if {type(tensor) for tensor in tensors} == {Tensor}:
        with suppress(RuntimeError):  # of several shapes
            return torch.stack(tensors).detach().reshape(-1).tolist()
    return [whole(tensor).item() for tensor in tensors]


def _scalar(value: Scalar | None, device: torch.device) -> Tensor:
    if not isinstance(value, Tensor):
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
