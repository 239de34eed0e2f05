"""The one exception that ends the main job with a line instead of a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class UsageError(Exception):
    """Something in what the user gave cannot work; the message is one line that names it."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its kind."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def nearest(name: str, known: Sequence[str], prefix: str = "") -> str:
    """ "; did you mean ...?", or the list of what there is."""
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {prefix}{near[0]}?" if near else f"; known: {', '.join(known)}"
