"""Where a batch of tokens is padding: by its ids, and by the mask that comes with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hf_recipe.instruments.subject import Subject

SAMPLED = 64  # rows in which a config's padding token must stand at the ends alone


def pad_positions(
    subject: Subject, inputs: Mapping[str, Any], mask: torch.Tensor | None
) -> torch.Tensor | None:
    """Which positions of ``input_ids`` are padding, (rows, positions) bool; None: cannot be told.

    Told by runs of the padding token at either end of a row. Where no padding token is declared, a
    two-valued mask tells, unless what it keeps is one and the same token over and over.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.shape[1] < 2:
        return None
    token, shortest, declared = _pad_token(subject)
    found = None if token is None else _runs(ids, token, shortest)
    if token is not None and not declared and _stands_for_more(subject, token):
        found = None
    if found is not None and bool(found.any()):
        return found
    if mask is None or mask.shape != ids.shape or not bool((mask == 0).any()):
        return None
    left_out, kept = mask == 0, mask != 0
    kept_ids, other_ids = torch.unique(ids[kept]), torch.unique(ids[left_out])
    return kept if len(kept_ids) == 1 and len(other_ids) > 2 else left_out


def _stands_for_more(subject: Subject, token: int) -> bool:
    """Whether the config's padding token also stands inside rows, and so is a word like others."""
    key = f"padding token {token} stands for more"
    if key not in subject.cache:
        ids = subject.batch(size=SAMPLED).inputs["input_ids"]
        apart = (ids == token) & ~_runs(ids, token, 1)
        subject.cache[key] = bool(apart.any())
    return bool(subject.cache[key])


def _pad_token(subject: Subject) -> tuple[int | None, int, bool]:
    """The padding token, how long a run of it must be to count, and whether it is declared."""
    declared = getattr(subject.processing_class, "pad_token_id", None)
    closing = getattr(subject.processing_class, "eos_token_id", None)
    if declared is not None:
        return int(declared), 2 if declared == closing else 1, True
    config = subject.config
    token = getattr(config, "pad_token_id", None)
    # A config's default may be a real token.
    return (None if token is None else int(token)), 2, False


def _runs(ids: torch.Tensor, token: int, shortest: int) -> torch.Tensor:
    """Runs of `token` at either end of each row, at least `shortest` long."""
    same = (ids == token).long()
    trailing = same.flip(1).cumprod(1).flip(1)
    leading = same.cumprod(1)
    long_tail = trailing.sum(1, keepdim=True) >= shortest
    long_head = leading.sum(1, keepdim=True) >= shortest
    found = ((trailing == 1) & long_tail) | ((leading == 1) & long_head)
    return found & ~found.all(1, keepdim=True)
