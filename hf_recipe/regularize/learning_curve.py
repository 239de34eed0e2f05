"""The learning curve: "the best and preferred way by far to regularize is more real data".

Before data is paid for: what would twice as much of it buy? The loss over nested subsets of the
training set follows, over the sizes that matter, a power of the size above a floor,

    loss = floor + A * size^-b,   floor >= 0

(Hestness et al. 2017, arXiv:1712.00409; three parameters extrapolate better than four, Viering
and Loog 2022, arXiv:2103.10948). The exponent of a handful of noisy points is hardly known; so
exponents are averaged by how well each explains the points, and the interval holds what they
disagree about. A forecast far beyond the largest size is an interval first of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import stdtr

from hf_recipe.instruments.numbers import number_of, numbers_of

Array = np.ndarray[Any, np.dtype[np.float64]]

FEWEST_SIZES = 3
EXPONENTS = np.geomspace(0.02, 3.0, 60)
# Exponents of recorded curves spread around 0.5 by a factor of about three either way.
USUAL_EXPONENT, EXPONENT_SPREAD = 0.5, 1.1
# What is known of the noise before the points speak: 2 % of the loss, worth two points.
USUAL_NOISE, NOISE_WORTH = 0.02, 2.0
MISFIT = 0.06  # share of the predicted change by which such curves miss


@dataclass(frozen=True)
class Power:
    """One power law of the average.

    Attributes:
        exponent: b.
        coefficients: floor and A, the latter at the largest size.
        covariance: (2, 2), of the coefficients.
        weight: its share of the average.
    """

    exponent: float
    coefficients: Array
    covariance: Array
    weight: float


@dataclass(frozen=True)
class LearningCurve:
    """A curve fitted by `fit`.

    Attributes:
        largest: largest size observed.
        noise: standard deviation of one observed loss, as a share of the loss.
        freedom: degrees of freedom that the noise is known with.
        powers: the laws that are averaged.
        level: probability that an interval holds a new observation's mean.
    """

    largest: float
    noise: float
    freedom: float
    powers: tuple[Power, ...]
    level: float = 0.8

    @property
    def asymptote(self) -> float:
        """The loss that no amount of data gets below, averaged over the laws."""
        return float(sum(p.weight * p.coefficients[0] for p in self.powers))

    def predict(self, size: float) -> tuple[float, float, float]:
        """(mean, low, high) of the loss at `size` training rows.

        Raises:
            ValueError: a size that is not positive and finite.
        """
        rows = number_of(size, "size")
        if not (np.isfinite(rows) and rows > 0):
            raise ValueError(f"size must be a positive number of rows; got {size}")
        ratio = rows / self.largest
        centres, widths = [], []
        for power in self.powers:
            row = np.array([1.0, ratio**-power.exponent])
            centre = float(row @ power.coefficients)
            change = float(power.coefficients[1]) * (row[1] - 1.0)
            variance = float(row @ power.covariance @ row) + (self.noise * centre) ** 2
            widths.append(float(np.sqrt(variance + (MISFIT * change) ** 2)) + 1e-12)
            centres.append(centre)
        weights = np.array([power.weight for power in self.powers])
        middle, width = np.array(centres), np.array(widths)
        tail = (1 - self.level) / 2

        def quantile(share: float) -> float:
            reach = 60 * float(width.max())
            return float(
                brentq(
                    lambda v: float(weights @ stdtr(self.freedom, (v - middle) / width)) - share,
                    float(middle.min()) - reach,
                    float(middle.max()) + reach,
                )
            )

        low, high = quantile(tail), quantile(1 - tail)
        return float(weights @ middle), max(low, 0.0), high


def fit(sizes: Sequence[float], losses: Sequence[float]) -> LearningCurve:
    """Fit the curve to held-out losses of models trained on subsets of these sizes.

    Args:
        sizes: training rows of each model; a size may stand several times (other seeds).
        losses: held-out loss of each, not negative; NaN losses are left out.

    Raises:
        ValueError: lengths that differ, sizes that are not positive, negative losses, or fewer
            than three different sizes.
    """
    n, y = numbers_of(sizes, "sizes", axes=1), numbers_of(losses, "losses", axes=1)
    if n.shape != y.shape:
        raise ValueError(f"one loss per size is needed; got {len(n)} sizes, {len(y)} losses")
    if not np.all(np.isfinite(n) & (n > 0)):
        raise ValueError("sizes must be positive and finite")
    kept = np.isfinite(y)
    n, y = n[kept], y[kept]
    if len(y) and not (y.min() >= 0 and y.max() > 0):
        raise ValueError("losses must not be negative, nor all zero: a power law has a floor")
    if len(np.unique(n)) < FEWEST_SIZES:
        raise ValueError(
            f"{len(np.unique(n))} sizes with a finite loss, and {FEWEST_SIZES} are needed"
        )
    largest = float(n.max())
    solved = [_solve((n / largest) ** -b, y) for b in EXPONENTS]
    squares = np.array(
        [float(np.sum(weights * residuals**2)) for _, _, residuals, weights in solved]
    )
    freedom = max(len(y) - 3, 0) + NOISE_WORTH
    variances = (squares + NOISE_WORTH * USUAL_NOISE**2) / freedom
    expected = -0.5 * (np.log(EXPONENTS / USUAL_EXPONENT) / EXPONENT_SPREAD) ** 2
    score = -0.5 * (len(y) + NOISE_WORTH) * np.log(variances) + expected
    share = np.exp(score - score.max())
    share /= share.sum()
    noise = float(np.sqrt(share @ variances))
    powers = tuple(
        Power(float(b), coefficients, covariance * noise**2, float(weight))
        for b, (coefficients, covariance, _, _), weight in zip(
            EXPONENTS, solved, share, strict=True
        )
        if weight > 1e-4
    )
    total = sum(power.weight for power in powers)
    powers = tuple(
        Power(p.exponent, p.coefficients, p.covariance, p.weight / total) for p in powers
    )
    return LearningCurve(largest, noise, freedom, powers)


def _solve(power: Array, y: Array) -> tuple[Array, Array, Array, Array]:
    """Floor and A >= 0 by Huber's weights on relative residuals; their unscaled covariance."""
    size = np.maximum(y, 1e-3 * float(np.median(y)) + 1e-12)
    x, target = np.stack([np.ones(len(y)), power], axis=1) / size[:, None], y / size
    weights = np.ones(len(y))
    for _ in range(5):
        normal = (x * weights[:, None]).T @ x
        normal += 1e-10 * np.trace(normal) * np.eye(2)
        right = (x * weights[:, None]).T @ target
        coefficients = np.linalg.solve(normal, right)
        covariance = np.linalg.inv(normal)
        if coefficients[0] < 0:
            coefficients = np.array([0.0, right[1] / normal[1, 1]])
            covariance = np.diag([0.0, 1 / normal[1, 1]])
        elif coefficients[1] < 0:  # the loss does not fall with size
            coefficients = np.array([right[0] / normal[0, 0], 0.0])
        residuals = target - x @ coefficients
        spread = 1.4826 * float(np.median(np.abs(residuals))) + 1e-3
        weights = np.minimum(1.0, 1.5 * spread / np.maximum(np.abs(residuals), 1e-300))
    return np.asarray(coefficients), np.asarray(covariance), residuals, weights
