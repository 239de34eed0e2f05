"""Answers as spans of tokens: wholly right, and how far they overlap (Rajpurkar et al. 2016)."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np

from hf_recipe.trainer.metrics import Metric

PAIR = datasets.List(datasets.Value("int64"))


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
