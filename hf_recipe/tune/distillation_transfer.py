"""Matching what happens inside student and teacher: relations of hidden states, attention maps.

A layer's *relations* are how its positions attend to each other by their hidden states alone,
softmax(h h^T / sqrt(width)): a (length, length) map whatever the width, so a narrow student needs
no projection (after MiniLM, Wang et al. 2020, which relates values in the same way). Layers are
named in pairs; ``hidden_states[-1]`` is after the final norm in Llama-like models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Pairs = Sequence[Sequence[int]]


def relation_transfer(student: Any, teacher: Any, pairs: Pairs, attended: Tensor | None) -> Tensor:
    """KL(teacher || student) of the relations, mean over positions and pairs: (batch,).

    Args:
        student, teacher: outputs with ``hidden_states``, or ``decoder_hidden_states``.
        pairs: (student layer, teacher layer), as indices of hidden_states.
        attended: (batch, length), 0 at padding; None: everything is attended.
    """
    ours, theirs = _layers(student, "hidden_states"), _layers(teacher, "hidden_states")
    maps = [
        (_relations(ours[s], attended), _relations(theirs[t].to(ours[s].device), attended))
        for s, t in pairs
    ]
    return _mean_divergence([(q, p.detach()) for q, p in maps], attended)


def attention_transfer(student: Any, teacher: Any, pairs: Pairs, attended: Tensor | None) -> Tensor:
    """KL(teacher || student) of attention maps, averaged over heads first: (batch,).

    Raises:
        ValueError: a model that returns no attentions.
    """
    ours, theirs = _layers(student, "attentions"), _layers(teacher, "attentions")
    maps = []
    for s, t in pairs:
        q = ours[s - 1 if s > 0 else s].float().mean(1).clamp(min=1e-9).log()
        p = theirs[t - 1 if t > 0 else t].float().mean(1).clamp(min=1e-9).log()
        maps.append((q, p.detach().to(q.device)))
    return _mean_divergence(maps, attended)


def _layers(outputs: Any, name: str) -> Sequence[Tensor]:
    layers = outputs.get(f"decoder_{name}") or outputs.get(name)
    if not layers or layers[-1] is None:
        raise ValueError(
            f"the model returns no {name}"
            + ('; load it with attn_implementation="eager"' if name == "attentions" else "")
        )
    return layers  # type: ignore[no-any-return]


def _relations(hidden: Tensor, attended: Tensor | None) -> Tensor:
    """Log-probabilities (batch, length, length) of position j as seen from position i."""
    states = hidden.float().flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden.float()
    scores = states @ states.transpose(1, 2) / states.shape[-1] ** 0.5
    if attended is not None and attended.shape[-1] == scores.shape[-1]:
        scores = scores.masked_fill(attended[:, None, :] == 0, torch.finfo(scores.dtype).min)
    return torch.log_softmax(scores, dim=-1)


def _mean_divergence(maps: list[tuple[Tensor, Tensor]], attended: Tensor | None) -> Tensor:
    rows = torch.stack([(p.exp() * (p - q)).sum(-1) for q, p in maps]).mean(0)  # (batch, length)
    if attended is None or attended.shape[-1] != rows.shape[-1]:
        return rows.mean(-1)
    seen = attended.to(rows.dtype)
    return (rows * seen).sum(-1) / seen.sum(-1).clamp(min=1)
