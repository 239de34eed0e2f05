"""The border between our watching and the user's training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from hf_recipe.core.finding import Finding


class RecipeError(RuntimeError):
    """Raised for findings of severity error where ``on_error`` asks for it.

    Attributes:
        findings: the errors.
    """

    def __init__(self, findings: list[Finding]) -> None:
        self.findings = findings
        lines = [f"{f.check}: {f.message}\n  fix: {f.fix}" for f in findings]
        super().__init__("\n".join(["the recipe found errors:", *lines]))


def event(method: Callable[..., None]) -> Callable[..., None]:
    """Our own errors end the watching, not the run; what the user asked to raise is raised."""

    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.paused or self.detached:
            return
        try:
            method(self, *args, **kwargs)
        except RecipeError:
            raise
        except Exception as error:  # an observer does no harm
            self.fail(method.__name__, error)

    return guarded
