"""Calling the user's own functions: leaving their state alone, naming the line that failed."""

from __future__ import annotations

import contextlib
import copy
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def undisturbed(function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """`function`, whose own lists, dicts and sets are afterwards as they were.

    Looked after are those in its closure, and the attributes of the function, or of the object
    that it belongs to.
    """
    owner = getattr(function, "__self__", function)
    attributes = vars(owner) if hasattr(owner, "__dict__") else {}
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    containers = [v for v in [*cells, *attributes.values()] if type(v) in (list, dict, set)]
    kept, values = [(c, copy.copy(c)) for c in containers], dict(attributes)
    try:
        yield function
    finally:
        for name in [name for name in attributes if name not in values]:
            delattr(owner, name)
        for name, value in values.items():
            if attributes.get(name) is not value:
                setattr(owner, name, value)
        for container, before in kept:
            container.clear()
            container.extend(before) if isinstance(container, list) else container.update(before)


def place_of(error: BaseException) -> str:
    """File and line of the innermost frame outside installed packages; else the innermost."""
    frames = traceback.extract_tb(error.__traceback__)
    here = Path(__file__).parent.parent
    own = [
        f
        for f in frames
        if "site-packages" not in f.filename
        and "<frozen" not in f.filename
        and here not in Path(f.filename).parents
        and "/lib/python" not in f.filename
    ]
    last = (own or list(frames))[-1]
    return f"{Path(last.filename).name}:{last.lineno}"
