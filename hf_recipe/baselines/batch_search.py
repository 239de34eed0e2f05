"""The search behind `find_batch_size`: sizes tried on one device, and everything put back."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_recipe.baselines.batch_size import BatchSize
from hf_recipe.core.check import Skip
from hf_recipe.core.exhibit import Curve, Line, Mark
from hf_recipe.instruments.batches import Batch, Rows, stream_reason
from hf_recipe.instruments.distributed import from_all_ranks, world_size
from hf_recipe.instruments.fitting import NoRoom, knee, largest_fitting, noise_scale
from hf_recipe.instruments.memory import TensorBytes, free_bytes
from hf_recipe.instruments.row_lengths import longest_rows
from hf_recipe.instruments.spare_optimizer import spare_optimizer
from hf_recipe.instruments.subject import Subject

USABLE = 0.8  # share of what is free on a CPU: others use the machine too
ROUNDS = 5  # timings of each size; their median counts
LONGEST = 64  # rows that large batches repeat
GROUPS, MICRO = 20, 8  # large batches, and micro-batches in each, of the noise scale
MICRO_ROWS = 8


def find_batch_size(
    subject: Subject,
    *,
    memory: int | None = None,
    seconds: float = 60.0,
    noise: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[BatchSize | Curve]:
    """Find the largest micro-batch that fits and the knee of its speed; all is put back.

    Call it quietly; all processes call it.

    Args:
        subject: its optimizer's class and arguments are used, its state is not touched.
        memory: bytes that weights, optimizer and step may take together; default: what an
            accelerator gives, or 80 % of what is free on a CPU.
        seconds: to spend, about; larger sizes are then reckoned and not run.
        noise: whether to estimate the gradient noise scale too.
        clock: in seconds.

    Raises:
        Skip: rows cannot be read ahead, or there is no optimizer to make room for.
    """
    rows = subject.rows("train")
    reason = stream_reason(rows) or subject.overridden("train")
    if reason or not len(rows):
        raise Skip(reason or "there are no rows")
    chosen, length = longest_rows(rows, LONGEST)
    found, errors = None, ""
    with spare_optimizer(subject, moves=False) as optimizer:
        try:
            bench = _Bench(subject, rows, chosen, optimizer, memory, seconds, clock)
            found = replace(bench.search(), longest=length)
            if noise and found.largest >= 2:
                scale, low, high = _noise(subject, rows, found.largest)
                found = replace(found, noise_scale=scale, noise_low=low, noise_high=high)
        except Exception as error:  # one rank must not leave the others waiting
            if world_size() == 1:
                raise
            errors = f"{type(error).__name__}: {error}"
    agreed = _agree(found, errors)
    yield agreed
    if agreed.rates:
        yield _chart(agreed)


def _agree(found: BatchSize | None, error: str) -> BatchSize:
    """The smallest over ranks. A collective."""
    everyone = from_all_ranks((found, error))
    for _, text in everyone:
        if text:
            raise RuntimeError(f"the search failed on one process: {text}")
    kept = [f for f, _ in everyone if f is not None]
    least = min(kept, key=lambda f: f.largest)
    return replace(least, bounded=all(f.bounded for f in kept), processes=len(everyone))


class _Bench:
    """Tries sizes of micro-batches on one device."""

    def __init__(
        self,
        subject: Subject,
        rows: Rows,
        chosen: Sequence[int],
        optimizer: torch.optim.Optimizer,
        memory: int | None,
        seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self.subject, self.rows, self.chosen, self.optimizer = subject, rows, chosen, optimizer
        self.seconds, self.clock = seconds, clock
        self.on_cpu = subject.device.type == "cpu"
        self.peaks: dict[int, int] = {}
        self.spent = 0.0
        self.limit = max(1, len(rows) // world_size())
        subject.model.train()
        self.step(min(2, self.limit))  # gradients and the optimizer's state exist from here on
        self.held = _held(subject.model, optimizer)
        self.buckets = self._buckets()
        room = self.held + int(USABLE * free_bytes(subject.device)) if self.on_cpu else 0
        self.memory = memory or room

    def _buckets(self) -> torch.Tensor | None:
        """The room that DistributedDataParallel takes for its copy of the gradients."""
        if world_size() == 1 or self.on_cpu:
            return None
        trained = (p for p in self.subject.model.parameters() if p.requires_grad)
        size = sum(p.numel() * p.element_size() for p in trained)
        return torch.empty(size, dtype=torch.uint8, device=self.subject.device)

    def search(self) -> BatchSize:
        """The largest size and the speeds; `longest` and noise are filled in later."""
        args = self.subject.args
        largest = largest_fitting(self.attempt, limit=self.limit, start=2)
        current = int(args.per_device_train_batch_size)
        rates = self.speeds(largest, current)
        return BatchSize(
            largest=largest,
            bounded=largest == self.limit,
            longest=0,
            memory_bytes=self.memory,
            used_bytes=self.reckoned(largest) or 0,
            speeds={str(size): rate for size, rate in rates.items()},
            knee=knee(rates) if rates else 0,
            current=current,
            accumulation=int(args.gradient_accumulation_steps),
            accelerator=not self.on_cpu,
        )

    def batch(self, size: int) -> Batch:
        """`size` of the longest rows, each as often as it takes."""
        indices = list(itertools.islice(itertools.cycle(self.chosen), size))
        return self.rows.batch(indices).to(self.subject.device)

    def step(self, size: int) -> None:
        """One step as the run takes it: forward, backward, clipping and update."""
        inputs = self.batch(size).inputs
        self._forward_backward(inputs)
        self._update()

    def attempt(self, size: int) -> None:
        """Try `size`; raises where it does not fit."""
        expected = self.reckoned(size)
        if self.memory and self.on_cpu and expected is not None and expected > self.memory:
            raise NoRoom
        if self.on_cpu and expected is not None and self.spent > self.seconds / 2:
            return  # by the line it fits, and time is short
        inputs = self.batch(size).inputs
        began = self.clock()
        if self.on_cpu:
            with TensorBytes() as counted:
                self._forward_backward(inputs)
            with TensorBytes() as updated:
                self._update()
            self.peaks[size] = self.held + counted.peak
            used = max(self.peaks[size], self.held + updated.peak)
        else:
            torch.cuda.reset_peak_memory_stats(self.subject.device)
            self._forward_backward(inputs)
            self._update()
            used = self.peaks[size] = torch.cuda.max_memory_allocated(self.subject.device)
        self.spent += self.clock() - began
        if self.memory and used > self.memory:
            raise NoRoom

    def reckoned(self, size: int) -> int | None:
        """What `size` takes, by the line through the two largest sizes that were run."""
        if size in self.peaks:
            return self.peaks[size]
        known = sorted(self.peaks)[-2:]
        if len(known) < 2:
            return None
        slope = (self.peaks[known[1]] - self.peaks[known[0]]) / (known[1] - known[0])
        return int(self.peaks[known[1]] + slope * (size - known[1]))

    def speeds(self, largest: int, current: int) -> dict[int, float]:
        """Rows a second at the powers of two that fit, and at the run's own size; medians."""
        sizes = {2**i for i in range(largest.bit_length()) if 2**i <= largest}
        if current <= largest:
            sizes.add(current)
        known: dict[int, list[float]] = {}
        inputs: dict[int, Any] = {}
        left = self.seconds / 2
        for size in sorted(sizes):
            if size == 1 and self.limit > 1 and _has_batch_statistics(self.subject.model):
                continue  # a batch of one has none
            inputs[size] = self.batch(size).inputs
            cost = ROUNDS * self._seconds(inputs[size])  # the warm-up tells the price
            if cost > left and known:
                del inputs[size]
                break
            left -= cost
            known[size] = []
        for _, size in itertools.product(range(ROUNDS), list(known)):
            known[size].append(self._seconds(inputs[size]))
        return {size: size / max(statistics.median(took), 1e-9) for size, took in known.items()}

    def _seconds(self, inputs: dict[str, Any]) -> float:
        self._wait()
        began = self.clock()
        self._forward_backward(inputs)
        self._update()
        self._wait()
        return self.clock() - began

    def _wait(self) -> None:
        if not self.on_cpu:
            torch.cuda.synchronize(self.subject.device)

    def _forward_backward(self, inputs: dict[str, Any]) -> None:
        self.subject.compute_loss(inputs).backward()

    def _update(self) -> None:
        limit = float(self.subject.args.max_grad_norm or 0)
        if limit:
            nn.utils.clip_grad_norm_(self.subject.model.parameters(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # between micro-batches they stay


def _has_batch_statistics(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def _held(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights, buffers, gradients and the optimizer's state."""
    parameters = list(model.parameters())
    states = [v for s in optimizer.state.values() for v in s.values()]
    gradients = [p.grad for p in parameters if p.grad is not None]
    tensors = [*parameters, *model.buffers(), *gradients, *states]
    each = {id(t): t for t in tensors if isinstance(t, torch.Tensor)}
    return sum(t.numel() * t.element_size() for t in each.values())


def _noise(subject: Subject, rows: Rows, largest: int) -> tuple[float, float, float]:
    """The gradient noise scale in evaluation mode: dropout would add noise of its own."""
    small = min(MICRO_ROWS, largest, len(rows) // MICRO)
    if small < 1:
        return math.nan, math.nan, math.nan
    large = MICRO * small  # rows of a large batch, none of them twice
    chosen, draw = rows.evenly_spaced(GROUPS * large), torch.Generator().manual_seed(0)
    order = [chosen[i] for i in torch.randperm(len(chosen), generator=draw).tolist()]
    while len(order) < GROUPS * large:  # a small set: every large batch is drawn from all of it
        order = order[: len(order) // large * large]
        order += [chosen[i] for i in torch.randperm(len(chosen), generator=draw).tolist()]
    subject.model.eval()
    trained = [p for p in subject.model.parameters() if p.requires_grad]
    few, many = [], []
    for group in range(GROUPS):
        squares, total = [], [torch.zeros_like(p) for p in trained]
        for part in range(MICRO):
            start = (group * MICRO + part) * small
            batch = rows.batch(order[start : start + small])
            loss = subject.compute_loss(batch.to(subject.device).inputs)
            found = torch.autograd.grad(loss, trained, allow_unused=True)
            each = [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found)]  # noqa: B905
            squares.append(_square(each))
            torch._foreach_add_(total, each)
        few.append(statistics.fmean(squares))
        many.append(_square(total) / MICRO**2)
    return noise_scale(few, many, small=small, large=large, population=len(rows))


def _square(gradients: Sequence[torch.Tensor]) -> float:
    return float(torch.stack([g.double().square().sum() for g in gradients]).sum())


def _chart(found: BatchSize) -> Curve:
    sizes = sorted(found.rates)
    line = Line("rows a second", tuple(map(float, sizes)), tuple(found.rates[s] for s in sizes))
    marks = (Mark("knee", found.knee, "x"), Mark("the run's own", found.current, "x"))
    return Curve(
        "Speed by the rows of a micro-batch",
        "baselines",
        "rows",
        "rows a second",
        (line,),
        marks,
        f"{found.largest} rows fit. Chosen by speed, never by quality.",
        log_x=True,
    )
