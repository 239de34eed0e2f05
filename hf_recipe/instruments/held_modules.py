"""What a Trainer holds beside its model: teachers, reference models, losses with parameters."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

from torch import nn


def held_modules(trainer: Any) -> list[nn.Module]:
    """The modules that a Trainer can reach besides its model: see `modules_by_name`."""
    return [module for held in modules_by_name(trainer).values() for module in held]


def modules_by_name(trainer: Any) -> dict[str, list[nn.Module]]:
    """The modules that a Trainer holds as attributes, alone or in a list or dict, by their name.

    With them those that a loss of the user's own takes from around it (a teacher that is a global
    of the script).
    """
    found: dict[str, list[nn.Module]] = {}
    if trainer is None:
        return found
    losses = (getattr(type(trainer), "compute_loss", None), vars(trainer).get("compute_loss_func"))
    for value in losses:
        if inspect.isfunction(value):
            with contextlib.suppress(ValueError):  # a name around it that was deleted since
                around = inspect.getclosurevars(value)
                _collect(found, {**around.globals, **around.nonlocals})
    _collect(found, vars(trainer))
    return found


def _collect(found: dict[str, list[nn.Module]], values: dict[str, Any]) -> None:
    for name, value in values.items():
        items = list(value.values()) if isinstance(value, dict) else value
        items = items if isinstance(items, (list, tuple)) else [items]
        modules = [item for item in items if isinstance(item, nn.Module)]
        if modules:
            found.setdefault(name, []).extend(modules)


def held_teachers(trainer: Any, model: nn.Module) -> list[nn.Module]:
    """What is called a teacher: by the Trainer, around its loss, or inside its model."""
    named = modules_by_name(trainer)
    for name, part in model.named_children():
        named.setdefault(name, []).append(part)
    found = {id(m): m for name, held in named.items() if "teacher" in name.lower() for m in held}
    found.pop(id(model), None)
    return list(found.values())
