"""The run's own optimizer for a few steps that leave no trace: empty state, weights put back."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from hf_recipe.core.check import Skip
from hf_recipe.instruments.subject import Subject


@contextlib.contextmanager
def spare_optimizer(subject: Subject, *, moves: bool) -> Iterator[torch.optim.Optimizer]:
    """The optimizer without its state; on exit state, rates and every weight are put back.

    Weights are kept on the CPU meanwhile. Call it quietly: gradients are the guard's affair.

    Args:
        subject: whose optimizer is lent.
        moves: at its first rate (a warm-up begins at 0), or at rate 0, so that a step costs what
            it costs and changes next to nothing.

    Raises:
        Skip: there is no optimizer.
    """
    if subject.optimizer is None:
        raise Skip("there is no optimizer before train() here, so its state has no room kept")
    optimizer = getattr(subject.optimizer, "optimizer", subject.optimizer)
    model: Any = subject.model
    args = subject.args
    state, groups = optimizer.state, [{**group} for group in optimizer.param_groups]
    weights = [(p, p.detach().to("cpu", copy=True)) for p in model.parameters()]
    recompute = bool(getattr(args, "gradient_checkpointing", False)) and not getattr(
        model, "is_gradient_checkpointing", True
    )
    if recompute:  # the Trainer switches it on in train()
        model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
    optimizer.state = defaultdict(dict)
    for group in optimizer.param_groups:
        if isinstance(group.get("lr"), (int, float)):  # Adafactor may have none
            group["lr"] = float(group.get("initial_lr", group["lr"])) if moves else 0.0
    try:
        yield optimizer
    finally:
        optimizer.state = state
        for group, kept in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(kept)
        if recompute:
            model.gradient_checkpointing_disable()
        put_back(weights)


def put_back(weights: list[tuple[torch.nn.Parameter, torch.Tensor]]) -> None:
    """Give every parameter its kept value, and no gradient."""
    with torch.no_grad():
        for parameter, value in weights:
            parameter.grad = None
            parameter.copy_(value)
