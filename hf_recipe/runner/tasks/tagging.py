"""A tag for each word of a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification

from hf_recipe.complexify.architectures import Design
from hf_recipe.runner import columns
from hf_recipe.runner.columns import Parts
from hf_recipe.runner.feed import Feed, TextFeed
from hf_recipe.runner.simple import SimpleConfig, SimpleForTokenClassification
from hf_recipe.runner.tasks.base import (
    IGNORED,
    Looked,
    Read,
    TokenTask,
    bert_config,
    class_head,
)
from hf_recipe.runner.usage import UsageError
from hf_recipe.trainer.metrics import F1, Accuracy
from hf_recipe.trainer.span_metrics import EntityF1, is_bio

if TYPE_CHECKING:
    from hf_recipe.runner.data import Data
    from hf_recipe.runner.options import DataOptions

WORDS = ("tokens", "words", "text")
TAGS = ("ner_tags", "tags", "labels", "label", "pos_tags", "upos", "chunk_tags", "ner", "pos")


class WordFeed(TextFeed):
    """Words as tokens; the tag stands at a word's first piece, all other pieces have none."""

    sizes = ()
    fixed = "a shorter text would take tags away, and with them what is compared"

    def texts(self, part: str) -> list[str]:
        return [" ".join(words) for words in self.data.splits[part][self.data.inputs[0]]]

    def encode(self, part: str, limit: int | None) -> dict[str, Any]:
        encoded = self._split(part, limit)
        return {k: encoded[k] for k in encoded if k in self.processing_class.model_input_names}

    def _split(self, part: str, limit: int | None) -> Any:
        words = [list(map(str, row)) for row in self.data.splits[part][self.data.inputs[0]]]
        return self.processing_class(
            words, is_split_into_words=True, truncation=limit is not None, max_length=limit
        )

    def _tokenizer(self, folder: Any) -> Any:
        tokenizer = super()._tokenizer(folder)
        if not tokenizer.is_fast:
            raise UsageError(
                "--task token-classification needs a fast tokenizer, which knows its words"
            )
        if getattr(tokenizer, "add_prefix_space", None) is False:  # byte-level: words begin so
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(tokenizer.name_or_path, add_prefix_space=True)
        return tokenizer

    def _collator(self) -> Any:
        return DataCollatorForTokenClassification(self.processing_class)

    def _make(self, part: str) -> datasets.Dataset:
        encoded = self._split(part, self.max_length)
        tags = self.data.splits[part]["label"]
        rows = []
        for place, row in enumerate(tags):
            words = encoded.word_ids(place)
            first = [w is not None and w not in words[:i] for i, w in enumerate(words)]
            rows.append([row[w] if f else IGNORED for w, f in zip(words, first, strict=True)])
        names = [k for k in encoded if k in self.processing_class.model_input_names]
        return datasets.Dataset.from_dict({**{k: encoded[k] for k in names}, "labels": rows})


class TokenClassification(TokenTask):
    """A tag for each word: entities as B-, I- and O, or parts of speech."""

    name = "token-classification"
    metric = "f1"
    feeds = {"text": WordFeed}
    counted = True
    item = "word"

    def fits(self, rows: datasets.Dataset, chosen: DataOptions) -> bool:
        lists = [name for name, f in rows.features.items() if columns.is_list(f)]
        words = columns.find(rows, WORDS)
        return len(lists) > 1 and words in lists

    def read(self, parts: Parts, chosen: DataOptions, what: str) -> Read:
        first = parts["train"]
        if chosen.text_column is not None:
            words = columns.require(first, chosen.text_column, "--text_column")
        else:
            words = columns.need(first, WORDS, self.name, "words")
        if chosen.label_column is not None:
            tags = columns.require(first, chosen.label_column, "--label_column")
        else:
            tags = columns.need(first, TAGS, self.name, "tags")
        for column in (words, tags):
            if not columns.is_list(first.features[column]):
                raise UsageError(
                    f"--task {self.name}: column {column!r} must hold a list in each row, one "
                    f"{'word' if column == words else 'tag'} beside the other"
                )
        made = {}
        for name, part in parts.items():
            part = columns.selected(part, (words, tags), f"{what}, {name}")
            for place, row in enumerate(part):
                if not len(row[words]) or len(row[words]) != len(row[tags]):
                    raise UsageError(
                        f"{what}, {name}, row {place}: {len(row[words])} words "
                        f"and {len(row[tags])} tags"
                    )
            made[name] = part if tags == "label" else part.rename_column(tags, "label")
        numbered, classes = columns.numbered_lists(made, "label", first="O")
        return Read("text", numbered, (words,), classes=classes)

    def looked_at(self, data: Data) -> Looked:
        parts = {
            name: datasets.Dataset.from_dict(
                {"text": [" ".join(map(str, words)) for words in part[data.inputs[0]]]}
            )
            for name, part in data.splits.items()
        }
        return Looked(parts, None, {"text": "text"})

    def auto(self, kind: str) -> Any:
        return AutoModelForTokenClassification

    def head(self, data: Data) -> dict[str, Any]:
        return class_head(data.classes)

    def config(self, feed: Feed, design: Design, dropout: float, head: Mapping[str, Any]) -> Any:
        return bert_config(feed, design, dropout, head)

    def simplest(self, feed: Feed, head: Mapping[str, Any]) -> Any:
        return SimpleForTokenClassification(SimpleConfig("text", feed.shape[0], 0, **head))

    def metrics_of(self, data: Data) -> Callable[[Any], dict[str, float]]:
        accuracy, names = Accuracy(), data.classes
        entities = EntityF1() if is_bio(names) else None
        macro = F1()

        def compute(prediction: Any) -> dict[str, float]:
            answers = np.asarray(prediction.predictions[1])
            true = self.supervised(prediction.label_ids)
            held = true != IGNORED
            found = accuracy.of(answers[held], true[held])
            if entities is None:
                return {**found, **macro.of(answers[held], true[held])}
            rows = [
                ([names[k] for k in row[kept]], [names[k] for k in labels[kept]])
                for row, labels, kept in zip(answers, true, held, strict=True)
            ]
            return {**found, **entities.of([r[0] for r in rows], [r[1] for r in rows])}

        return compute
