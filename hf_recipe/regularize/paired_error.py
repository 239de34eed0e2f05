"""How sure is the difference of two evaluations? The same rows stand in both."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from hf_recipe.instruments.window import Evaluation


class PairedError:
    """Standard error of the loss's change from one evaluation to the next, over their rows.

    Made by `hf_recipe.attach` for an `EarlyStopping` that has no ``standard_error_of`` of its own.
    Where it is asked before the recipe has read an evaluation, it answers for the one before.

    Args:
        latest: gives the last evaluation that was read.
    """

    def __init__(self, latest: Callable[[], Evaluation | None]) -> None:
        self.latest = latest
        self.error: float | None = None
        self._before: Evaluation | None = None

    def __call__(self, metrics: dict[str, float]) -> float | None:
        """The standard error, in the loss's unit; None while two are not known."""
        seen, before = self.latest(), self._before
        if seen is None or not seen.row_losses or seen is before:
            return self.error
        same = before is not None and before.split == seen.split
        if before is not None and same and len(before.row_losses) == len(seen.row_losses):
            change = np.asarray(seen.row_losses) - np.asarray(before.row_losses)
            if len(change) > 1 and np.isfinite(change).all():
                self.error = float(change.std(ddof=1) / np.sqrt(len(change)))
        self._before = seen
        return self.error


def listen_to_rows(
    callbacks: Iterable[Any], args: Any, latest: Callable[[], Evaluation | None]
) -> None:
    """Give each `EarlyStopping` that follows one loss, and knows no error of it, the rows'."""
    from hf_recipe.regularize.early_stopping import EarlyStopping

    for callback in callbacks:
        if not isinstance(callback, EarlyStopping):
            continue
        names = callback.names_of(args)
        alone = len(names) == 1 and names[0].endswith("loss")
        known = callback.standard_error_of
        if alone and (known is None or isinstance(known, PairedError)):
            callback.standard_error_of = PairedError(latest)
