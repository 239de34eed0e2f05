"""A text out of another text: translations, summaries, answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq, T5Config

from hf_recipe.complexify.architectures import Design
from hf_recipe.runner import columns
from hf_recipe.runner.columns import Parts
from hf_recipe.runner.feed import MOST_TOKENS, Feed, TextFeed
from hf_recipe.runner.simple import SimpleConfig, SimpleSeq2Seq
from hf_recipe.runner.tasks.base import IGNORED, Read, TokenTask
from hf_recipe.runner.usage import UsageError
from hf_recipe.trainer.metrics import Accuracy

if TYPE_CHECKING:
    from hf_recipe.runner.data import Data
    from hf_recipe.runner.options import DataOptions

SOURCES = ("source", "input", "article", "document", "dialogue", "text", "question")
TARGETS = ("target", "output", "summary", "highlights", "translation", "answer", "label")


class PairFeed(TextFeed):
    """Source and target as token ids; the target's end is marked and is to be predicted too."""

    sizes = ()
    fixed = "the targets would no longer be told by what is left of the sources"

    def texts(self, part: str) -> list[str]:
        rows = self.data.splits[part]
        return [*map(str, rows[self.data.inputs[0]]), *map(str, rows["label"])]

    def encode(self, part: str, limit: int | None) -> dict[str, Any]:
        sources = [str(text) for text in self.data.splits[part][self.data.inputs[0]]]
        encoded = self.processing_class(sources, truncation=limit is not None, max_length=limit)
        return {k: encoded[k] for k in encoded if k in self.processing_class.model_input_names}

    def _collator(self) -> Any:
        return DataCollatorForSeq2Seq(self.processing_class)

    def _make(self, part: str) -> datasets.Dataset:
        tokenizer = self.processing_class
        end = tokenizer.eos_token_id
        end = tokenizer.sep_token_id if end is None else end
        targets = [str(text) for text in self.data.splits[part]["label"]]
        encoded = tokenizer(text_target=targets, add_special_tokens=False)["input_ids"]
        labels = [[*ids[: MOST_TOKENS - 1], *([] if end is None else [end])] for ids in encoded]
        return datasets.Dataset.from_dict({**self.encode(part, self.max_length), "labels": labels})


class Seq2Seq(TokenTask):
    """A target text for each source text."""

    name = "seq2seq"
    metric = "exact_match"
    feeds = {"text": PairFeed}
    item = "target token"
    patience = 2.0

    def fits(self, rows: datasets.Dataset, chosen: DataOptions) -> bool:
        names = {name.lower(): name for name in rows.column_names}
        if "translation" in names:
            return isinstance(rows.features[names["translation"]], dict)
        return (
            "source" in names
            and "target" in names
            and columns.is_text(rows.features[names["target"]])
        )

    def read(self, parts: Parts, chosen: DataOptions, what: str) -> Read:
        flat = {name: _flat(part) for name, part in parts.items()}
        first = flat["train"]
        if chosen.text_column is not None:
            source = columns.require(first, chosen.text_column, "--text_column")
        else:
            source = columns.need(first, SOURCES, self.name, "source texts")
        if chosen.label_column is not None:
            target = columns.require(first, chosen.label_column, "--label_column")
        else:
            target = columns.need(first, TARGETS, self.name, "target texts")
        for column in (source, target):
            if not columns.is_text(first.features[column]):
                raise UsageError(f"--task {self.name}: column {column!r} must hold text")
        made = {}
        for name, part in flat.items():
            part = columns.selected(part, (source, target), f"{what}, {name}")
            made[name] = part if target == "label" else part.rename_column(target, "label")
        return Read("text", made, (source,))

    def auto(self, kind: str) -> Any:
        return AutoModelForSeq2SeqLM

    def ladder(self, kind: str) -> str:
        return "seq2seq"

    def head(self, data: Data) -> dict[str, Any]:
        return {}

    def config(self, feed: Feed, design: Design, dropout: float, head: Mapping[str, Any]) -> Any:
        tokenizer = feed.processing_class
        end = tokenizer.eos_token_id
        return T5Config(
            vocab_size=feed.shape[0],
            d_model=design.width,
            d_kv=design.width // design.heads,
            d_ff=4 * design.width,
            num_layers=design.depth,
            num_heads=design.heads,
            dropout_rate=dropout,
            pad_token_id=tokenizer.pad_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.sep_token_id if end is None else end,
        )

    def simplest(self, feed: Feed, head: Mapping[str, Any]) -> Any:
        size = feed.shape[0]
        config = SimpleConfig("text", size, 0, num_labels=size, is_encoder_decoder=True)
        return SimpleSeq2Seq(config)

    def metrics_of(self, data: Data) -> Callable[[Any], dict[str, float]]:
        """With the right words before it every next word is right: greedy decoding gives them."""
        accuracy = Accuracy()

        def compute(prediction: Any) -> dict[str, float]:
            losses, answers = (np.asarray(p) for p in prediction.predictions[:2])
            true = self.supervised(prediction.label_ids)
            held = true != IGNORED
            loss = float((losses.astype(np.float64) * held.sum(1)).sum() / held.sum())
            return {
                "exact_match": float(((answers == true) | ~held).all(1).mean()),
                "perplexity": math.exp(min(loss, 100.0)),
                **accuracy.of(answers[held], true[held]),
            }

        return compute


def _flat(rows: datasets.Dataset) -> datasets.Dataset:
    """A "translation" of two languages as the columns "source" and "target"."""
    feature = rows.features.get("translation")
    if not isinstance(feature, dict):
        return rows
    first, second, *_ = list(feature)
    pairs = rows["translation"]
    columns_ = {"source": [p[first] for p in pairs], "target": [p[second] for p in pairs]}
    return datasets.Dataset.from_dict(columns_)
