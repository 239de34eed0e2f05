"""Random generators and counters that a data set, a transform or a collator keeps for itself.

The quiet guard knows the global generators alone. One that lives in an attribute, a closure or a
module of the user's moves on with every row that is read, and so does a counter by which a
transform grows stronger; so they are looked for, and put back.
"""

from __future__ import annotations

import functools
import random
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from hf_recipe.instruments.attributes import remembered

MOST_OBJECTS, DEEPEST = 2000, 6
LIBRARIES = {"builtins", "datasets", "transformers", "torch", "torchvision", "tokenizers", "numpy",
             "pyarrow", "pandas", "PIL", "functools", "hf_recipe", "accelerate"}  # fmt: skip
KINDS = (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)


def held_generators(*roots: Any) -> list[Any]:
    """Generators reachable from `roots` through attributes, items, closures and globals."""
    return [item for item in _reachable(*roots) if isinstance(item, KINDS)]


def held_objects(*roots: Any) -> list[Any]:
    """The user's own objects reachable from `roots`: data sets, transforms, collators."""
    found = []
    for item in _reachable(*roots):
        known = type(item).__module__.partition(".")[0] in LIBRARIES
        if hasattr(item, "__dict__") and not known and not isinstance(item, KINDS):
            found.append(item)
    return found


def _reachable(*roots: Any) -> list[Any]:
    found: list[Any] = []
    seen: set[int] = set()
    queue: list[tuple[Any, int]] = [(root, 0) for root in roots]
    while queue and len(seen) < MOST_OBJECTS:
        item, depth = queue.pop(0)
        if id(item) in seen or item is None:
            continue
        seen.add(id(item))
        found.append(item)
        if not isinstance(item, KINDS) and depth < DEEPEST:
            queue += [(part, depth + 1) for part in _parts(item)]
    return found


def _parts(item: Any) -> Iterator[Any]:
    if isinstance(item, (str, bytes, int, float, torch.Tensor, np.ndarray, torch.nn.Module, type)):
        return
    if isinstance(item, types.MethodType):
        yield item.__self__
        yield item.__func__
    elif isinstance(item, types.FunctionType):
        yield from (cell.cell_contents for cell in item.__closure__ or () if _filled(cell))
        known = item.__globals__
        yield from (known[n] for n in item.__code__.co_names if isinstance(known.get(n), KINDS))
    elif isinstance(item, functools.partial):
        yield from (item.func, *item.args, *item.keywords.values())
    elif isinstance(item, Mapping):
        if len(item) <= 64:
            yield from item.values()
    elif isinstance(item, (list, tuple)):
        if len(item) <= 64:  # transforms, not rows
            yield from item
    elif hasattr(item, "__dict__") and not isinstance(item, types.ModuleType):
        yield from vars(item).values()
        for name in ("__getitem__", "__getitems__", "__call__"):
            method = getattr(type(item), name, None)
            if isinstance(method, types.FunctionType):
                yield method


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # named in the function, not bound yet
        return False


def state_of(generator: Any) -> Any:
    """A generator's state, to compare and to put back."""
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.get_state()


def put_back(generator: Any, state: Any) -> None:
    """The inverse of `state_of`."""
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


@contextmanager
def kept(generators: Sequence[Any], objects: Sequence[Any] = ()) -> Iterator[None]:
    """Put every generator, and what is plain on every object, back on exit."""
    states = [state_of(generator) for generator in generators]
    restore = remembered(objects)
    try:
        yield
    finally:
        restore()
        for generator, state in zip(generators, states, strict=True):
            put_back(generator, state)
