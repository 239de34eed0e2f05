"""Changes of tokens and of numbers in a collated batch, and mixing of rows of any kind.

Padding and special tokens are never touched, nor is a row's last ordinary token. Labels that stand
at positions stay with their positions; what moves tokens about refuses such labels.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from hf_recipe.regularize.augment import Values, inputs_of, need, per_row_labels

Tensor = torch.Tensor


def beta(a: float, b: float, count: int, draw: torch.Generator) -> Tensor:
    """Beta(a, b) numbers from `draw`, through two Gammas."""
    import numpy as np

    numbers = np.random.default_rng(int(torch.randint(2**62, (), generator=draw)))
    return torch.as_tensor(numbers.beta(a, b, count), dtype=torch.float32)


def mixed_labels(labels: Tensor, order: Tensor, own: Tensor, draw: torch.Generator) -> Tensor:
    """Labels of rows of which a share `own` is theirs and the rest that of row `order`.

    Numbers are averaged; a class is drawn, by the shares.
    """
    own, order = own.to(labels.device), order.to(labels.device)
    other = labels[order]
    if labels.is_floating_point():
        weight = own.reshape(-1, *([1] * (labels.ndim - 1))).to(labels.dtype)
        return labels * weight + other * (1 - weight)
    keeps = torch.rand(len(labels), generator=draw).to(labels.device) < own
    return torch.where(keeps.reshape(-1, *([1] * (labels.ndim - 1))), labels, other)


@dataclass(frozen=True)
class MixUp:
    """Averages each row with another of the batch (Zhang et al. 2018); images and numbers.

    Class labels stay whole: the one or the other is drawn by the shares, which has the same
    expected loss as mixed labels and which every head takes. Targets that are numbers are averaged.

    Args:
        alpha: of the Beta distribution of shares; 0.2: most rows stay nearly what they were.
    """

    alpha: float = 0.2

    def __post_init__(self) -> None:
        need(self.alpha > 0, f"alpha must be positive; got {self.alpha}")

    def __call__(self, batch: Values, draw: torch.Generator) -> Values:
        inputs, found = inputs_of(batch), per_row_labels(batch, "MixUp")
        need(bool(inputs), "MixUp mixes images and numbers; this batch has neither")
        count = len(next(iter(inputs.values())))
        order = torch.randperm(count, generator=draw)
        own = beta(self.alpha, self.alpha, count, draw)
        changed = dict(batch)
        for name, value in inputs.items():
            weight = own.to(value).reshape(-1, *([1] * (value.ndim - 1)))
            changed[name] = value * weight + value[order.to(value.device)] * (1 - weight)
        if found is not None:
            changed[found[0]] = mixed_labels(found[1], order, own, draw)
        return changed


@dataclass(frozen=True)
class Jitter:
    """Adds normal noise to numbers, (rows, columns).

    Args:
        strength: its standard deviation, as a share of each column's own in the batch; a column
            of whole numbers alone (counts, codes) is left as it is.
    """

    strength: float = 0.1

    def __post_init__(self) -> None:
        need(self.strength >= 0, f"strength must not be negative; got {self.strength}")

    def __call__(self, batch: Values, draw: torch.Generator) -> Values:
        changed = dict(batch)
        for name, value in inputs_of(batch).items():
            if value.ndim == 2:
                noise = torch.randn(value.shape, generator=draw).to(value)
                spread = value.std(0, correction=0) * (value != value.round()).any(0)
                changed[name] = value + self.strength * spread * noise
        return changed


@dataclass(frozen=True)
class Interpolate:
    """Moves rows of numbers towards their nearest neighbour of the same class in the batch.

    As SMOTE does (Chawla et al. 2002), for every class. Targets that are numbers move along.

    Args:
        share: of rows that move, each by a uniform share of the way.
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        need(0 <= self.share <= 1, f"share must be in 0..1; got {self.share}")

    def __call__(self, batch: Values, draw: torch.Generator) -> Values:
        found = per_row_labels(batch, "Interpolate")
        need(found is not None, "Interpolate needs labels in the batch")
        assert found is not None
        label_name, labels = found
        changed = dict(batch)
        inputs = {k: v for k, v in inputs_of(batch).items() if v.ndim == 2}
        if not inputs:
            return changed
        spread = [(v - v.mean(0)) / v.std(0, correction=0).clamp(min=1e-6) for v in inputs.values()]
        distance = torch.cdist(torch.cat(spread, 1), torch.cat(spread, 1))
        if not labels.is_floating_point():
            distance = distance.masked_fill(labels.reshape(-1, 1) != labels.reshape(1, -1), 1e30)
        distance.fill_diagonal_(2e30)
        nearest, place = distance.min(1)
        moves = torch.rand(len(labels), generator=draw).to(distance.device) < self.share
        way = torch.rand(len(labels), generator=draw).to(distance) * (moves & (nearest < 1e30))
        for name, value in inputs.items():
            changed[name] = value + way[:, None].to(value) * (value[place] - value)
        if labels.is_floating_point():
            shape = (-1, *([1] * (labels.ndim - 1)))
            changed[label_name] = labels + way.to(labels).reshape(shape) * (labels[place] - labels)
        return changed


# ---------------------------------------------------------------- tokens


@dataclass(frozen=True, kw_only=True)
class _TokenChange:
    """Base of changes of ``input_ids``.

    Args:
        special: ids that are never touched (beginning, end, separators).
    """

    special: Collection[int] = ()

    def _free(self, batch: Values) -> tuple[Tensor, Tensor]:
        """Ids, and which of them may change."""
        ids = batch.get("input_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            raise ValueError(
                f"{type(self).__name__} changes input_ids of shape (rows, tokens); "
                f"the batch has {', '.join(batch)}"
            )
        mask = batch.get("attention_mask")
        free = torch.ones_like(ids, dtype=torch.bool)
        if isinstance(mask, Tensor) and mask.shape == ids.shape:
            free = mask != 0
        if self.special:
            free &= ~torch.isin(ids, torch.tensor(sorted(self.special), device=ids.device))
        return ids, free


def _least_one(chosen: Tensor, free: Tensor) -> Tensor:
    """`chosen`, but never all free tokens of a row: the last of them stays."""
    all_gone = (free & ~chosen).sum(1) == 0
    positions = torch.arange(free.shape[1], device=free.device)
    last = torch.where(free, positions, -1).max(1).values
    spare = all_gone[:, None] & (positions[None] == last[:, None])
    return chosen & ~spare


@dataclass(frozen=True, kw_only=True)
class TokenDropout(_TokenChange):
    """Replaces single tokens by the mask token (or the unknown one); positions stay.

    Args:
        replacement: id put in their place.
        share: of tokens, in expectation.
    """

    replacement: int = 0
    share: float = 0.1

    def __post_init__(self) -> None:
        need(0 <= self.share < 1, f"share must be in 0..1; got {self.share}")

    def __call__(self, batch: Values, draw: torch.Generator) -> Values:
        ids, free = self._free(batch)
        hit = torch.rand(ids.shape, generator=draw).to(ids.device) < self.share
        chosen = _least_one(hit & free, free)
        return {**batch, "input_ids": ids.masked_fill(chosen, self.replacement)}


@dataclass(frozen=True, kw_only=True)
class SpanMask(_TokenChange):
    """Replaces runs of neighbouring tokens.

    Args:
        replacement: id put in their place.
        share: of tokens, in expectation, before runs overlap.
        length: tokens of a run.
    """

    replacement: int = 0
    share: float = 0.1
    length: int = 3

    def __post_init__(self) -> None:
        need(0 <= self.share < 1 and self.length >= 1, f"share in 0..1 and length >= 1; got {self}")

    def __call__(self, batch: Values, draw: torch.Generator) -> Values:
        ids, free = self._free(batch)
        starts = torch.rand(ids.shape, generator=draw).to(ids.device) < self.share / self.length
        hit = starts.clone()
        for step in range(1, min(self.length, ids.shape[1])):
            hit[:, step:] |= starts[:, :-step]
        chosen = _least_one(hit & free, free)
        return {**batch, "input_ids": ids.masked_fill(chosen, self.replacement)}


@dataclass(frozen=True, kw_only=True)
class Swap(_TokenChange):
    """Swaps random tokens of a row with each other (Wei and Zou 2019).

    Args:
        share: of tokens that change their place.
    """

    share: float = 0.1

    def __post_init__(self) -> None:
        need(0 <= self.share <= 1, f"share must be in 0..1; got {self.share}")

    def __call__(self, batch: Values, draw: torch.Generator) -> Values:
        per_row_labels(batch, "Swap")
        ids, free = self._free(batch)
        hit = torch.rand(ids.shape, generator=draw).to(ids.device) < self.share
        changed = ids.clone()
        for row, chosen in enumerate(hit & free):
            places = chosen.nonzero()[:, 0]
            order = torch.randperm(len(places), generator=draw).to(ids.device)
            changed[row, places] = ids[row, places[order]]
        return {**batch, "input_ids": changed}


@dataclass(frozen=True, kw_only=True)
class SpanMix(_TokenChange):
    """Copies a run of tokens from another row of the same class to the same positions.

    Args:
        share: length of the run, as a share of the longest row.
    """

    share: float = 0.2

    def __post_init__(self) -> None:
        need(0 < self.share < 1, f"share must be in 0..1; got {self.share}")

    def __call__(self, batch: Values, draw: torch.Generator) -> Values:
        found = per_row_labels(batch, "SpanMix")
        classes = found is not None and not found[1].is_floating_point()
        need(classes, "SpanMix needs a class label per row")
        assert found is not None
        labels, (ids, free) = found[1].reshape(-1), self._free(batch)
        length = max(1, round(self.share * ids.shape[1]))
        changed = ids.clone()
        for row in range(len(ids)):
            peers = (labels == labels[row]).nonzero()[:, 0]
            peers = peers[peers != row]
            if not len(peers):
                continue
            peer = peers[int(torch.randint(len(peers), (), generator=draw))]
            start = int(torch.randint(max(1, ids.shape[1] - length + 1), (), generator=draw))
            span = slice(start, start + length)
            both = free[row, span] & free[peer, span]
            changed[row, span] = torch.where(both, ids[peer, span], ids[row, span])
        return {**batch, "input_ids": changed}


def token_settings(tokenizer: Any) -> dict[str, Any]:
    """``special`` and ``replacement`` of a tokenizer, for the changes of tokens.

    Raises:
        ValueError: it has neither a mask token nor an unknown one to put in a token's place.
    """
    replacement = getattr(tokenizer, "mask_token_id", None)
    if replacement is None:
        replacement = getattr(tokenizer, "unk_token_id", None)
    if replacement is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has neither a mask token nor an unknown token; "
            "give the change its replacement=, or use Swap"
        )
    special = frozenset(int(i) for i in tokenizer.all_special_ids)
    return {"special": special, "replacement": int(replacement)}
