"""Rows as the network gets them: pixels, token ids or standardised numbers.

What is learned from data (mean and spread of pixels, the vocabulary, how long texts are) is
learned from the training part alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import default_data_collator

from hf_recipe.instruments.distributed import from_rank_0, rank
from hf_recipe.regularize.augment import Change
from hf_recipe.regularize.augment_images import Move
from hf_recipe.regularize.augment_rows import Jitter, Swap, TokenDropout, token_settings
from hf_recipe.regularize.more_data import nested_subsets
from hf_recipe.runner.data import Data
from hf_recipe.runner.options import Options, UsageError

MOST_TOKENS, MOST_WORDS, LARGEST_SIDE = 512, 8000, 64
Tensor = torch.Tensor


class TensorRows(Dataset[dict[str, Any]]):
    """Rows held in memory; images as bytes, normalised when they are fetched.

    Args:
        name: of the input: "pixel_values" or "features".
        values: shape (rows, ...).
        labels: shape (rows,).
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
    """

    def __init__(self, data: Data, options: Options, folder: Path, config: Any = None) -> None:
        self.data, self.options = data, options
        self.processing_class: Any = None
        self.collate: Any = None
        self._kept: dict[str, Any] = {}
        if data.kind == "image":
            self._prepare_images(config)
        elif data.kind == "numbers":
            values = self._numbers("train")
            self._mean, self._scale = values.mean(0), values.std(0)
            self._scale[self._scale == 0] = 1.0
            self.shape: tuple[int, ...] = (values.shape[1],)
        else:
            self._prepare_text(folder, config)

    @property
    def changes(self) -> tuple[Change, ...]:
        """The variations that rows of this kind bear; made by the training's `Augmentation`."""
        if self.data.kind == "image":
            return (Move(),)
        if self.data.kind == "numbers":
            return (Jitter(),)
        try:
            return (TokenDropout(**token_settings(self.processing_class)),)
        except ValueError:  # a tokenizer without a token to put in another's place
            return (Swap(special=self.processing_class.all_special_ids),)

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

    def some(self, part: str, count: int, seed: int) -> Any:
        """`count` rows of a part, nested by count and with all classes alike; 0: all of them."""
        rows = self.rows(part)
        if not count:
            return rows
        labels = self.data.labels(part).tolist() if self.data.classes and "+" not in part else None
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

    def _make(self, part: str) -> Any:
        labels = torch.as_tensor(self.data.labels(part))
        if self.data.kind == "image":
            return TensorRows("pixel_values", self._pixels(part), labels, self._normal)
        if self.data.kind == "numbers":
            values = (self._numbers(part) - self._mean) / self._scale
            return TensorRows("features", torch.as_tensor(values, dtype=torch.float32), labels)
        return self._tokens(part, labels)

    # ---------------------------------------------------------------- images

    def _prepare_images(self, config: Any) -> None:
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
        return normal

    # ---------------------------------------------------------------- numbers

    def _numbers(self, part: str) -> np.ndarray[Any, Any]:
        split = self.data.splits[part]
        columns = [np.asarray(split[c], dtype=np.float64) for c in self.data.inputs]
        return np.stack(columns, axis=1)

    # ---------------------------------------------------------------- text

    def _prepare_text(self, folder: Path, config: Any) -> None:
        from transformers import AutoTokenizer, DataCollatorWithPadding

        chosen = self.options.model
        name = chosen.tokenizer_name or chosen.model_name_or_path
        if name is None:
            path = folder / "tokenizer"
            if rank() == 0 and not (path / "tokenizer.json").is_file():
                train_tokenizer(self._texts("train")).save_pretrained(path)
            name = from_rank_0(str(path))
        try:
            self.processing_class = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise UsageError(f"tokenizer {name}: {str(error).splitlines()[0]}") from None
        self.shape = (len(self.processing_class),)
        self.collate = DataCollatorWithPadding(self.processing_class)
        limit = int(getattr(config, "max_position_embeddings", MOST_TOKENS) or MOST_TOKENS)
        lengths = [len(ids) for ids in self.processing_class(self._texts("train")).input_ids]
        needed = int(np.quantile(lengths, 0.99)) if lengths else 8
        self.max_length = min(self.options.data.max_length or max(8, needed), limit)

    def _texts(self, part: str) -> list[str]:
        return [str(text) for text in self.data.splits[part][self.data.inputs[0]]]

    def _tokens(self, part: str, labels: Tensor) -> datasets.Dataset:
        encoded = self.processing_class(
            self._texts(part), truncation=True, max_length=self.max_length
        )
        columns = {k: encoded[k] for k in encoded if k in self.processing_class.model_input_names}
        return datasets.Dataset.from_dict({**columns, "labels": labels.tolist()})


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
