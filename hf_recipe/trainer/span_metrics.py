"""Metrics of spans: entities in tagged words, and answers in a text.

An entity counts where its first word, its last word and its kind are all right (Tjong Kim Sang
and De Meulder 2003, CoNLL); an answer by its overlap too (Rajpurkar et al. 2016).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np

from hf_recipe.trainer.metrics import Metric

TAGS = datasets.List(datasets.Value("string"))
PAIR = datasets.List(datasets.Value("int64"))


def is_bio(names: Sequence[str]) -> bool:
    """Whether tags are "O", "B-..." and "I-...", so that words make entities."""
    return "O" in names and all(n == "O" or n.startswith(("B-", "I-")) for n in names)


def spans(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """(first word, last word, kind) of each entity; an I- that continues none begins one."""
    found: set[tuple[int, int, str]] = set()
    begin, kind = 0, ""
    for place, tag in enumerate([*tags, "O"]):
        own = tag[2:] if tag != "O" else ""
        if kind and not (tag.startswith("I-") and own == kind):
            found.add((begin, place - 1, kind))
            kind = ""
        if own and not kind:
            begin, kind = place, own
    return found


class EntityF1(Metric):
    """Precision, recall and F1 over the entities of all rows, in 0..1."""

    summary = "F1 over entities."
    inputs = "predictions, references: a list of tags for each row"
    columns = {"predictions": TAGS, "references": TAGS}

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        seen = true = right = 0
        for row, labels in zip(predictions, references, strict=True):
            made, wanted = spans(row), spans(labels)
            seen, true, right = seen + len(made), true + len(wanted), right + len(made & wanted)
        return {
            "precision": right / seen if seen else 0.0,
            "recall": right / true if true else 0.0,
            "f1": 2 * right / (seen + true) if seen + true else 0.0,
        }


class SpanMatch(Metric):
    """Exact match, and the mean over rows of F1 between the tokens of both spans, in 0..1."""

    summary = "Exact match and F1 of spans."
    inputs = "predictions, references: [first token, last token] of each row"
    columns = {"predictions": PAIR, "references": PAIR}

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        seen, true = np.asarray(predictions), np.asarray(references)
        first, last = np.maximum(seen[:, 0], true[:, 0]), np.minimum(seen[:, 1], true[:, 1])
        shared = np.clip(last - first + 1, 0, None)
        sizes = (seen[:, 1] - seen[:, 0] + 1) + (true[:, 1] - true[:, 0] + 1)
        return {
            "exact_match": float((seen == true).all(1).mean()),
            "f1": float((2 * shared / sizes).mean()),
        }
