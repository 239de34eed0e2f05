"""The border between the recipe and the training that it watches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hf_recipe.core.finding import Finding

if TYPE_CHECKING:
    from hf_recipe.trainer.recipe import Recipe


class RecipeError(RuntimeError):
    """Raised for findings of severity error where ``on_error`` asks for it."""

    def __init__(self, findings: list[Finding]) -> None:
        self.findings = findings
        lines = [f"{f.check}: {f.message}\n  fix: {f.fix}" for f in findings]
        super().__init__("\n".join(["the recipe found errors:", *lines]))


def event(method: Callable[..., None]) -> Callable[..., None]:
    """The border towards the training: our own errors end the watching, not the run."""

    @functools.wraps(method)
    def guarded(self: Recipe, *args: Any, **kwargs: Any) -> None:
        if self.paused or self.detached:
            return
        try:
            method(self, *args, **kwargs)
        except RecipeError:
            raise
        except Exception as error:
            self.fail(method.__name__, error)

    return guarded
