"""Python attributes that a forward pass or a loss changes: step counters, metrics, hooks.

A model may count its steps in a plain attribute and anneal by it; TRL's Trainers keep their
metrics in dicts of lists. None of that is a buffer, and all of it would show in the run. What is
plain (numbers, texts, small containers, small tensors) is remembered and put back, in place, so
that whoever else holds the container sees it too. What stands in a container is kept by reference.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable
from operator import is_
from typing import Any

import torch
from torch import nn

SCALARS = (bool, int, float, complex, str, bytes, type(None))
CONTAINERS = (dict, list, set, deque)
MOST = 4_000  # elements of one attribute, all levels together; larger ones are left alone
MOST_NUMBERS = 1 << 20  # of a tensor that is neither parameter nor buffer
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
INTERNAL = frozenset(vars(nn.Module()))

Undo = Callable[[], None]


def remembered(objects: Iterable[Any]) -> Undo:
    """Remember what is plain on `objects`; the result puts it back.

    Args:
        objects: modules (their hooks are remembered too), Trainers, data sets, collators.
    """
    undoes = [undo for item in objects for undo in (_attributes(item), _hooks(item))]

    def put_back() -> None:
        for undo in undoes:
            undo()

    return put_back


def _attributes(item: Any) -> Undo:
    """Plain attributes of one object: bound as they were, containers filled as they were."""
    own = vars(item)
    skipped = INTERNAL if isinstance(item, nn.Module) else frozenset[str]()
    kept = own.copy()
    refills = [
        refill
        for name, value in own.items()
        if type(value) not in SCALARS and name not in skipped
        for refill in _contents(value)
    ]

    def put_back() -> None:
        if not _same(own, kept):
            _rebind(own, kept, skipped)
        for refill in refills:
            refill()

    return put_back


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether both hold the same objects by the same names, in the same order."""
    names = len(a) == len(b) and all(map(is_, a, b))
    return names and all(map(is_, a.values(), b.values()))


def _rebind(own: dict[str, Any], kept: dict[str, Any], skipped: frozenset[str]) -> None:
    """Bind what is plain as in `kept`, and take away what is new."""
    for name in [n for n in own if n not in kept and n not in skipped]:
        if isinstance(own[name], (*SCALARS, *CONTAINERS)):
            del own[name]
    for name, value in kept.items():
        plain = isinstance(value, (*SCALARS, *CONTAINERS, torch.Tensor))
        if plain and name not in skipped and own.get(name, own) is not value:
            own[name] = value


def _hooks(item: Any) -> Undo:
    own = vars(item) if isinstance(item, nn.Module) else {}
    filled = [(own[name], frozenset(own[name])) for name in HOOKS if name in own]

    def put_back() -> None:
        for hooks, known in filled:
            if hooks:
                for added in hooks.keys() - known:
                    del hooks[added]

    return put_back


def _contents(value: Any) -> list[Undo]:
    """What fills a container, or a small tensor, again."""
    if isinstance(value, torch.Tensor):
        if isinstance(value, nn.Parameter) or value.numel() > MOST_NUMBERS:
            return []
        return [functools.partial(_write, value, value.detach().clone())]
    if not isinstance(value, CONTAINERS):
        return []
    undoes: list[Undo] = []
    queue, room = [value], MOST
    while queue:
        part = queue.pop()
        room -= len(part)
        if room < 0:
            return []
        undoes.append(functools.partial(_refill, part, part.copy()))
        inside = part.values() if isinstance(part, dict) else part
        queue += [each for each in inside if isinstance(each, CONTAINERS)]
    return undoes


def _write(tensor: torch.Tensor, value: torch.Tensor) -> None:
    if tensor.shape == value.shape and not torch.equal(tensor.detach(), value):
        with torch.no_grad():
            tensor.copy_(value)


def _refill(container: Any, copy: Any) -> None:
    """Put into `container` what it held when it was copied: the same objects, in their order."""
    keys = list(container) if isinstance(container, dict) else []
    now = container.values() if keys else container
    before = copy.values() if isinstance(copy, dict) else copy
    same = len(container) == len(copy) and all(a is b for a, b in zip(now, before, strict=True))
    if same and keys == (list(copy) if isinstance(copy, dict) else []):
        return
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(copy)
    else:
        container.extend(copy)
