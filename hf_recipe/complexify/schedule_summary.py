"""What there is to say of a planned learning rate, in numbers; judged in `schedule`.

Every figure is taken from the rates alone, of each step of the run and of steps past its end: so
it holds for any scheduler, under any name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_recipe.core.check import Measurement
from hf_recipe.instruments.numbers import number_of, numbers_of

SAMPLES = 256  # points of the planned schedule that are stored
SPENT = 0.01  # of the peak: what is left there moves nothing


@dataclass(frozen=True)
class ScheduleSummary(Measurement):
    """A run's planned learning rates. Steps count from 0; shares are of the run's steps.

    Attributes:
        steps, steps_per_epoch: optimizer steps of the run, and of one pass over this data set (0:
            unknown).
        rows_per_step: rows that one optimizer step sees; 0: unknown.
        peak: highest rate of the run.
        declared_peak: highest rate, counting what comes after the run if it ends while rising.
        warmup_steps: steps before 99 % of the declared peak, which may lie after the run.
        final, low: last rate, and the lowest one in the last tenth of the run.
        deepest: lowest rate after the peak, anywhere in the run.
        falling: whether the rate still falls, continuously, over the last steps.
        beyond: lowest rate after the run; None: not simulated.
        next_fall: step at which the rate falls under half of its peak after the run; None: never.
        horizonless: whether the rate falls ever more slowly, as an inverse square root does.
        dropped: whether it fell by a tenth of its peak in one step (a milestone inside the run).
        spent: share of steps at the end with less than 1 % of the peak.
        idle: share of steps at the end that stay at one rate, under 1 % of the peak, which a
            continuous decay ran into.
        mirrored: share of steps after a low point from which the rate climbs back on the path it
            came down on: a cosine that ran past its horizon.
        moved: share of steps by which 95 % of the sum of all rates is used up.
        every, planned: the rate of each `every`-th step.
    """

    steps: int
    steps_per_epoch: int
    rows_per_step: int
    peak: float
    declared_peak: float
    warmup_steps: int
    final: float
    low: float
    deepest: float
    falling: bool
    beyond: float | None
    next_fall: int | None
    horizonless: bool
    dropped: bool
    spent: float
    idle: float
    mirrored: float
    moved: float
    every: int
    planned: tuple[float, ...]

    def place(self, step: int) -> str:
        """A step, also in epochs of this data set and in samples seen."""
        places = []
        if self.steps_per_epoch:
            places.append(f"epoch {step / self.steps_per_epoch:.3g}")
        if self.rows_per_step:
            places.append(f"{step * self.rows_per_step:,} samples")
        return f"step {step:,}" + (f" ({', '.join(places)})" if places else "")


Rates = np.ndarray[Any, np.dtype[np.float64]]


def summarise(
    learning_rates: Sequence[float],
    steps_per_epoch: int,
    *,
    rows_per_step: int = 0,
    continuation: Sequence[float] | None = None,
) -> ScheduleSummary:
    """Reduce the rate of every planned step, and of steps past the end, to a summary.

    Past the end a rate may be negative, as of a linear one that is not told to stop at 0: it is
    over there.

    Raises:
        ValueError: no steps, a rate that is negative or not finite, or no number of steps.
    """
    rates = numbers_of(learning_rates, "learning_rates", axes=1)
    later = numbers_of([] if continuation is None else continuation, "continuation", axes=1)
    if not np.all(np.isfinite(rates) & (rates >= 0)):
        raise ValueError("learning_rates must be finite and not negative")
    if not np.all(np.isfinite(later)):
        raise ValueError("continuation must be finite")
    if not len(rates):
        raise ValueError("learning_rates is empty: the rate of every planned step is needed")
    per_epoch = number_of(steps_per_epoch, "steps_per_epoch")
    if not (per_epoch >= 0 and np.isfinite(per_epoch)):
        raise ValueError(f"steps_per_epoch must be finite, 0 or more; got {steps_per_epoch}")
    later = np.maximum(later, 0.0)
    steps, peak = len(rates), float(rates.max())
    top = _crest(rates)
    rising = steps == 1 or rates[-1] > rates[-2] or peak == 0
    ahead = float(later.max()) if len(later) and rising and rates[-1] >= peak else 0.0
    declared = max(peak, ahead)
    reached = np.concatenate([rates, later]) >= 0.99 * declared
    drops = rates[top:-1] - rates[top + 1 :]
    under = np.flatnonzero(later <= 0.5 * peak)
    used = np.cumsum(rates)
    every = -(-steps // SAMPLES)
    return ScheduleSummary(
        steps=steps,
        steps_per_epoch=round(per_epoch),
        rows_per_step=rows_per_step,
        peak=peak,
        declared_peak=declared,
        warmup_steps=int(reached.argmax()),
        final=float(rates[-1]),
        low=float(rates[-max(1, steps // 10) :].min()),
        deepest=float(rates[top:].min()),
        falling=steps > 2 and bool((np.diff(rates[-3:]) < -1e-9 * peak).all()),
        beyond=float(later.min()) if len(later) else None,
        next_fall=steps + int(under[0]) if len(under) and peak > 0 else None,
        horizonless=_slows(np.concatenate([rates[top:], later])),
        dropped=steps >= 10 and bool((drops >= 0.1 * peak).any()),
        spent=_trailing(rates < SPENT * peak * (1 - 1e-6)) / steps,
        idle=_idle(rates, peak) / steps,
        mirrored=_mirrored(rates) / steps,
        moved=float(np.searchsorted(used, 0.95 * used[-1]) + 1) / steps,
        every=every,
        planned=tuple(float(rate) for rate in rates[::every]),
    )


def _crest(rates: Rates) -> int:
    """The first step at the peak; a later one may be higher by rounding alone."""
    return int((rates >= (1 - 1e-6) * rates.max()).argmax())


def _trailing(flags: np.ndarray[Any, np.dtype[np.bool_]]) -> int:
    """How many flags are set at the end without a gap."""
    clear = np.flatnonzero(~flags)
    return len(flags) - 1 - int(clear[-1]) if len(clear) else len(flags)


def _idle(rates: Rates, peak: float) -> int:
    """Trailing steps at one rate under 1 % of the peak, unless a plateau's milestone led there."""
    count = _trailing(np.abs(rates - rates[-1]) <= 1e-6 * peak)
    start = len(rates) - count
    if count < 2 or not rates[-1] < SPENT * peak * (1 - 1e-6) or start < 2:
        return 0
    stepped = rates[-1] > 0 and abs(rates[start - 1] - rates[start - 2]) <= 1e-9 * peak
    return 0 if stepped else count


def _slows(rates: Rates) -> bool:
    """Whether the logarithm of the rate falls ever more slowly: a power law, with no horizon."""
    at = np.unique(np.linspace(0, len(rates) - 1, 33).astype(int))
    points = rates[at]
    if len(points) < 5 or not points.min() > 0:
        return False
    falls = -np.diff(np.log(points)) / np.diff(at)
    return bool((falls > 0).all() and (falls[1:] < falls[:-1] * (1 - 1e-5)).mean() > 0.9)


def _mirrored(rates: Rates) -> int:
    """Steps after the first low point, if the rate climbs back the way it came down."""
    top = _crest(rates)
    path = rates[top:]
    peak = rates.max()
    rises = np.flatnonzero(np.diff(path) > 1e-9 * peak)
    if not len(rises):
        return 0
    trough = int(rises[0])
    reach = min(trough, len(path) - 1 - trough)
    if reach < 2 or not path[trough] <= 0.2 * peak:
        return 0
    if abs(top - trough) <= 0.2 * trough:  # it began by rising as slowly: a cycle that was meant
        return 0
    down, up = path[trough - reach : trough][::-1], path[trough + 1 : trough + 1 + reach]
    tolerance = 0.02 * peak + np.abs(np.diff(path[: trough + 1])).max()
    return len(path) - 1 - trough if np.abs(down - up).max() <= tolerance else 0
