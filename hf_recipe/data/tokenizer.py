"""The tokenizer of a run: where it is found, what its ids mean, and how it splits a text.

Splitting goes to the tokenizer's backend one text at a time: no truncation, no thread pool (whose
use before a fork makes the dataloader's workers complain), and its settings are put back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from hf_recipe.core.check import Skip
from hf_recipe.instruments.batches import Batch
from hf_recipe.instruments.subject import Subject

ROWS = 1_024  # a share of rows is then known to +- 1.6 points (one standard error at one half)
SIZE = 64


def tokenizer_of(subject: Subject) -> Any:
    """The tokenizer: the processing class, what it holds, or what the collator holds; or None."""
    from transformers import PreTrainedTokenizerBase

    collator = subject.trainer.data_collator if subject.trainer is not None else None
    if collator is None and subject.train is not None:
        collator = subject.train.collate
    for holder in (subject.processing_class, collator):
        inner = (getattr(holder, name, None) for name in ("tokenizer", "processing_class"))
        for found in (holder, *inner):
            if isinstance(found, PreTrainedTokenizerBase):
                return found
    return None


@dataclass(frozen=True)
class Special:
    """The ids that mean something.

    Attributes:
        pad: padding; ends, begins: ends and beginnings of a sequence.
        every: all special and added ones.
        declared: whether the tokenizer itself names an end.
    """

    pad: int | None
    ends: frozenset[int]
    begins: frozenset[int]
    every: frozenset[int]
    declared: bool = False


def special_ids(subject: Subject) -> Special:
    """From the tokenizer, the config and the generation config, whichever there are."""
    tokenizer = tokenizer_of(subject)
    generation = getattr(subject.model, "generation_config", None)
    holders = [held for held in (tokenizer, subject.config, generation) if held is not None]

    def named(name: str) -> list[int]:
        found: list[int] = []
        for held in holders:
            value = getattr(held, name, None)
            found += value if isinstance(value, list) else [value] if value is not None else []
        return found

    pads = named("pad_token_id")
    own_ends = getattr(tokenizer, "eos_token_id", None)
    ends = [own_ends] if own_ends is not None else named("eos_token_id")
    begin = [getattr(tokenizer, name, None) for name in ("bos_token_id", "cls_token_id")]
    every = [] if tokenizer is None else [*tokenizer.all_special_ids, *_added(tokenizer)]
    return Special(
        pads[0] if pads else None,
        frozenset(ends),
        frozenset(i for i in begin if i is not None),
        frozenset(every),
        own_ends is not None,
    )


def _added(tokenizer: Any) -> list[int]:
    """Ids added on top of the vocabulary: the turn markers of chat models stand among them."""
    return list(tokenizer.added_tokens_decoder)


def collated(subject: Subject, split: str) -> list[Batch]:
    """Batches of token ids from up to 1,024 evenly spaced rows, collated once per subject.

    Raises:
        Skip: the batches carry no token ids, or rows cannot be read without disturbing the run.
    """
    key = f"collated:{split}"
    if key not in subject.cache:
        first = subject.batch(split, size=2)
        token_ids(first)  # images are not collated by the thousand
        subject.cache[key] = [first] if not first.rows else list(_light(subject, split))
    found: list[Batch] = subject.cache[key]
    return found


def _light(subject: Subject, split: str) -> Iterator[Batch]:
    """The batches without what is larger than a number for each position."""
    rows = subject.rows(split)
    for batch in rows.batches(rows.evenly_spaced(ROWS), SIZE):
        small = {
            name: value
            for name, value in batch.inputs.items()
            if isinstance(value, torch.Tensor) and value.ndim <= 2
        }
        yield Batch(small, batch.rows)


def token_ids(batch: Batch) -> torch.Tensor:
    """The batch's token ids (rows, positions) on the CPU; raises Skip where there are none."""
    ids = batch.inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.is_floating_point():
        raise Skip("the batches carry no token ids")
    return ids.detach().cpu()


def attended_tokens(batch: Batch, ids: torch.Tensor, special: Special) -> torch.Tensor:
    """Positions that are no padding: by the mask, else by runs of the padding id at the ends."""
    mask = batch.inputs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.shape == ids.shape:
        return mask.detach().cpu() != 0
    if special.pad is None or special.pad in special.ends:
        return torch.ones_like(ids, dtype=torch.bool)
    leading = trailing(ids.flip(1), special.pad).flip(1)
    return ~(trailing(ids, special.pad) | leading)


def trailing(values: torch.Tensor, pad: int | None) -> torch.Tensor:
    """Positions of the run of `pad` that a row ends with."""
    if pad is None:
        return torch.zeros_like(values, dtype=torch.bool)
    return (values == pad).flip(1).long().cumprod(dim=1).flip(1).bool()


# ---------------------------------------------------------------- splitting texts


@dataclass(frozen=True)
class Splitter:
    """Splits texts into ids, whole and without special tokens; made by `splitting`."""

    tokenizer: Any
    backend: Any

    def ids(self, text: str) -> list[int]:
        """The ids of a text."""
        if self.backend is None:
            found = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        else:
            found = self.backend.encode(text, add_special_tokens=False).ids
        return [int(i) for i in found]

    def words(self, words: Sequence[str]) -> tuple[list[int], list[int]]:
        """The ids of a list of words, and the number of the word that each belongs to."""
        if self.backend is None:
            raise Skip("only a fast tokenizer says which word a token belongs to")
        found = self.backend.encode(list(words), is_pretokenized=True, add_special_tokens=False)
        return list(found.ids), [-1 if w is None else w for w in found.word_ids]


@contextmanager
def splitting(tokenizer: Any) -> Iterator[Splitter]:
    """A splitter over `tokenizer`, whose truncation and padding are put back afterwards."""
    if not tokenizer.is_fast:
        yield Splitter(tokenizer, None)
        return
    backend = tokenizer.backend_tokenizer
    truncation, padding = backend.truncation, backend.padding
    backend.no_truncation()
    backend.no_padding()
    try:
        yield Splitter(tokenizer, backend)
    finally:
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


def last_limit(tokenizer: Any) -> int | None:
    """Where the tokenizer was last told to cut, or None."""
    if tokenizer is None or not tokenizer.is_fast:
        return None
    truncation = tokenizer.backend_tokenizer.truncation
    return int(truncation["max_length"]) if truncation else None
