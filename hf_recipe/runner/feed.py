"""Rows as the network gets them: pixels, token ids or standardised numbers.

What is learned from data (mean and spread of pixels, the vocabulary, how long texts are) is
learned from the training part alone. A feed also makes itself anew at another size of its input,
and names the variations that its rows bear.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from transformers import default_data_collator

from hf_recipe.complexify.growth import coarser, fewer
from hf_recipe.instruments.distributed import from_rank_0, rank
from hf_recipe.regularize.augment import Change
from hf_recipe.regularize.augment_images import Move
from hf_recipe.regularize.augment_rows import Jitter, Swap, TokenDropout, token_settings
from hf_recipe.regularize.more_data import nested_subsets
from hf_recipe.runner.usage import UsageError

if TYPE_CHECKING:
    from hf_recipe.runner.data import Data
    from hf_recipe.runner.options import Options

MOST_TOKENS, MOST_WORDS, LARGEST_SIDE = 512, 8000, 64
Tensor = torch.Tensor


class TensorRows(Dataset[dict[str, Any]]):
    """Rows held in memory; images as bytes, normalised when they are fetched.

    Args:
        name: of the input: "pixel_values" or "features".
        values: shape (rows, ...).
        labels: shape (rows, ...).
        change: called on a batch of values at each fetch; None: nothing.
    """

    def __init__(
        self,
        name: str,
        values: Tensor,
        labels: Tensor,
        change: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.name, self.values, self.labels, self.change = name, values, labels, change

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        chosen = torch.as_tensor(indices)
        values, labels = self.values[chosen], self.labels[chosen]
        if self.change is not None:
            values = self.change(values)
        return [{self.name: v, "labels": y} for v, y in zip(values, labels, strict=True)]


class Feed:
    """Makes the rows of any part, and names the changes that they bear.

    Attributes:
        processing_class: tokenizer of a text task, else None.
        collate: list of rows -> batch; None: the Trainer's default.
        shape: (channels, side, side) of images; (features,) of numbers; (vocabulary,) of text.
        changes: the variations that these rows bear; made by the training's `Augmentation`.
        sizes: shares of the input that are tried, ascending; empty: its size is not to be changed.
        size_name: what they are shares of.
        fixed: why `sizes` or `changes` are empty.
    """

    sizes: tuple[float, ...] = ()
    size_name: ClassVar[str] = "input"
    fixed: ClassVar[str] = ""
    changes: tuple[Change, ...] = ()
    processing_class: Any = None
    collate: Any = None
    shape: tuple[int, ...] = ()

    def __init__(self, data: Data, options: Options, folder: Path, config: Any = None) -> None:
        self.data, self.options = data, options
        self._kept: dict[str, Any] = {}
        self._whole: Self | None = None
        self._share = 1.0
        self._prepare(folder, config)

    def rows(self, part: str) -> Any:
        """The rows of a part, or of two as "train+validation"."""
        if "+" in part:
            parts = [self.rows(p) for p in part.split("+")]
            if isinstance(parts[0], datasets.Dataset):
                return datasets.concatenate_datasets(parts)
            values = torch.cat([p.values for p in parts])
            labels = torch.cat([p.labels for p in parts])
            return TensorRows(parts[0].name, values, labels, parts[0].change)
        if part not in self._kept:
            self._kept[part] = self._make(part)
        return self._kept[part]

    def count(self, part: str) -> int:
        """How many rows a part gives; a long document gives several."""
        return sum(len(self.rows(each)) for each in part.split("+"))

    def some(self, part: str, count: int, seed: int) -> Any:
        """`count` rows of a part, nested by count and with all classes alike; 0: all of them."""
        rows = self.rows(part)
        if not count:
            return rows
        labels = None if "+" in part else self.data.task.strata_of_rows(self, part)
        (chosen,) = nested_subsets(len(rows), [count], labels=labels, seed=seed)
        if isinstance(rows, datasets.Dataset):
            return rows.select(chosen)
        place = torch.as_tensor(chosen)
        return TensorRows(rows.name, rows.values[place], rows.labels[place], rows.change)

    def collator(self, without: str = "") -> Any:
        """The collator, with the columns of these numbers ("0,3") hidden at their mean."""
        if not without:
            return self.collate
        inner = self.collate or default_data_collator
        columns = [int(number) for number in without.split(",")]

        def collate(rows: list[Any]) -> dict[str, Any]:
            batch = dict(inner(rows))
            batch["features"] = batch["features"].clone()
            batch["features"][:, columns] = 0.0  # the mean of a standardised column
            return batch

        return collate

    def scaled(self, share: float) -> Self:
        """The same rows with a smaller or larger input; the shape changes above 1 alone."""
        other = copy.copy(self)
        other._kept, other._whole, other._share = {}, self, share
        return other

    def size_of(self, share: float) -> str:
        """A share of the input, in its own unit."""
        raise NotImplementedError

    def _prepare(self, folder: Path, config: Any) -> None:
        """Learn from the training part what is needed to make rows."""
        raise NotImplementedError

    def _make(self, part: str) -> Any:
        raise NotImplementedError

    def _labels(self, part: str) -> Tensor:
        return torch.as_tensor(self.data.labels(part))


class ImageFeed(Feed):
    """Pictures, small enough to be held in memory as bytes."""

    sizes: tuple[float, ...] = (0.5, 1.0, 1.5)
    size_name = "side"
    changes: tuple[Change, ...] = (Move(),)

    def size_of(self, share: float) -> str:
        return f"{max(1, round(self.shape[1] * share))} px"

    def scaled(self, share: float) -> Self:
        other = super().scaled(share)
        if share > 1:
            channels, side, _ = self.shape
            side = max(4, round(side * share) // 4 * 4)
            other.shape = (channels, side, side)
        return other

    def _prepare(self, folder: Path, config: Any) -> None:
        first = self.data.splits["train"][0][self.data.inputs[0]]
        channels = 1 if first.mode in ("1", "L", "I", "I;16", "F") else 3
        side = min(LARGEST_SIDE, max(first.size))
        side = max(4, side // 4 * 4)
        if config is not None:
            size = getattr(config, "image_size", None) or 224
            side = int(size if isinstance(size, int) else size[0])
            channels = int(getattr(config, "num_channels", channels))
        self.shape = (channels, side, side)
        pixels = self._pixels("train")
        sample = pixels[:: max(1, len(pixels) // 4096)].float() / 255
        self._mean = sample.mean((0, 2, 3)).view(1, -1, 1, 1)
        self._scale = sample.std((0, 2, 3)).clamp(min=1e-3).view(1, -1, 1, 1)

    def _make(self, part: str) -> TensorRows:
        if self._whole is not None:
            rows = self._whole.rows(part)
            return TensorRows(rows.name, rows.values, rows.labels, self._normal)
        return TensorRows("pixel_values", self._pixels(part), self._labels(part), self._normal)

    def _pixels(self, part: str) -> Tensor:
        """Images as bytes, (rows, channels, side, side)."""
        channels, side, _ = self.shape
        column, mode = self.data.inputs[0], "L" if channels == 1 else "RGB"
        images = []
        for index in range(len(self.data.splits[part])):
            try:
                image = self.data.splits[part][index][column].convert(mode)
            except (OSError, ValueError, AttributeError) as error:
                raise UsageError(f"{part}, row {index}: not a readable image: {error}") from None
            if image.size != (side, side):
                image = image.resize((side, side))
            images.append(np.asarray(image, dtype=np.uint8).reshape(side, side, channels))
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()

    def _normal(self, pixels: Tensor) -> Tensor:
        normal: Tensor = (pixels.float() / 255 - self._mean) / self._scale
        if self._share > 1:
            side = self.shape[1]
            return F.interpolate(normal, (side, side), mode="bilinear", align_corners=False)
        if self._share < 1:
            return coarser(normal, max(1, round(self._share * normal.shape[-1])))
        return normal


class NumberFeed(Feed):
    """Columns of numbers, standardised."""

    sizes = (0.25, 0.5, 1.0)
    size_name = "columns"
    changes = (Jitter(),)

    def size_of(self, share: float) -> str:
        return f"{max(1, round(self.shape[0] * share))} of {self.shape[0]}"

    def _prepare(self, folder: Path, config: Any) -> None:
        values = self._numbers("train")
        self._mean, self._scale = values.mean(0), values.std(0)
        self._scale[self._scale == 0] = 1.0
        self.shape = (values.shape[1],)

    def _make(self, part: str) -> TensorRows:
        if self._whole is not None:
            rows = self._whole.rows(part)
            columns = self._in_order()[: max(1, round(self._share * self.shape[0]))]
            return TensorRows(rows.name, fewer(rows.values, columns), rows.labels)
        values = (self._numbers(part) - self._mean) / self._scale
        values = torch.as_tensor(values, dtype=torch.float32)
        return TensorRows("features", values, self._labels(part))

    def _numbers(self, part: str) -> np.ndarray[Any, Any]:
        split = self.data.splits[part]
        columns = [np.asarray(split[c], dtype=np.float64) for c in self.data.inputs]
        return np.stack(columns, axis=1)

    def _in_order(self) -> list[int]:
        """Columns by how far they tell the training labels apart, the best first."""
        assert self._whole is not None
        rows = self._whole.rows("train")
        values, labels = rows.values.numpy(), np.asarray(rows.labels, dtype=float)
        if labels.ndim == 1 and self.data.classes:
            means = np.stack([values[labels == k].mean(0) for k in np.unique(labels)])
            told = means.var(0)
        else:
            labels = labels.reshape(len(labels), -1)
            told = np.abs(values.T @ (labels - labels.mean(0)) / len(labels)).max(1)
        return [int(i) for i in np.argsort(-told, kind="stable")]


class TextFeed(Feed):
    """Texts as token ids, by the user's tokenizer or by one trained on the training texts.

    Attributes:
        max_length: tokens of a row, what marks its ends included.
    """

    sizes: tuple[float, ...] = (0.5, 1.0)
    size_name = "length"
    max_length: int

    def size_of(self, share: float) -> str:
        return f"{max(4, round(self.max_length * share))} tokens"

    def scaled(self, share: float) -> Self:
        other = super().scaled(share)
        other.max_length = max(4, round(self.max_length * share))
        return other

    def texts(self, part: str) -> list[str]:
        """What a tokenizer is trained on."""
        return [str(text) for text in self.data.splits[part][self.data.inputs[0]]]

    def encode(self, part: str, limit: int | None) -> dict[str, Any]:
        """Columns of the rows but their labels, cut at `limit` tokens; None: whole."""
        encoded = self.processing_class(
            self.texts(part), truncation=limit is not None, max_length=limit
        )
        return {k: encoded[k] for k in encoded if k in self.processing_class.model_input_names}

    def _prepare(self, folder: Path, config: Any) -> None:
        self.processing_class = self._tokenizer(folder)
        self.shape = (len(self.processing_class),)
        self.collate = self._collator()
        self.changes = self._changes()
        limit = int(getattr(config, "max_position_embeddings", MOST_TOKENS) or MOST_TOKENS)
        lengths = [len(ids) for ids in self.encode("train", None)["input_ids"]]
        needed = int(np.quantile(lengths, 0.99)) if lengths else 8
        self.max_length = min(self.options.data.max_length or max(8, needed), limit)

    def _tokenizer(self, folder: Path) -> Any:
        from transformers import AutoTokenizer

        chosen = self.options.model
        name = chosen.tokenizer_name or chosen.model_name_or_path
        if name is None:
            path = folder / "tokenizer"
            if rank() == 0 and not (path / "tokenizer.json").is_file():
                train_tokenizer(self.texts("train")).save_pretrained(path)
            name = from_rank_0(str(path))
        try:
            return AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise UsageError(f"tokenizer {name}: {str(error).splitlines()[0]}") from None

    def _collator(self) -> Any:
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(self.processing_class)

    def _changes(self) -> tuple[Change, ...]:
        try:
            return (TokenDropout(**token_settings(self.processing_class)),)
        except ValueError:  # a tokenizer without a token to put in another's place
            return (Swap(special=self.processing_class.all_special_ids),)

    def _make(self, part: str) -> datasets.Dataset:
        columns = self.encode(part, self.max_length)
        return datasets.Dataset.from_dict({**columns, "labels": self.data.labels(part).tolist()})


def train_tokenizer(texts: Sequence[str]) -> Any:
    """A WordPiece tokenizer with BERT's form, its vocabulary from `texts` alone."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import WordPieceTrainer
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = WordPieceTrainer(
        vocab_size=MOST_WORDS, min_frequency=2, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "attention_mask"],
    )
