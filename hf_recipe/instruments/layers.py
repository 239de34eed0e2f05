"""Numbers by layer on a few steps of a run: gradient, weight, update, and what rounding took.

Where parameters are sharded (DTensor), each process sums over its own shards and one collective
adds them up: a reduction of a DTensor read with ``.item()`` would silently be the local one.
A step that is looked at costs two copies of at most 65,536 elements and one read-out; which steps
are looked at depends on the step's number alone, so that all processes do the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hf_recipe.core.check import Measurement

ELEMENTS = 65_536
TENSORS = 128
EARLY = frozenset((2, 5, 10, 20, 50, 100, 200))
EVERY, SHARE = 512, 0.01  # on a 3 ms step late looks take a seventh of that share
OFTENEST = 10
KEPT = 3  # samples in a measurement


def interval_of(overhead: float) -> int:
    """Steps between two late looks, by the share of a step's time that they may use.

    It rests on no clock: so all ranks look together, and a run is watched alike each time.
    """
    return max(OFTENEST, round(EVERY * SHARE / overhead))


def looks_at(step: int, every: int = EVERY) -> bool:
    """Steps 2, 5, 10, 20, 50, 100, 200 and each `every`-th: dense while all changes, then rare."""
    return step in EARLY or (step > 0 and step % every == 0)


def looks_after(step: int, every: int = EVERY) -> int:
    """The next step after `step` that `looks_at` names."""
    return min((step // every + 1) * every, *(early for early in (*EARLY, 2**62) if early > step))


@dataclass(frozen=True)
class LayerNumbers:
    """One parameter in one step; of its sampled elements those that a gradient reached.

    Attributes:
        name, dtype, dims: of the parameter.
        rate, peak: its group's learning rate in this step, and that of its schedule's peak.
        sampled, reached: elements looked at, and those with a gradient other than zero.
        gradient, weight, update: root mean squares over the reached ones; the gradient before
            clipping.
        still: reached elements that the step did not change.
        coarse: reached elements whose precision is too coarse for twice the rate (under SGD:
            for ten times the rate's share of their gradient).
        coarse_moved: those of them that moved all the same (rounding at random, compensation).
    """

    name: str
    dtype: str
    dims: int
    rate: float
    peak: float
    sampled: int
    reached: int
    gradient: float
    weight: float
    update: float
    still: int
    coarse: int
    coarse_moved: int


@dataclass(frozen=True)
class LayerSample:
    """One step.

    Attributes:
        step: its number.
        loss: the last one read out by then, NaN where there is none.
        norm: of the whole gradient before clipping, as the Trainer saw it; NaN: it did not.
        layers: parameters that a gradient reached; none where the optimizer saw no gradient.
        kept: how far the weights of the sample before had got since, over that sample's own
            update: about 1 or more, and next to 0 where somebody writes them back; None: no sample.
    """

    step: int
    loss: float
    norm: float
    layers: tuple[LayerNumbers, ...]
    kept: float | None = None


@dataclass(frozen=True)
class LayerSamples(Measurement):
    """The latest samples of a run, at most three.

    Attributes:
        first_loss: of the run.
        planned: optimizer steps of the whole run; 0 where unknown.
        adam: whether the optimizer is of Adam's kind: its update is about the rate in size.
        epsilon: what it adds to a gradient's size; 0 where it has none.
        samples: in order.
    """

    first_loss: float
    planned: int
    adam: bool
    epsilon: float
    samples: tuple[LayerSample, ...]


def epsilon_of(optimizer: Any) -> float:
    """What an optimizer that divides by the gradient's size adds to it; 0 where it has none."""
    found = optimizer.param_groups[0].get("eps", 0.0)
    return float(found) if isinstance(found, (int, float)) else 0.0


@dataclass
class _Held:
    name: str
    parameter: nn.Parameter
    start: int
    stride: int
    rate: float
    peak: float


@dataclass
class LayerWatch:
    """Takes samples; `before` and `after` bracket an optimizer step."""

    count: int = 0
    samples: list[LayerSample] = field(default_factory=list)
    _held: list[_Held] = field(default_factory=list)
    _empty: bool = False
    _sizes: list[int] = field(default_factory=list)
    _plain: bool = False  # gradient descent: the rate alone does not tell a step's size
    _gradients: torch.Tensor | None = None
    _weights: torch.Tensor | None = None
    _last: tuple[list[_Held], torch.Tensor, float] | None = None  # weights, and their update's norm
    _kept: float | None = None

    @torch.no_grad()
    def before(self, model: nn.Module, optimizer: Any) -> None:
        """Copy gradients and weights of the sampled elements; call it right before the update."""
        self._kept = self._since_last()
        inner = getattr(optimizer, "optimizer", optimizer)
        named = list(model.named_parameters())
        bare = all(p.grad is None for _, p in named)
        self._empty = bare and not _steps_in_backward(model, inner)
        self._plain = "sgd" in type(inner).__name__.lower()
        groups = {id(p): g for g in optimizer.param_groups for p in g["params"]}
        reached = [
            (n, p)
            for n, p in named
            if id(p) in groups and p.grad is not None and not p.grad.is_sparse and p.numel()
        ]
        chosen = reached[:: -(-len(reached) // TENSORS)] if reached else []
        share = max(16, ELEMENTS // max(len(chosen), 1))
        self._held = []
        for name, parameter in chosen:
            stride = -(-parameter.numel() // share)
            group = groups[id(parameter)]
            rate = float(group["lr"])
            peak = float(group.get("initial_lr", rate))
            self._held.append(
                _Held(name, parameter, self.count % stride, stride, rate, max(peak, rate))
            )
        self.count += 1
        if self._held:
            parts = [_part(h, h.parameter.grad) for h in self._held]
            self._gradients, self._sizes = torch.cat(parts), [len(part) for part in parts]
            self._weights = torch.cat([_part(h, h.parameter) for h in self._held])

    @torch.no_grad()
    def after(self, step: int, loss: float, norm: float, clipped_to: float) -> LayerSample | None:
        """The sample; call it right after the update.

        Args:
            step: the step that was taken.
            loss, norm: see `LayerSample`.
            clipped_to: share of the gradient that clipping left.
        """
        if self._empty:
            return self._keep(LayerSample(step, loss, norm, (), self._kept))
        if self._gradients is None or self._weights is None:
            return None
        now = torch.cat([_part(h, h.parameter) for h in self._held])
        rows = self._sums(now)
        layers = []
        for held, row in zip(self._held, rows, strict=True):
            sampled, reached, still, coarse, coarse_moved, gradient, weight, update = row
            count = max(reached, 1.0)
            layers.append(
                LayerNumbers(
                    name=held.name,
                    dtype=str(held.parameter.dtype).removeprefix("torch."),
                    dims=held.parameter.dim(),
                    rate=held.rate,
                    peak=held.peak,
                    sampled=int(sampled),
                    reached=int(reached),
                    gradient=(gradient / count) ** 0.5 / clipped_to,
                    weight=(weight / count) ** 0.5,
                    update=(update / count) ** 0.5,
                    still=int(still),
                    coarse=int(coarse),
                    coarse_moved=int(coarse_moved),
                )
            )
        size = math.sqrt(sum(row[-1] for row in rows))
        if size > 0 and not any(is_sharded(h.parameter) for h in self._held):
            self._last = (self._held, self._weights, size)
        self._gradients = self._weights = None
        return self._keep(LayerSample(step, loss, norm, tuple(layers), self._kept))

    def _since_last(self) -> float | None:
        """How far the weights looked at last time have got, over their update then."""
        last, self._last = self._last, None
        if last is None:
            return None
        held, weights, size = last
        return float((torch.cat([_part(h, h.parameter) for h in held]) - weights).norm()) / size

    def _keep(self, sample: LayerSample) -> LayerSample:
        self.samples = [*self.samples, sample][-KEPT:]
        return sample

    def _sums(self, now: torch.Tensor) -> list[list[float]]:
        """Eight sums for each tensor, read out together; few operations, each of which costs."""
        assert self._gradients is not None
        assert self._weights is not None
        device = now.device
        sizes = torch.tensor(self._sizes, device=device)
        owner = torch.repeat_interleave(sizes)
        # The spacing of a number w is at least eps * |w| / 2, and half of that rounds away.
        limits = torch.tensor(
            [8 * h.rate / torch.finfo(h.parameter.dtype).eps for h in self._held],
            device=device,
            dtype=torch.float32,
        )[owner]
        if self._plain:  # a step is the rate times the gradient, and momentum makes ten of it
            limits = limits * 5 * self._gradients.abs()
        update = now - self._weights
        reached = self._gradients != 0
        still = reached & (update == 0)
        coarse = reached & (self._weights.abs() > limits)
        values = torch.stack([self._gradients, self._weights, update])
        squares = torch.where(reached, values, 0.0).double().square_()
        flags = torch.stack([reached, still, coarse, coarse & ~still])
        parts = torch.cat([flags.double(), squares])
        sums = torch.zeros(len(parts), len(sizes), dtype=torch.float64, device=device)
        sums = torch.cat([sizes[None].double(), sums.index_add_(1, owner, parts)])
        spread = [is_sharded(h.parameter) for h in self._held]
        if any(spread):
            if dist.get_rank():  # what every process holds whole is counted once
                sums[:, torch.tensor([not each for each in spread], device=device)] = 0
            dist.all_reduce(sums)
        return sums.T.tolist()


def _steps_in_backward(model: nn.Module, optimizer: Any) -> bool:
    """Whether weights move while gradients are taken, which are then gone before the step."""
    hooked = any(getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())
    return hooked or "lomo" in type(optimizer).__name__.lower()


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this process holds a part of it alone (FSDP's DTensor)."""
    return hasattr(tensor, "to_local")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A reduced value as all processes have it; a collective where it is a DTensor."""
    found: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found


def _part(held: _Held, tensor: torch.Tensor | None) -> torch.Tensor:
    """The sampled elements, of this process's shard where there are several; in no_grad."""
    assert tensor is not None
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    flat = local.reshape(-1)
    return (flat[held.start :: held.stride] if held.stride > 1 else flat).float()
