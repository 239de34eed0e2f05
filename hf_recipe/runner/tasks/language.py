"""Language models: the next token, or tokens that are masked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DataCollatorForTokenClassification,
    GPT2Config,
)

from hf_recipe.complexify.architectures import Design
from hf_recipe.regularize.augment import Change, Values
from hf_recipe.runner import columns
from hf_recipe.runner.columns import Parts
from hf_recipe.runner.feed import Feed, TextFeed
from hf_recipe.runner.simple import SimpleConfig, SimpleForCausalLM, SimpleForMaskedLM
from hf_recipe.runner.tasks.base import IGNORED, Read, TokenTask, bert_config
from hf_recipe.runner.usage import UsageError
from hf_recipe.trainer.metrics import Accuracy

if TYPE_CHECKING:
    from hf_recipe.runner.data import Data
    from hf_recipe.runner.options import DataOptions

LONGEST = 128  # tokens of a row, unless --max_length says more
TEXTS = ("text", "content", "document", "sentence", "body")


class DocumentFeed(TextFeed):
    """Documents as rows, each with its ends marked; a longer one is cut into several rows.

    Documents are not strung together: no token sees another document.
    """

    sizes = ()
    fixed = "another length would cut the documents into other rows"

    def _tokenizer(self, folder: Any) -> Any:
        tokenizer = super()._tokenizer(folder)
        if tokenizer.pad_token is None:  # GPT-2 and its kin; what is padded has no label
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        return tokenizer

    def _prepare(self, folder: Any, config: Any) -> None:
        super()._prepare(folder, config)
        if self.options.data.max_length is None:
            self.max_length = min(self.max_length, LONGEST)

    def _collator(self) -> Any:
        return DataCollatorForTokenClassification(self.processing_class)

    def encode(self, part: str, limit: int | None) -> dict[str, Any]:
        tokenizer = self.processing_class
        documents = [list(ids) for ids in tokenizer(self.texts(part))["input_ids"]]
        end = tokenizer.eos_token_id
        if end is not None:
            documents = [ids if ids[-1:] == [end] else [*ids, end] for ids in documents]
        if limit is not None:
            # one token of the piece before is seen again, so that every token is predicted once
            documents = [
                ids[at : at + limit]
                for ids in documents
                for at in range(0, len(ids) - 1, limit - 1)
            ]
        return {"input_ids": documents, "attention_mask": [[1] * len(ids) for ids in documents]}

    def _make(self, part: str) -> datasets.Dataset:
        encoded = self.encode(part, self.max_length)
        return datasets.Dataset.from_dict({**encoded, "labels": encoded["input_ids"]})


class LanguageTask(TokenTask):
    """What is to be predicted is the text itself."""

    metric = "perplexity"
    item = "token"

    def fits(self, rows: datasets.Dataset, chosen: DataOptions) -> bool:
        return False

    def read(self, parts: Parts, chosen: DataOptions, what: str) -> Read:
        first = parts["train"]
        texts = [name for name, f in first.features.items() if columns.is_text(f)]
        if chosen.text_column is not None:
            text = columns.require(first, chosen.text_column, "--text_column")
        elif texts:
            text = columns.find(first, TEXTS) or columns.longest(first, texts)
        else:
            raise UsageError(
                f"--task {self.name} needs a column of text; "
                f"the columns are {', '.join(first.column_names)}"
            )
        made = {}
        for name, part in parts.items():
            part = columns.selected(part, (text,), f"{what}, {name}")
            kept = [i for i, value in enumerate(part[text]) if str(value).strip()]
            made[name] = part if len(kept) == len(part) else part.select(kept)
        return Read("text", made, (text,), ())

    def head(self, data: Data) -> dict[str, Any]:
        return {}

    def metrics_of(self, data: Data) -> Callable[[Any], dict[str, float]]:
        metric = Accuracy()

        def compute(prediction: Any) -> dict[str, float]:
            losses, answers = (np.asarray(p) for p in prediction.predictions[:2])
            true = self.supervised(prediction.label_ids)
            held = true != IGNORED
            loss = float((losses.astype(np.float64) * held.sum(1)).sum() / held.sum())
            return {
                "perplexity": math.exp(min(loss, 100.0)),
                **metric.of(answers[held], true[held]),
            }

        return compute


class CausalLM(LanguageTask):
    """The next token out of all before it.

    The rows are texts: lines of a .txt file, or its paragraphs where empty lines part them.
    """

    name = "causal-lm"
    feeds = {"text": DocumentFeed}
    counted = True
    shifted = True

    def fits(self, rows: datasets.Dataset, chosen: DataOptions) -> bool:
        (only, *others) = rows.column_names
        return not others and columns.is_text(rows.features[only])

    def auto(self, kind: str) -> Any:
        return AutoModelForCausalLM

    def ladder(self, kind: str) -> str:
        return "causal"

    def config(self, feed: Feed, design: Design, dropout: float, head: Mapping[str, Any]) -> Any:
        assert isinstance(feed, TextFeed)
        tokenizer = feed.processing_class
        return GPT2Config(
            vocab_size=feed.shape[0],
            n_positions=max(16, feed.max_length),
            n_embd=design.width,
            n_layer=design.depth,
            n_head=design.heads,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=_token(tokenizer, "bos_token_id", "cls_token_id"),
            eos_token_id=_token(tokenizer, "eos_token_id", "sep_token_id"),
            pad_token_id=tokenizer.pad_token_id,
        )

    def simplest(self, feed: Feed, head: Mapping[str, Any]) -> Any:
        size = feed.shape[0]
        return SimpleForCausalLM(SimpleConfig("text", size, 0, num_labels=size))


class MaskedFeed(DocumentFeed):
    """Documents of which some tokens are masked, the same ones at every reading.

    Drawing other masks at every step is left to the training's augmentation (`Remask`): so
    baselines see fixed rows, and evaluations can be paired.
    """

    def _tokenizer(self, folder: Any) -> Any:
        tokenizer = super()._tokenizer(folder)
        if tokenizer.mask_token_id is None:
            raise UsageError("--task masked-lm needs a tokenizer with a mask token")
        return tokenizer

    def _changes(self) -> tuple[Change, ...]:
        tokenizer = self.processing_class
        return (Remask(tokenizer.mask_token_id, tuple(tokenizer.all_special_ids), self.shape[0]),)

    def _make(self, part: str) -> datasets.Dataset:
        columns = self.encode(part, self.max_length)
        (remask,) = self._changes()
        masked, labels = [], []
        for number, ids in enumerate(columns["input_ids"]):
            row = torch.tensor([ids])
            draw = torch.Generator().manual_seed(number)
            batch = remask({"input_ids": row, "labels": torch.full_like(row, IGNORED)}, draw)
            masked.append(batch["input_ids"][0].tolist())
            labels.append(batch["labels"][0].tolist())
        return datasets.Dataset.from_dict({**columns, "input_ids": masked, "labels": labels})


@dataclass(frozen=True)
class Remask:
    """Masks other tokens of a batch (Liu et al. 2019), as Devlin et al. 2019 do it.

    Of the chosen tokens 8 in 10 are masked, 1 in 10 becomes a random one, 1 in 10 stays.

    Args:
        mask: id of the mask token.
        special: ids that are never chosen.
        vocabulary: how many ids there are.
        share: of tokens that are chosen, one of each row at least.
    """

    mask: int
    special: tuple[int, ...]
    vocabulary: int
    share: float = 0.15

    def __call__(self, batch: Values, draw: torch.Generator) -> Values:
        ids, labels = batch["input_ids"], batch["labels"]
        ids = torch.where(labels != IGNORED, labels, ids)
        free = ~torch.isin(ids, torch.tensor(self.special, device=ids.device))
        lots = torch.rand(ids.shape, generator=draw).to(ids.device).masked_fill(~free, 2.0)
        chosen = free & ((lots < self.share) | (lots == lots.min(1, keepdim=True).values))
        fate = torch.rand(ids.shape, generator=draw).to(ids.device)
        other = torch.randint(self.vocabulary, ids.shape, generator=draw).to(ids.device)
        made = ids.masked_fill(chosen & (fate < 0.8), self.mask)
        made = torch.where(chosen & (fate >= 0.9), other, made)
        return {**batch, "input_ids": made, "labels": ids.masked_fill(~chosen, IGNORED)}


class MaskedLM(LanguageTask):
    """Tokens that are masked, out of those on both sides."""

    name = "masked-lm"
    feeds = {"text": MaskedFeed}
    item = "masked token"
    patience = 3.0

    def auto(self, kind: str) -> Any:
        return AutoModelForMaskedLM

    def config(self, feed: Feed, design: Design, dropout: float, head: Mapping[str, Any]) -> Any:
        return bert_config(feed, design, dropout, head)

    def simplest(self, feed: Feed, head: Mapping[str, Any]) -> Any:
        size = feed.shape[0]
        return SimpleForMaskedLM(SimpleConfig("text", size, 0, num_labels=size))


def _token(tokenizer: Any, *names: str) -> int | None:
    """The first of these special tokens that the tokenizer has."""
    known = (getattr(tokenizer, name, None) for name in names)
    return next((int(token) for token in known if token is not None), None)
