"""Whether a method of the Trainer was extended or replaced by the user.

Probes that repeat what a stock method does are right as long as a subclass only adds to it; where
the body was replaced, they would measure another program.
"""

from __future__ import annotations

import inspect
import types
from typing import Any


def own_method(trainer: Any, name: str) -> Any:
    """The method as the Trainer has it, without the recorder's seam around it."""
    method = getattr(trainer, name)
    while hasattr(method, "__wrapped__") and _is_seam(method):
        method = method.__wrapped__
    return method


def _is_seam(method: Any) -> bool:
    return isinstance(method, types.FunctionType) and str(
        method.__globals__.get("__name__", "")
    ).startswith("hf_recipe.")


def replaces(trainer: Any, name: str) -> bool:
    """Whether method `name` of `trainer` has a body of its own that never calls the original.

    Methods defined in transformers count as original. A body that mentions its own name (as in
    ``super().name(...)``) extends the original.
    """
    method = own_method(trainer, name)
    if getattr(method, "__self__", None) is not trainer or name not in dir(type(trainer)):
        return not _calls(method, name)
    if isinstance(method, types.MethodType) and method.__func__ not in _definitions(trainer, name):
        return not _calls(method, name)  # bound to this one instance
    for owner in type(trainer).__mro__:
        if name in vars(owner):
            if owner.__module__.partition(".")[0] == "transformers":
                return False
            if not _calls(inspect.getattr_static(owner, name), name):
                return True
    return True


def _definitions(trainer: Any, name: str) -> list[Any]:
    return [vars(owner)[name] for owner in type(trainer).__mro__ if name in vars(owner)]


def overrides(trainer: Any, name: str) -> bool:
    """Whether `name` is defined by any class below transformers' own, or on the instance."""
    method = own_method(trainer, name)
    if getattr(method, "__func__", None) not in _definitions(trainer, name):
        return True
    owner = next((c for c in type(trainer).__mro__ if name in vars(c)), None)
    return owner is None or owner.__module__.partition(".")[0] != "transformers"


def _calls(function: Any, name: str) -> bool:
    """Whether the body of `function`, or one that it wraps, mentions `name`."""
    function = inspect.unwrap(getattr(function, "__func__", function))
    if not isinstance(function, types.FunctionType):
        return False
    return mentions(function.__code__, name)


def asks_for_training(trainer: Any) -> bool:
    """Whether a compute_loss of the user's own does otherwise while ``model.training`` is set."""
    method = own_method(trainer, "compute_loss")
    bodies = [vars(owner).get("compute_loss") for owner in type(trainer).__mro__]
    return any(
        mentions(body.__code__, "training")
        for body in (*bodies, getattr(method, "__func__", method))
        if isinstance(body, types.FunctionType) and not body.__module__.startswith("transformers.")
    )


def samples_its_own_way(trainer: Any) -> bool:
    """Whether rows may be drawn by a sampler of the user's own, some more often than others."""
    if replaces(trainer, "_get_train_sampler"):
        return True
    loader = own_method(trainer, "get_train_dataloader")
    loader = inspect.unwrap(getattr(loader, "__func__", loader))
    if not overrides(trainer, "get_train_dataloader") or not isinstance(loader, types.FunctionType):
        return False
    words = names(loader.__code__) | strings(loader.__code__)
    return "_get_train_sampler" not in words and any("ampler" in word for word in words)


def names(code: types.CodeType) -> set[str]:
    """The names that a code object, or one nested in it, looks up outside itself."""
    nested = [names(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return {*code.co_names, *code.co_freevars}.union(*nested)


def mentions(code: types.CodeType, name: str) -> bool:
    """Whether a name stands in a code object or in one nested in it."""
    return name in names(code)


def strings(code: types.CodeType) -> set[str]:
    """The strings that stand in a code object, or in one nested in it."""
    found: set[str] = set()
    for constant in code.co_consts:
        if isinstance(constant, str):
            found.add(constant)
        elif isinstance(constant, tuple):
            found.update(item for item in constant if isinstance(item, str))
        elif isinstance(constant, types.CodeType):
            found |= strings(constant)
    return found
