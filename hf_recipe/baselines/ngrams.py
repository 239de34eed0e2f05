"""The simplest models of tokens: they count, and back off to shorter contexts.

Witten and Bell's smoothing (1991): a context that was followed by many different tokens gives
more of its weight to the shorter one.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import torch

IGNORED = -100


class NGram:
    """The next token out of the one or two before it.

    Args:
        order: 2: bigram, 3: trigram.
    """

    def __init__(self, order: int) -> None:
        if order not in (2, 3):
            raise ValueError(f"order is 2 or 3; got {order}")
        self.order = order
        self.name = {2: "bigram", 3: "trigram"}[order]
        self.follows: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)

    def learn(self, ids: torch.Tensor, labels: torch.Tensor) -> None:
        """Count supervised tokens under every shorter context.

        Args:
            ids, labels: (rows, positions); -100 is not supervised; label t is predicted from
                the tokens before t.
        """
        for row, target in zip(ids.tolist(), labels.tolist(), strict=True):
            for place in range(1, len(row)):
                if target[place] == IGNORED:
                    continue
                for size in range(self.order):
                    if size <= place:
                        self.follows[tuple(row[place - size : place])][target[place]] += 1

    def losses(self, ids: torch.Tensor, labels: torch.Tensor) -> list[float]:
        """Mean nats of each row's supervised tokens; NaN for a row without one."""
        found = []
        for row, target in zip(ids.tolist(), labels.tolist(), strict=True):
            nats = [
                -math.log(self.chance(row[max(0, place - self.order + 1) : place], target[place]))
                for place in range(1, len(row))
                if target[place] != IGNORED
            ]
            found.append(math.fsum(nats) / len(nats) if nats else math.nan)
        return found

    def chance(self, context: list[int], token: int) -> float:
        """Probability of `token` after `context`, mixed from all shorter contexts."""
        seen = self.follows.get((), Counter())
        chance = 1.0 / (len(seen) + 1)  # one more class for all that was never seen
        for size in range(len(context) + 1):
            counts = self.follows.get(tuple(context[len(context) - size :]))
            if counts:
                total, kinds = sum(counts.values()), len(counts)
                chance = (counts[token] + kinds * chance) / (total + kinds)
        return chance


class Tagger:
    """A label out of the token it stands at, backing off to the labels' frequencies."""

    name = "tagger"

    def __init__(self) -> None:
        self.labels: Counter[int] = Counter()
        self.of_token: dict[int, Counter[int]] = defaultdict(Counter)

    def learn(self, ids: torch.Tensor, labels: torch.Tensor) -> None:
        """Count labels by token; ids, labels: (rows, positions)."""
        for token, label in zip(ids.reshape(-1).tolist(), labels.reshape(-1).tolist(), strict=True):
            if label != IGNORED:
                self.labels[label] += 1
                self.of_token[token][label] += 1

    def losses(self, ids: torch.Tensor, labels: torch.Tensor) -> list[float]:
        """Mean nats of each row's supervised labels; NaN for a row without one."""
        found = []
        for row, target in zip(ids.tolist(), labels.tolist(), strict=True):
            nats = [
                -math.log(self.chance(token, label))
                for token, label in zip(row, target, strict=True)
                if label != IGNORED
            ]
            found.append(math.fsum(nats) / len(nats) if nats else math.nan)
        return found

    def chance(self, token: int, label: int) -> float:
        """Probability of `label` at `token`."""
        total, kinds = sum(self.labels.values()), len(self.labels)
        chance = (self.labels[label] + 1 / (kinds + 1)) / (total + 1)
        counts = self.of_token.get(token)
        if not counts:
            return chance
        return (counts[label] + len(counts) * chance) / (sum(counts.values()) + len(counts))
