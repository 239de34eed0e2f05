"""Made-up training rows for the main job: rows between, or of, rows of one class.

They are half-fake: numbers and pictures go part of the way to the nearest row of their class,
texts take a run of tokens from another text of theirs. Evaluation sees real rows alone.
"""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import torch

from hf_recipe.regularize.augment_rows import Interpolate, SpanMix
from hf_recipe.regularize.simulate import PROVENANCE, Simulated
from hf_recipe.runner.feed import Feed, TensorRows
from hf_recipe.runner.setup import Setup

MOST = 4096  # rows that neighbours are looked for among


def training_rows(feed: Feed, setup: Setup, seed: int) -> Any:
    """The rows that `setup` learns from, with as large a share of made-up ones as it says."""
    rows, share = feed.some(setup.part, setup.rows, seed), setup.simulated
    if not share:
        return rows
    if isinstance(rows, datasets.Dataset):
        made = Simulated(_texts(feed, rows), share, seed).mix(rows)
        return made.remove_columns(PROVENANCE)
    count = round(len(rows) * share / (1 - share))
    chosen = torch.as_tensor(np.random.default_rng(seed).choice(len(rows), min(count, MOST)))
    values, labels = _between(rows, chosen, seed)
    return TensorRows(
        rows.name, torch.cat([rows.values, values]), torch.cat([rows.labels, labels]), rows.change
    )


def _between(rows: TensorRows, chosen: torch.Tensor, seed: int) -> tuple[Any, Any]:
    flat = rows.values[chosen].flatten(1).float()
    batch = {"features": flat, "labels": rows.labels[chosen]}
    moved = Interpolate(share=1.0)(batch, torch.Generator().manual_seed(seed))
    values = moved["features"].reshape(rows.values[chosen].shape)
    if not rows.values.is_floating_point():
        values = values.round().clamp(0, 255)
    return values.to(rows.values.dtype), moved["labels"].to(rows.labels.dtype)


def _texts(feed: Feed, rows: datasets.Dataset) -> Any:
    """A generator of tokenized texts, each with a run of tokens of another one of its class."""
    change = SpanMix(special=feed.processing_class.all_special_ids)

    def make(count: int, draw: np.random.Generator) -> list[dict[str, Any]]:
        chosen = [rows[int(i)] for i in draw.choice(len(rows), count)]
        seeds = torch.Generator().manual_seed(int(draw.integers(2**31)))
        made: list[dict[str, Any]] = []
        for start in range(0, count, 256):
            part = chosen[start : start + 256]
            batch = change(dict(feed.collate(part)), seeds)
            for row, ids in zip(part, batch["input_ids"], strict=True):
                made.append({**row, "input_ids": ids[: len(row["input_ids"])].tolist()})
        return made

    return make
