"""The learning rates of a planned run, from its real scheduler, which stays untouched.

A scheduler holds its optimizer, which holds the model: a deep copy would copy them all. So its
own few fields are copied, around a stand-in optimizer that has rates and no parameters.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from hf_recipe.core.check import Skip


class _Rates:
    """Stands in for an optimizer: parameter groups with rates, without parameters."""

    _opt_called = True

    def __init__(self, optimizer: Any) -> None:
        self.defaults = dict(optimizer.defaults)
        self.param_groups = [
            {key: _own(value) for key, value in group.items() if key != "params"} | {"params": []}
            for group in optimizer.param_groups
        ]

    def step(self) -> None:
        """Never called; torch only looks whether it is there."""

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


def _own(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (list, dict, set)):  # a Counter of milestones too
        return value.copy()
    return value


def _copy(scheduler: LRScheduler, optimizer: _Rates) -> LRScheduler:
    """A scheduler of the same kind in the same state, on a stand-in optimizer."""
    twin: LRScheduler = object.__new__(type(scheduler))
    for name, value in vars(scheduler).items():
        if name == "step":  # replaced on the instance: calling it would step the real one
            continue
        if name == "optimizer":
            value = optimizer
        elif isinstance(value, LRScheduler):
            value = _copy(value, optimizer)
        elif isinstance(value, list) and any(isinstance(item, LRScheduler) for item in value):
            value = [_copy(i, optimizer) if isinstance(i, LRScheduler) else i for i in value]
        vars(twin)[name] = _own(value)
    return twin


def _steps_per_update(scheduler: Any) -> int:
    """How often Accelerate's wrapper steps its scheduler for one optimizer step."""
    from accelerate.state import AcceleratorState

    if scheduler.split_batches or not scheduler.step_with_optimizer:
        return 1
    return int(AcceleratorState().num_processes)


def simulate(scheduler: Any, steps: int) -> list[float]:
    """The rates of the next `steps` optimizer steps, first parameter group.

    Args:
        scheduler: a torch scheduler, or Accelerate's wrapper around one, which steps it once per
            process. A scheduler that refuses to go past its end gives a shorter list.

    Raises:
        Skip: the rates depend on what training will bring (plateau, greedy), or are not a torch
            scheduler's (DeepSpeed's own).
    """
    from accelerate.scheduler import AcceleratedScheduler

    per_update = 1
    if isinstance(scheduler, AcceleratedScheduler):
        per_update = _steps_per_update(scheduler)
        scheduler = scheduler.scheduler
    name = type(scheduler).__name__
    if isinstance(scheduler, ReduceLROnPlateau) or name == "GreedyLR":
        raise Skip(f"{name} sets the rate by evaluation results, so it cannot be known beforehand")
    if not isinstance(scheduler, LRScheduler) or name == "AdafactorSchedule":
        raise Skip(f"{name} is not a scheduler that can be simulated")
    stub = _Rates(scheduler.optimizer)
    twin = _copy(scheduler, stub)
    end = int(twin.total_steps) if isinstance(twin, OneCycleLR) else None  # it raises past it
    rates: list[float] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(steps):
            rates.append(float(stub.param_groups[0]["lr"]))
            for _ in range(per_update):
                if end is not None and twin.last_epoch + 1 >= end:
                    return rates
                try:
                    twin.step()
                except (ArithmeticError, LookupError, ValueError):  # it has no rate past its end
                    return rates
    return rates


HORIZONS = ("step_size", "T_max", "T_0", "total_iters", "total_steps")  # as torch names them


def last_milestone(scheduler: Any) -> int:
    """The last step at which a schedule declares a first fall or its end; 0: it declares none."""
    inner = getattr(scheduler, "scheduler", scheduler)
    declared = [getattr(inner, name, 0) for name in HORIZONS]
    declared += [*getattr(inner, "milestones", ()), *getattr(inner, "_milestones", ())]
    own = max((int(step) for step in declared if isinstance(step, (int, float))), default=0)
    return own + max((last_milestone(s) for s in getattr(inner, "_schedulers", ())), default=0)


def decay_done(rates: Sequence[float]) -> list[float] | None:
    """Share of all the falls of the rate that are over, after each step; None: it never falls.

    Warm-up counts as nothing; 1.0 is reached when no fall is to come within the run.
    """
    falls, total = [0.0], 0.0
    for before, after in itertools.pairwise(rates):
        total += max(0.0, before - after)
        falls.append(total)
    if not total > 0.01 * max(rates, default=0.0):
        return None
    return [fall / total for fall in falls]
