"""The recipe's line "generalise a special case": a loop first, the vectorised form checked by it.

Karpathy: "I like to write a very specific function to what I'm doing right now, get that to work,
and then generalize it later making sure that I get the same result." Here the same result means
the same values and the same gradients, on inputs whose axes all differ in size, so that a swapped
axis cannot hide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Function = Callable[..., Any]


def assert_equivalent(
    loop_fn: Function,
    vectorised_fn: Function,
    example_inputs: Any,
    *,
    rtol: float = 1e-4,
    atol: float = 1e-6,
    gradients: bool = True,
    equal_sizes: bool = False,
) -> None:
    """Assert that two functions give the same values and the same gradients of their inputs.

    Args:
        loop_fn: the slow and certain one.
        vectorised_fn: the one to be trusted afterwards.
        example_inputs: the arguments: a tuple, or a mapping of names; a list of these tries
            several. The functions see copies: one that writes into its inputs is compared too.
        rtol, atol: allowed difference, relative to the largest value of the tensor and absolute;
            the defaults bear single precision and another order of sums.
        gradients: whether to compare gradients of floating-point inputs, through a random
            projection of the outputs.
        equal_sizes: allow an input whose axes are equally long.

    Raises:
        AssertionError: where and by how much they differ.
        ValueError: an input has axes of equal length: a swapped axis would not show.
    """
    cases = example_inputs if isinstance(example_inputs, list) else [example_inputs]
    if not cases:
        raise ValueError("example_inputs is empty: nothing would be compared")
    for number, case in enumerate(cases):
        name = f"example {number}: " if len(cases) > 1 else ""
        args, kwargs = _arguments(case)
        if not equal_sizes:
            _refuse_equal_sizes([*args, *kwargs.values()])
        _compare(loop_fn, vectorised_fn, args, kwargs, name, rtol, atol, gradients)


def _arguments(case: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(case, Mapping):
        return (), dict(case)
    return (tuple(case), {}) if isinstance(case, tuple) else ((case,), {})


def _refuse_equal_sizes(values: Sequence[Any]) -> None:
    for value in values:
        if not isinstance(value, torch.Tensor):
            continue
        sizes = [size for size in value.shape if size > 1]
        if len(set(sizes)) < len(sizes):
            raise ValueError(
                f"an input of shape {tuple(value.shape)} has axes of equal length, so a swapped "
                "axis would not show: give each its own size, or set equal_sizes=True"
            )


def _compare(
    first: Function,
    second: Function,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    name: str,
    rtol: float,
    atol: float,
    gradients: bool,
) -> None:
    state = torch.get_rng_state()
    outcomes = []
    for function in (first, second):
        torch.set_rng_state(state)  # noise is drawn alike
        leaves: list[torch.Tensor] = []
        mine = [_copy(value, leaves) for value in args]
        named = {key: _copy(value, leaves) for key, value in kwargs.items()}
        made = _flat(function(*mine, **named), "output")
        outcomes.append((made, leaves))
    torch.set_rng_state(state)
    (ours, inputs), (theirs, others) = outcomes
    if ours.keys() != theirs.keys():
        raise AssertionError(
            f"{name}the loop returns {_list(ours)}, the vectorised form {_list(theirs)}"
        )
    for place, value in ours.items():
        _same(value, theirs[place], f"{name}{place}", rtol, atol)
    if not gradients or not inputs:
        return
    found = _gradients(ours, inputs), _gradients(theirs, others)
    for index, (a, b) in enumerate(zip(*found, strict=True)):
        _same(a, b, f"{name}gradient of input {index}", rtol, atol)


def _copy(value: Any, leaves: list[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        copied = value.detach().clone()
        if copied.is_floating_point():
            leaves.append(copied.requires_grad_(True))
            return copied.clone()  # a function may write into it
        return copied
    if isinstance(value, Mapping):
        return {key: _copy(item, leaves) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copy(item, leaves) for item in value)
    return value


def _flat(value: Any, place: str) -> dict[str, Any]:
    """Everything in nested outputs by its place."""
    if isinstance(value, Mapping):
        parts = [(f"{place}[{key!r}]", item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        parts = [(f"{place}[{index}]", item) for index, item in enumerate(value)]
    else:
        return {place: value}
    return {k: v for name, item in parts for k, v in _flat(item, name).items()}


def _list(places: Mapping[str, Any]) -> str:
    return ", ".join(places)


def _gradients(outputs: Mapping[str, Any], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Of a random projection of every output that has a gradient; zeros where none comes back."""
    draw = torch.Generator().manual_seed(0)
    total = torch.zeros(())
    for value in outputs.values():
        if isinstance(value, torch.Tensor) and value.requires_grad:
            direction = torch.randn(value.shape, generator=draw, dtype=torch.double)
            total = total + (value.double() * direction.to(value.device)).sum().cpu()
    if not total.requires_grad:
        return [torch.zeros_like(leaf) for leaf in inputs]
    found = torch.autograd.grad(total, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def _same(a: Any, b: Any, place: str, rtol: float, atol: float) -> None:
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        real = isinstance(a, float) and isinstance(b, float)
        if not (math.isclose(a, b, rel_tol=rtol, abs_tol=atol) if real else a == b):
            raise AssertionError(f"{place}: {a!r} in the loop, {b!r} vectorised")
        return
    if a.shape != b.shape:
        raise AssertionError(
            f"{place}: shape {tuple(a.shape)} in the loop, {tuple(b.shape)} vectorised"
        )
    x, y = a.detach().double().cpu(), b.detach().double().cpu()
    equal = (x == y) | (x.isnan() & y.isnan())
    gap = torch.where(equal, 0.0, (x - y).abs())
    finite = x[x.isfinite()]
    allowed = atol + rtol * (float(finite.abs().max()) if finite.numel() else 0.0)
    wrong = ~(gap <= allowed)
    if not bool(wrong.any()):
        return
    where = tuple(int(i) for i in wrong.nonzero()[0])
    first = f"{float(x[where]):.6g} in the loop, {float(y[where]):.6g} vectorised"
    raise AssertionError(
        f"{place}: {int(wrong.sum())} of {wrong.numel()} numbers differ by more than "
        f"{allowed:.2g}; first at {list(where)}: {first}"
    )
