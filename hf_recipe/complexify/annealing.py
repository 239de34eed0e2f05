"""What the loss law sees of a schedule: the way travelled, and the annealing that was answered.

The way is the sum of all rates up to a step. Annealing is the fall of the rate since its height,
and the loss answers it with a delay: of each fall a share has been answered that grows with the
steps since, as 1 - exp(-steps / delay).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_recipe.instruments.numbers import numbers_of

Array = np.ndarray[Any, np.dtype[np.float64]]

KNOTS = 2048  # points at which a schedule's annealing is followed


@dataclass(frozen=True)
class Features:
    """What the law sees of a schedule, at its knots.

    Attributes:
        knots: (knots,) step numbers, from 0 to the last.
        travelled: (knots,) sum of the rates up to there, in units of the reference rate.
        annealed: per delay, (knots,) fall of the rate so far that has been answered.
    """

    knots: Array
    travelled: Array
    annealed: dict[float, Array]

    @classmethod
    def of(cls, rates: Array, reference: float, delays: Sequence[float]) -> Features:
        knots = np.unique(np.linspace(0, len(rates) - 1, min(KNOTS, len(rates))).round())
        at = knots.astype(int)
        travelled = np.cumsum(rates)[at] / reference
        level = np.maximum(rates, _warmed(rates))[at] / reference  # a warm-up anneals nothing
        drops = -np.diff(level, prepend=level[0])
        answered = ((level[0] - level)[:, None] - _waiting(knots, drops, np.asarray(delays))).T
        return cls(knots, travelled, dict(zip(delays, answered, strict=True)))

    def at(self, steps: Array) -> Features:
        """The same, at these steps."""
        return Features(
            steps,
            np.interp(steps, self.knots, self.travelled),
            {d: np.interp(steps, self.knots, values) for d, values in self.annealed.items()},
        )

    def end(self) -> Features:
        """The same, at the end alone."""
        last = {delay: values[-1:] for delay, values in self.annealed.items()}
        return Features(self.knots[-1:], self.travelled[-1:], last)

    def design(self, delay: float, exponent: float, scale: float) -> Array:
        """(knots, 3): what floor, power and gain are multiplied by."""
        travelled = np.maximum(self.travelled, 1e-9 * scale) / scale
        ones = np.ones(len(self.knots))
        return np.stack([ones, travelled**-exponent, -self.annealed[delay]], axis=1)


def _waiting(knots: Array, drops: Array, delays: Array) -> Array:
    """(knots, delays): of the drops so far, what has not yet been answered at each knot.

    w[i] = w[i - 1] * exp(-(step between) / delay) + drop[i], as a sum of growing exponentials;
    in stretches short enough that none of them overflows.
    """
    found = np.zeros((len(knots), len(delays)))
    stretches = math.ceil((knots[-1] - knots[0]) / (300 * delays.min())) or 1
    now, last = np.zeros(len(delays)), knots[0]
    for part in np.array_split(np.arange(len(knots)), min(stretches, len(knots))):
        since = (knots[part] - last)[:, None] / delays
        grown = np.exp(since - since[0])
        found[part] = np.exp(-since) * now + np.cumsum(drops[part][:, None] * grown, axis=0) / grown
        now, last = found[part[-1]], knots[part[-1]]
    return found


def rates_of(learning_rates: Sequence[float]) -> Array:
    """The rates as an array; raises ValueError where they are none."""
    rates = numbers_of(learning_rates, "learning_rates", axes=1)
    if not len(rates):
        raise ValueError("learning_rates must hold the rate of every step; got none")
    if not np.all(np.isfinite(rates) & (rates >= 0)) or not rates.max() > 0:
        raise ValueError("learning_rates must be finite, not negative, and not all zero")
    return rates


def _warmed(rates: Array) -> Array:
    """The rate that a warm-up leads to, during it; 0 after it."""
    end = warmup_end(rates)
    level = np.zeros(len(rates))
    level[:end] = rates[min(end, len(rates) - 1)]
    return level


def warmup_end(rates: Array) -> int:
    """First step after which the rate no longer rises."""
    rising = np.diff(rates) > 0
    if not len(rising) or not rising[0]:
        return 0
    return int(len(rising) if rising.all() else rising.argmin())
