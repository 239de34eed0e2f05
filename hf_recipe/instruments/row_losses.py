"""The loss of every row of a batch, out of the model's own outputs, proved by its mean.

Heads differ in how they turn logits and labels into a loss. Instead of guessing which one this
is, every form that fits the shapes is tried, and the one whose mean is the batch's own loss is
taken; where none is, there are no row losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F

TOLERANCE = 2e-3  # relative; bf16 losses carry three digits


def row_losses(
    outputs: Any, labels: Any, loss: float, *, smoothing: float = 0.0
) -> torch.Tensor | None:
    """The loss of each row, shape (rows,), or None where no known form gives the batch's loss.

    Args:
        outputs: what the model returned: a mapping with ``logits``, or a tuple.
        labels: the batch's labels.
        loss: the batch's mean loss, in the model's own unit.
        smoothing: label smoothing that the Trainer applies.
    """
    logits = logits_of(outputs)
    if logits is None or not isinstance(labels, torch.Tensor):
        return None
    for rows, mean in _forms(logits.detach().float(), labels, smoothing):
        if abs(mean - loss) <= TOLERANCE * max(abs(loss), 1e-3):
            return rows
    return None


def logits_of(outputs: Any) -> torch.Tensor | None:
    """The logits in a model's outputs, or None."""
    if isinstance(outputs, Mapping):
        found = outputs.get("logits")
    elif isinstance(outputs, (tuple, list)):
        found = next((o for o in outputs if isinstance(o, torch.Tensor) and o.ndim > 0), None)
    else:
        found = getattr(outputs, "logits", None)
    return found if isinstance(found, torch.Tensor) else None


def _forms(
    logits: torch.Tensor, labels: torch.Tensor, smoothing: float
) -> Iterator[tuple[torch.Tensor, float]]:
    """(row losses, mean over what the head would average over), for every form that fits."""
    if labels.is_floating_point() or labels.shape == logits.shape:
        target = labels.float()
        if logits.shape == target.shape and logits.ndim > 1:
            yield _per_row(F.binary_cross_entropy_with_logits(logits, target, reduction="none"))
        flat = logits.squeeze(-1) if logits.shape != target.shape else logits
        if flat.shape == target.shape:
            yield _per_row(F.mse_loss(flat, target, reduction="none"))
            yield _per_row(F.l1_loss(flat, target, reduction="none"))
            yield _per_row(F.smooth_l1_loss(flat, target, reduction="none"))
        return
    if logits.shape[:-1] == labels.shape:
        yield _cross_entropy(logits, labels, smoothing)
        if labels.ndim == 2 and labels.shape[1] > 1:
            yield _cross_entropy(logits[:, :-1], labels[:, 1:], smoothing)
    elif (
        logits.ndim == labels.ndim + 1
        and logits.shape[0] == labels.shape[0]
        and logits.shape[2:] == labels.shape[1:]  # (rows, classes, height, width)
    ):
        yield _cross_entropy(logits.movedim(1, -1), labels, smoothing)
    if logits.ndim == 2 and logits.shape[1] == 1 and logits.shape[0] == labels.numel():
        yield _per_row(F.mse_loss(logits[:, 0], labels.reshape(-1).float(), reduction="none"))


def _per_row(each: torch.Tensor) -> tuple[torch.Tensor, float]:
    rows = each.reshape(each.shape[0], -1).mean(1)
    return rows, float(rows.mean())


def _cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, smoothing: float
) -> tuple[torch.Tensor, float]:
    """Mean over supervised positions in each row; rows without one are NaN."""
    flat = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        labels.reshape(-1).long().clamp(max=logits.shape[-1] - 1),
        ignore_index=-100,
        reduction="none",
        label_smoothing=smoothing,
    ).reshape(labels.shape[0], -1)
    counted = (labels != -100).reshape(labels.shape[0], -1)
    total, count = flat.sum(1), counted.sum(1)
    mean = float(total.sum() / count.sum().clamp(min=1))
    return torch.where(count > 0, total / count.clamp(min=1), torch.nan), mean
