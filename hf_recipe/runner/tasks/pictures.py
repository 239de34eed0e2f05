"""A class for each pixel of a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForSemanticSegmentation, SegformerConfig

from hf_recipe.complexify.architectures import Design
from hf_recipe.runner import columns
from hf_recipe.runner.columns import Parts
from hf_recipe.runner.feed import Feed, ImageFeed, TensorRows
from hf_recipe.runner.simple import SimpleConfig, SimpleForSemanticSegmentation
from hf_recipe.runner.tasks.base import IGNORED, Looked, Read, TokenTask, class_head
from hf_recipe.runner.usage import UsageError
from hf_recipe.trainer.metrics import MeanIoU

if TYPE_CHECKING:
    from hf_recipe.runner.data import Data
    from hf_recipe.runner.options import DataOptions

PICTURES = ("image", "pixel_values", "picture")
MASKS = ("mask", "annotation", "segmentation", "segmentation_mask", "label", "labels", "scene")
NOTHING = 255  # pixels of a mask that are not to be learned from


class MaskFeed(ImageFeed):
    """Pictures and their masks, at the same size."""

    sizes = (0.5, 1.0)
    changes = ()
    fixed = "a picture that moves would leave its mask behind"

    def _labels(self, part: str) -> torch.Tensor:
        side, masks = self.shape[1], []
        rows = self.data.splits[part]
        for place in range(len(rows)):
            mask = rows[place]["label"].convert("L")
            if mask.size != (side, side):
                mask = mask.resize((side, side), 0)  # nearest: classes are not averaged
            masks.append(np.asarray(mask, dtype=np.int64))
        return torch.from_numpy(np.stack(masks))


class SemanticSegmentation(TokenTask):
    """Which class every pixel is of.

    The mask is a grey picture whose values are the numbers of the classes; 255 is left out.
    """

    name = "semantic-segmentation"
    metric = "mean_iou"
    feeds = {"image": MaskFeed}
    item = "pixel"

    def fits(self, rows: datasets.Dataset, chosen: DataOptions) -> bool:
        pictures = [n for n, f in rows.features.items() if isinstance(f, datasets.Image)]
        return len(pictures) > 1 and columns.find(rows, MASKS) in pictures

    def read(self, parts: Parts, chosen: DataOptions, what: str) -> Read:
        first = parts["train"]
        asked = ((chosen.image_column, "--image_column"), (chosen.label_column, "--label_column"))
        usual = ((PICTURES, "pictures"), (MASKS, "masks"))
        found = [
            columns.require(first, given, flag)
            if given
            else columns.need(first, names, self.name, word)
            for (given, flag), (names, word) in zip(asked, usual, strict=True)
        ]
        for column in found:
            if not isinstance(first.features[column], datasets.Image):
                raise UsageError(f"--task {self.name}: column {column!r} must hold pictures")
        picture, mask = found
        made = {}
        for name, part in parts.items():
            part = columns.selected(part, (picture, mask), f"{what}, {name}")
            made[name] = part if mask == "label" else part.rename_column(mask, "label")
        count = 1 + max(_highest(part) for part in made.values())
        if count < 2:
            raise UsageError(f"{what}: the masks hold one class alone")
        classes = tuple(f"class {k}" for k in range(count))
        return Read("image", made, (picture,), classes=classes)

    def looked_at(self, data: Data) -> Looked:
        parts = {k: part.select_columns([data.inputs[0]]) for k, part in data.splits.items()}
        return Looked(parts, None, {"image": data.inputs[0]})

    def auto(self, kind: str) -> Any:
        return AutoModelForSemanticSegmentation

    def ladder(self, kind: str) -> str:
        return "segmentation"

    def head(self, data: Data) -> dict[str, Any]:
        return class_head(data.classes)

    def config(self, feed: Feed, design: Design, dropout: float, head: Mapping[str, Any]) -> Any:
        return SegformerConfig(
            num_channels=feed.shape[0],
            num_encoder_blocks=2,
            depths=[design.depth] * 2,
            sr_ratios=[2, 1],
            hidden_sizes=[design.width, 2 * design.width],
            patch_sizes=[3, 3],
            strides=[2, 2],
            num_attention_heads=[design.heads, 2 * design.heads],
            mlp_ratios=[4, 4],
            decoder_hidden_size=2 * design.width,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            classifier_dropout_prob=dropout,
            drop_path_rate=0.0,
            semantic_loss_ignore_index=NOTHING,
            **head,
        )

    def simplest(self, feed: Feed, head: Mapping[str, Any]) -> Any:
        config = SimpleConfig("image", feed.shape[0], 0, semantic_loss_ignore_index=NOTHING, **head)
        return SimpleForSemanticSegmentation(config)

    def aligned(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[Any, Any]:
        size = labels.shape[-2:]
        if logits.shape[-2:] != size:
            logits = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
        return logits.movedim(1, -1), labels.masked_fill(labels == NOTHING, IGNORED)

    def supervised(self, labels: Any) -> np.ndarray[Any, Any]:
        whole: np.ndarray[Any, Any] = np.asarray(labels)
        return np.where(whole == NOTHING, IGNORED, whole)

    def row_targets(self, feed: Feed, part: str) -> list[np.ndarray[Any, Any]]:
        rows = feed.rows(part)
        assert isinstance(rows, TensorRows)
        flat = rows.labels.flatten(1).numpy()
        return [labels[labels != NOTHING] for labels in flat]

    def metrics_of(self, data: Data) -> Callable[[Any], dict[str, float]]:
        metric = MeanIoU()

        def compute(prediction: Any) -> dict[str, float]:
            true = self.supervised(prediction.label_ids)
            held = true != IGNORED
            return metric.of(np.asarray(prediction.predictions[1])[held], true[held])

        return compute


def _highest(rows: datasets.Dataset) -> int:
    """The largest class number in the masks."""
    values = (np.asarray(row["label"].convert("L")) for row in rows)
    return max((int(v[v != NOTHING].max(initial=0)) for v in values), default=0)
