"""Numbers as people have them: tensors on any device and in any dtype, arrays, lists, iterators.

The functions that are called on a user's own numbers take them all, and refuse what is none in
one sentence that names the argument. Torch is not imported: a tensor is known by its methods.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


def plain(values: Any) -> Any:
    """`values` without torch: a tensor, or a list of them, as numpy; an iterator as a list."""
    if hasattr(values, "detach"):
        host = values.detach().cpu()
        try:
            return host.numpy()
        except TypeError:  # bfloat16 and the 8-bit floats, which numpy does not know
            return host.float().numpy()
    if isinstance(values, Iterator):
        values = list(values)
    if isinstance(values, (list, tuple)) and any(hasattr(value, "detach") for value in values):
        return [plain(value) for value in values]
    return values


def numbers_of(values: Any, name: str, *, axes: int | None = None) -> Array:
    """`values` as an array of float64.

    Args:
        values: any numbers.
        name: what the error calls them.
        axes: how many axes they must have; None: any.

    Raises:
        ValueError: no numbers, rows of different lengths, or another number of axes.
    """
    try:
        found = np.asarray(plain(values), dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers; got {values!r:.60}") from None
    if axes is not None and found.ndim != axes:
        wanted = "a flat list of numbers" if axes == 1 else f"numbers along {axes} axes"
        raise ValueError(f"{name} must be {wanted}; got shape {found.shape}")
    return found


def whole_of(value: Any, name: str) -> int:
    """`value` as a whole number of 0 or more: an int, numpy's, a tensor's, or 3.0.

    Raises:
        ValueError: anything else.
    """
    number = math.nan if isinstance(value, str) else number_of(value, name)
    if not (number >= 0 and number.is_integer()):
        raise ValueError(f"{name} must be a whole number, 0 or more; got {value!r:.60}")
    return int(value) if isinstance(value, int) else int(number)  # an int may exceed a float


def number_of(value: Any, name: str) -> float:
    """`value` as a float: a number, or anything that holds exactly one.

    Raises:
        ValueError: it holds none, or several.
    """
    found = numbers_of(value, name)
    if found.size != 1 or value is None:
        raise ValueError(f"{name} must be one number; got {value!r:.60}")
    return float(found.reshape(-1)[0])
