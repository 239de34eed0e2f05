"""The rows at another size: coarser or finer pictures, shorter texts, fewer columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.nn.functional as F

from hf_recipe.complexify.growth import coarser, fewer
from hf_recipe.runner.feed import Feed, Tensor, TensorRows


class ScaledFeed(Feed):
    """The same rows with a smaller or larger input; the network's shape changes above 1 alone.

    Args:
        feed: at its full size.
        share: of the side, the length or the number of columns.
    """

    def __init__(self, feed: Feed, share: float) -> None:
        vars(self).update(vars(feed))
        self._kept, self._whole, self._share = {}, feed, share
        if feed.data.kind == "text":
            self.max_length = max(4, round(feed.max_length * share))
        elif feed.data.kind == "image" and share > 1:
            channels, side, _ = feed.shape
            side = max(4, round(side * share) // 4 * 4)
            self.shape = (channels, side, side)

    def _make(self, part: str) -> Any:
        if self.data.kind == "text":
            return super()._make(part)
        rows = self._whole.rows(part)
        if self.data.kind == "image":
            return TensorRows(rows.name, rows.values, rows.labels, self._normal)
        columns = self._whole_order()[: max(1, round(self._share * self.shape[0]))]
        return TensorRows(rows.name, fewer(rows.values, columns), rows.labels)

    def _normal(self, pixels: Tensor) -> Tensor:
        whole = self._whole._normal(pixels)
        if self._share > 1:
            side = self.shape[1]
            return F.interpolate(whole, (side, side), mode="bilinear", align_corners=False)
        return coarser(whole, max(1, round(self._share * whole.shape[-1])))

    def _whole_order(self) -> list[int]:
        """Columns by how far they tell the training labels apart, the best first."""
        rows = self._whole.rows("train")
        values, labels = rows.values.numpy(), np.asarray(rows.labels, dtype=float)
        if self.data.classes:
            means = np.stack([values[labels == k].mean(0) for k in np.unique(labels)])
            told = means.var(0)
        else:
            told = np.abs((values * (labels - labels.mean())[:, None]).mean(0))
        return [int(i) for i in np.argsort(-told, kind="stable")]
