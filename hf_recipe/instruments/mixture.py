"""Mixtures of normal distributions: what several fits say together, each with its own doubt."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr

Array = np.ndarray[Any, np.dtype[np.float64]]


def quantiles(centres: Array, widths: Array, weights: Array, level: float) -> tuple[float, float]:
    """The central interval of a mixture of normal distributions."""
    weights = weights / weights.sum()
    low, high = float((centres - 9 * widths).min()), float((centres + 9 * widths).max())

    def quantile(share: float) -> float:
        def excess(value: float) -> float:
            return float(weights @ ndtr((value - centres) / widths)) - share

        return float(brentq(excess, low, high, xtol=1e-12 * max(abs(low), abs(high), 1e-12)))

    return quantile((1 - level) / 2), quantile((1 + level) / 2)
