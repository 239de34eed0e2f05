"""Comparing a model with its reloaded self: tensors by name, outputs on the same rows."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as hf_logging

from hf_recipe.instruments.quiet import restore_random_state, save_random_state
from hf_recipe.instruments.subject import Subject


def is_half(model: nn.Module) -> bool:
    """Whether any weight is in half precision."""
    return any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())


def lost_tensors(model: nn.Module, stored: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """Names in the model's state that `stored` lacks or holds differently.

    Of names that share one tensor it is enough that one is stored.
    """
    state = {k: t for k, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    held = {(t.data_ptr(), t.shape) for name, t in state.items() if name in stored and t.numel()}
    lost = []
    for name, tensor in state.items():
        kept = stored.get(name)
        if kept is None and (tensor.data_ptr(), tensor.shape) in held:
            continue
        if kept is None or not same_values(tensor, kept):
            lost.append(name)
    return tuple(lost)


def same_values(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two tensors are the same numbers, in the type of `theirs`; NaN equals NaN."""
    if ours.shape != theirs.shape:
        return False
    ours = ours.detach().cpu().to(theirs.dtype)
    return torch.equal(ours.nan_to_num(), theirs.detach().cpu().nan_to_num())


def difference_of_outputs(
    subject: Subject, first: nn.Module, second: nn.Module, inputs: Mapping[str, Any]
) -> float:
    """Largest difference between two models' outputs on `inputs`, over the outputs' mean size.

    Both in evaluation mode and from the same random state. Infinite where shapes differ; NaN
    never: where both are NaN they agree.
    """
    random_state, outputs = save_random_state(), []
    for model in (first, second):
        model.eval().to(subject.device)
        restore_random_state(random_state)
        with torch.no_grad(), subject.trainer.compute_loss_context_manager():
            outputs.append(_tensors(model(**inputs)))
    worst = 0.0
    for ours, theirs in zip(*outputs, strict=False):
        if ours.shape != theirs.shape:
            return math.inf
        ours, theirs = ours.double().nan_to_num(), theirs.double().nan_to_num()
        spread = max(float(ours.abs().mean()), 1e-6)
        worst = max(worst, float((ours - theirs).abs().max()) / spread)
    return worst


def _tensors(outputs: Any) -> list[torch.Tensor]:
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    return [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """No progress bars and no notes about loading inside."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(hf_logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
