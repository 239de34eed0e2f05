"""The lowest loss that a batch's labels allow, and that of the best constant answer.

Equal inputs under different labels, and label smoothing, leave an entropy that no model can go
below. For a causal language model equal inputs are equal prefixes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from hf_recipe.instruments.batches import Batch
from hf_recipe.instruments.subject import Subject


def floor_of(
    subject: Subject, batch: Batch, logits: torch.Tensor | None
) -> tuple[float, float, int]:
    """(lowest achievable loss, loss of the best constant answer, rows in conflict)."""
    labels = batch.labels
    smoothing = float(getattr(subject.args, "label_smoothing_factor", 0.0) or 0.0)
    if labels.is_floating_point() or logits is None:
        return _continuous_floor(batch, logits, labels.float())
    keys, classes = _keys(subject, batch, logits)
    count = int(logits.shape[-1]) if logits.ndim > 1 else int(classes.max()) + 1
    if count < 2:
        return _continuous_floor(batch, logits, labels.float())
    kept = [(key, k) for key, k in zip(keys, classes.tolist(), strict=True) if k != -100]
    if not kept:
        return 0.0, math.log(count), 0
    groups: dict[Any, list[int]] = {}
    for key, k in kept:
        groups.setdefault(key, []).append(k)
    floor = sum(len(g) * _entropy(g, count, smoothing) for g in groups.values()) / len(kept)
    constant = _entropy([k for _, k in kept], count, smoothing)
    conflicts = sum(len(g) for g in groups.values() if len(set(g)) > 1)
    # one class alone in the batch leaves nothing to tell apart; then coming down from ln(n) counts
    if constant - floor < 1e-6:
        constant = math.log(count)
    return floor, constant, conflicts


def _entropy(classes: Sequence[int], count: int, smoothing: float) -> float:
    shares = torch.bincount(torch.tensor(classes), minlength=count).double() / len(classes)
    smoothed = (1 - smoothing) * shares + smoothing / count
    return float(torch.special.entr(smoothed).sum())


def _continuous_floor(
    batch: Batch, logits: torch.Tensor | None, labels: torch.Tensor
) -> tuple[float, float, int]:
    """Squared errors, or binary cross-entropy where labels have the logits' own shape."""
    flat = labels.reshape(len(labels), -1)
    keys = _row_keys(batch)
    groups: dict[Any, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    binary = logits is not None and flat.shape[1] > 1 and bool(((flat == 0) | (flat == 1)).all())

    def cost(rows: torch.Tensor) -> float:
        mean = rows.mean(0)
        if binary:
            return float((torch.special.entr(mean) + torch.special.entr(1 - mean)).mean())
        squares: torch.Tensor = (rows - mean) ** 2
        return float(squares.mean())

    floor = sum(cost(flat[g]) * len(g) for g in groups.values()) / max(1, len(flat))
    differing = [g for g in groups.values() if len(g) > 1 and cost(flat[g]) > 0]
    return floor, cost(flat), sum(len(g) for g in differing)


def _keys(subject: Subject, batch: Batch, logits: torch.Tensor) -> tuple[list[Any], torch.Tensor]:
    """For each supervised position: what it may depend on, and its class."""
    labels = batch.labels
    rows = _row_keys(batch)
    if labels.ndim == 1:
        return rows, labels
    ids = batch.inputs.get("input_ids")
    causal = ids is not None and type(subject.model).__name__.endswith(
        ("ForCausalLM", "LMHeadModel")
    )
    keys: list[Any] = []
    classes: list[torch.Tensor] = []
    for row in range(labels.shape[0]):
        if causal and ids is not None:
            tokens = ids[row].tolist()
            keys += [tuple(tokens[: t + 1]) for t in range(labels.shape[1] - 1)]
            classes.append(labels[row, 1:])
        else:
            keys += [(rows[row], t) for t in range(labels[row].numel())]
            classes.append(labels[row].reshape(-1))
    return keys, torch.cat(classes)


def _row_keys(batch: Batch) -> list[Any]:
    """Equal for rows whose inputs are equal."""
    size = len(batch)
    tensors = [
        value
        for name, value in sorted(batch.inputs.items())
        if isinstance(value, torch.Tensor)
        and value is not batch.labels
        and name not in ("labels", "label", "label_ids", "end_positions")
        and value.ndim
        and value.shape[0] == size
    ]
    return [tuple(t[i].detach().cpu().numpy().tobytes() for t in tensors) for i in range(size)]
