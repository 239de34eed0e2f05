"""What a loss reaches backward: parameters of the model, and tensors that are not the model's."""

from __future__ import annotations

import re
import types
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

LONG = 1_000  # entries of a list beyond which nobody looks for tensors in it
SPARSE = re.compile(r"(^|[._])(experts?|moe)([._\d]|$)")


def leaves_of(loss: torch.Tensor) -> list[torch.Tensor]:
    """Every tensor at which the graph of `loss` ends, in no particular order."""
    found: dict[int, torch.Tensor] = {}
    seen: set[Any] = set()
    left = [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, torch.Tensor):
            found[id(variable)] = variable
        left += [parent for parent, _ in node.next_functions]
    return list(found.values())


def places_of(model: nn.Module, tensors: Collection[torch.Tensor]) -> dict[int, str]:
    """Attributes of the model's modules, or of what they hold, in which `tensors` stand."""
    found: dict[int, str] = {}
    for path, module in model.named_modules():
        found = places_in(module, path, tensors) | found
    return found


def places_in(owner: Any, path: str, tensors: Collection[torch.Tensor]) -> dict[int, str]:
    """Attributes of `owner` in which `tensors` stand, named from `path` on."""
    wanted = {id(tensor) for tensor in tensors}
    found: dict[int, str] = {}
    for name, value in vars(owner).items() if owner is not None else ():
        if name.startswith("_"):
            continue
        for place, tensor in _within(value, f"{path}.{name}".lstrip(".")):
            if id(tensor) in wanted:
                found.setdefault(id(tensor), place)
    return found


def _within(value: Any, place: str, depth: int = 3) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield place, value
    elif isinstance(value, nn.Module):
        for name, parameter in value.named_parameters():
            yield f"{place}.{name}", parameter
    elif isinstance(value, (Mapping, list, tuple)) and len(value) > LONG:
        return  # rows, not layers
    elif depth and isinstance(value, Mapping):
        for key, item in value.items():
            yield from _within(item, f"{place}[{key!r}]", depth - 1)
    elif depth and isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _within(item, f"{place}[{index}]", depth - 1)


def own_parts(model: nn.Module, names: Iterable[str]) -> dict[str, bool]:
    """For each parameter's name, whether the user wrote the part that holds it.

    The nearest module above it that is no plain building block of torch decides. A part of
    transformers counts as the library's only if a fresh model of its class and config has it too.
    """
    modules = dict(model.named_modules())
    fresh: dict[str, frozenset[str]] = {}
    found = {}
    for name in names:
        path = next(p for p in _above(name) if _origin(modules[p]) != "torch" or not p)
        origin = _origin(modules[path])
        if origin == "transformers":
            whole = next((p for p in _above(name) if _is_stock(modules[p])), None)
            if whole is not None:
                if whole not in fresh:
                    fresh[whole] = _fresh_names(modules[whole])
                inner = name[len(whole) + 1 :] if whole else name
                found[name] = inner not in fresh[whole]
                continue
        found[name] = origin not in ("transformers", "peft")
    return found


def _above(name: str) -> Iterator[str]:
    path = name.rpartition(".")[0]
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def _origin(module: nn.Module) -> str:
    return type(module).__module__.partition(".")[0]


def is_own(module: nn.Module) -> bool:
    """Whether the user wrote the module's class and its forward."""
    forward = type(module).forward
    return _origin(module) not in ("torch", "transformers", "peft") and isinstance(
        forward, types.FunctionType
    )


def _is_stock(module: nn.Module) -> bool:
    return isinstance(module, PreTrainedModel) and _origin(module) == "transformers"


def _fresh_names(model: nn.Module) -> frozenset[str]:
    with torch.device("meta"):
        return frozenset(dict(type(model)(model.config).named_parameters()))


def grouped(names: Iterable[str], others: Iterable[str]) -> dict[str, list[str]]:
    """`names` under the highest modules that hold none of `others`."""
    taken = {path for name in others for path in _above(name)}
    found: dict[str, list[str]] = {}
    for name in names:
        free = [path for path in _above(name) if path not in taken]
        found.setdefault(free[-1] if free and free[-1] else name, []).append(name)
    return found


@contextmanager
def noting_calls(model: nn.Module) -> Iterator[set[int]]:
    """The ids of the modules that are called inside."""
    called: set[int] = set()
    hooks = [
        module.register_forward_pre_hook(lambda m, args: called.add(id(m)))
        for module in model.modules()
    ]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()
