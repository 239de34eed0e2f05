"""The largest size that fits, and the size from which on more brings no more speed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size


class NoRoom(MemoryError):
    """Raised by an attempt that would not fit, where the device itself would not say so."""


def largest_fitting(attempt: Callable[[int], object], *, limit: int, start: int = 1) -> int:
    """The largest size up to `limit` for which `attempt` does not run out of memory; 0: none.

    Doubles until something does not fit, then bisects: every size between the largest that fits
    and the smallest that does not is ruled out. Accelerate tells which errors mean that memory
    ran out and frees what they left; any other error is raised. (Its own
    `find_executable_batch_size` shrinks by a tenth at a time and collects garbage before every
    try, and so neither is exact nor fast.)

    Args:
        attempt: tries one size.
        limit: the largest size that is tried.
        start: the first.
    """
    fits, fails = 0, limit + 1
    size = min(max(1, start), limit)
    while fails - fits > 1:
        if _fits(attempt, size):
            fits = size
        else:
            fails = size
        size = min(2 * fits, limit) if fails > limit else (fits + fails) // 2
    return fits


def _fits(attempt: Callable[[int], object], size: int) -> bool:
    try:
        attempt(size)
    except NoRoom:
        return False
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
            raise
    else:
        return True
    clear_device_cache(garbage_collection=True)  # when the error's frames are gone
    return False


def knee(rates: Mapping[int, float], *, share: float = 0.95) -> int:
    """The smallest size that reaches `share` of the best speed.

    Args:
        rates: rows a second by size.

    Raises:
        ValueError: there are no rates.
    """
    if not rates:
        raise ValueError("the knee needs at least one measured size; got none")
    best = max(rates.values())
    return min(size for size, rate in rates.items() if rate >= share * best)


def rate_at(rates: Mapping[int, float], size: int) -> float:
    """Speed at `size`, between measured sizes by the logarithm of both; constant beyond them."""
    known = sorted(rates)
    if not known:
        return math.nan
    if size <= known[0]:
        return rates[known[0]]
    for low, high in itertools.pairwise(known):
        if low <= size <= high:
            part = math.log(size / low) / math.log(high / low)
            return math.exp((1 - part) * math.log(rates[low]) + part * math.log(rates[high]))
    return rates[known[-1]]


def split_batch(effective: int, *, largest: int, wanted: int) -> int:
    """The rows of a micro-batch that keep `effective` rows a step by accumulation.

    The smallest divisor of `effective` that is at least `wanted` and fits; where there is none,
    the largest that fits.

    Args:
        effective: rows of a step on one device, all its micro-batches together.
        largest: rows that fit.
        wanted: rows from which on more bring no more speed.
    """
    divisors = [n for n in range(1, effective + 1) if effective % n == 0 and n <= largest]
    if not divisors:
        raise ValueError(f"no micro-batch of 1 to {largest} rows divides {effective} rows")
    return next((n for n in divisors if n >= wanted), divisors[-1])


def noise_scale(
    small_squares: Sequence[float],
    large_squares: Sequence[float],
    *,
    small: int,
    large: int,
    population: int | None = None,
) -> tuple[float, float, float]:
    """The gradient noise scale, in rows, with an 80 % interval by the jackknife.

    tr(Sigma) / |G|^2 out of squared gradient norms at two batch sizes; numerator and denominator
    are averaged apart (McCandlish et al. 2018, appendix A).

    Args:
        small_squares: mean squared norm over the micro-batches of each large batch.
        large_squares: squared norm of each large batch's gradient.
        small, large: rows of a micro-batch and of a large batch.
        population: rows of the set that the batches were drawn from without putting back; None:
            it is endless. A finite one's own mean gradient is known better than its rows tell of
            an endless one's, so without this a scale near the set's size comes out too large.

    Returns:
        (estimate, low, high); NaN where the mean gradient is not told from noise.
    """
    pairs = list(zip(small_squares, large_squares, strict=True))
    if len(pairs) < 2 or not 0 < small < large:
        return math.nan, math.nan, math.nan
    share = 1 / population if population else 0.0
    whole = _scale(pairs, small, large, share)
    left = [_scale(pairs[:i] + pairs[i + 1 :], small, large, share) for i in range(len(pairs))]
    mean = sum(left) / len(left)
    spread = math.sqrt((len(left) - 1) / len(left) * sum((v - mean) ** 2 for v in left))
    if not (math.isfinite(whole) and math.isfinite(spread) and whole > 0):
        return math.nan, math.nan, math.nan
    return whole, max(0.0, whole - 1.28 * spread), whole + 1.28 * spread


def _scale(pairs: Sequence[tuple[float, float]], small: int, large: int, share: float) -> float:
    few = sum(pair[0] for pair in pairs) / len(pairs)
    many = sum(pair[1] for pair in pairs) / len(pairs)
    noise = (few - many) / (1 / small - 1 / large)
    signal = (large * many - small * few) / (large - small) + share * noise
    return noise / signal if signal > 0 else math.nan
