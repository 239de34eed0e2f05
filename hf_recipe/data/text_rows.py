"""Rows of tokens beside the text they came from.

The network sees ids; whether they are the text's own ids, all of them, and which part of the text
they are can only be told with the raw columns, which the Trainer leaves out of the batch but the
data set still holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch

from hf_recipe.core.check import Skip
from hf_recipe.data.source import splits_of
from hf_recipe.data.tokenizer import (
    Special,
    attended_tokens,
    collated,
    special_ids,
    token_ids,
)
from hf_recipe.instruments.batches import Batch
from hf_recipe.instruments.subject import Subject

ROWS = 256  # a share of rows is then known to +- 3 points (one standard error at one half)
FEWEST = 16
CHARACTERS = 600_000  # about 0.2 CPU s of splitting
LONGEST = 50_000  # characters of one text
IGNORED = -100

PROMPT = frozenset(
    (
        *("prompt", "prompts", "instruction", "instructions", "question", "query", "problem"),
        *("input", "inputs", "source", "context", "article", "document", "dialogue"),
        *("user", "human", "system", "premise"),
    )
)
ANSWER = frozenset(
    (
        *("completion", "completions", "response", "responses", "output", "outputs", "answer"),
        *("answers", "target", "targets", "chosen", "assistant", "gpt", "solution", "reply"),
        *("summary", "highlights"),
    )
)


@dataclass(frozen=True)
class TextRow:
    """One row: its ids as the network gets them, and what the data set holds beside them.

    Attributes:
        number: row of the data set.
        ids: attended ids, special ones among them.
        labels: one for each id; None where labels are no sequence beside the ids.
        target: for encoder-decoders, the labels that count.
        texts: text columns; a conversation gives one for each role's first turn.
        words: columns that are lists of words.
        integers: columns that are whole numbers (a list of one) or lists of them, padding left
            out.
        stored: attended ids in the data set, before the collator; None where there are none.
    """

    number: int
    ids: list[int]
    labels: list[int] | None = None
    target: list[int] | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    words: Mapping[str, list[str]] = field(default_factory=dict)
    integers: Mapping[str, list[int]] = field(default_factory=dict)
    stored: list[int] | None = None


def text_rows(subject: Subject, split: str) -> list[TextRow]:
    """Up to 256 evenly spaced rows of a split, read once per subject.

    Raises:
        Skip: there are no token ids, or the rows behind a batch are not known.
    """
    key = f"text rows:{split}"
    if key not in subject.cache:
        subject.cache[key] = _read(subject, split)
    found: list[TextRow] = subject.cache[key]
    return found


def of_every_split(subject: Subject) -> Iterator[tuple[str, list[TextRow]]]:
    """The rows of every split that has some; raises Skip where none has."""
    reasons, found = [], False
    for split in splits_of(subject):
        try:
            rows = text_rows(subject, split)
        except Skip as reason:
            reasons.append(str(reason))
            continue
        found = True
        yield split, rows
    if not found:
        raise Skip("; ".join(dict.fromkeys(reasons)) or "there is no data set")


def _read(subject: Subject, split: str) -> list[TextRow]:
    batches, special = collated(subject, split), special_ids(subject)
    dataset = subject.rows(split).dataset
    numbers = [number for batch in batches for number in batch.rows]
    if not numbers:
        raise Skip("the data set's rows behind the batches are not known")
    few = read_columns(dataset, numbers[:: -(-len(numbers) // 8)])
    size = sum(len(v) for row in few.values() for v in row.values() if isinstance(v, str))
    limit = min(ROWS, max(FEWEST, CHARACTERS * len(few) // max(size, 1)))
    chosen = set(numbers[:: -(-len(numbers) // limit)])
    columns = read_columns(dataset, sorted(chosen))
    both = bool(getattr(subject.config, "is_encoder_decoder", False))
    rows: list[TextRow] = []
    for batch in batches:
        seen = _sequences(batch, special, both)
        for place, number in enumerate(batch.rows):
            if number in chosen:
                rows.append(_row(number, columns[number], seen, place, special))
    if all(not row.ids for row in rows):
        raise Skip("which ids belong to which row cannot be told after this collator")
    return rows


def _sequences(
    batch: Batch, special: Special, both: bool
) -> list[tuple[list[int], list[int] | None, list[int] | None]] | None:
    """(ids, labels beside them, target) of each row; None where rows are laid end to end."""
    ids = token_ids(batch)
    if len(ids) != len(batch.rows):
        return None
    there = attended_tokens(batch, ids, special)
    labels = batch.inputs.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.ndim != 2 or labels.is_floating_point():
        return [(ids[i][there[i]].tolist(), None, None) for i in range(len(ids))]
    labels = labels.detach().cpu()
    rows: list[tuple[list[int], list[int] | None, list[int] | None]] = []
    for i in range(len(ids)):
        beside = target = None
        if both:
            target = labels[i][labels[i] != IGNORED].tolist()
        elif labels.shape == ids.shape:
            beside = labels[i][there[i]].tolist()
        rows.append((ids[i][there[i]].tolist(), beside, target))
    return rows


def _row(
    number: int,
    columns: Mapping[str, Any],
    seen: list[tuple[list[int], list[int] | None, list[int] | None]] | None,
    place: int,
    special: Special,
) -> TextRow:
    integers = _without_padding({k: v for k, v in columns.items() if _of(v, int)}, special)
    stored = integers.get("input_ids")
    ids, labels, target = seen[place] if seen is not None else (stored or [], None, None)
    if stored is not None and len(stored) == len(ids):
        ids = stored  # a masked language model's batch has other ids in places
    return TextRow(
        number,
        ids,
        labels,
        target,
        texts={k: v for k, v in columns.items() if isinstance(v, str)},
        words={k: v for k, v in columns.items() if _of(v, str)},
        integers=integers,
        stored=stored,
    )


def _without_padding(integers: dict[str, list[int]], special: Special) -> dict[str, list[int]]:
    """The columns with what lies over padded ids left out."""
    ids = integers.get("input_ids", [])
    mask = integers.get("attention_mask", [])
    if len(mask) == len(ids):
        there = [i for i, seen in enumerate(mask) if seen]
    elif special.pad is None or special.pad in special.ends:
        return integers
    else:
        real = [i for i, token in enumerate(ids) if token != special.pad]
        there = list(range(real[0], real[-1] + 1)) if real else []
    return {k: [v[i] for i in there] if len(v) == len(ids) else v for k, v in integers.items()}


def _of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, kind) for v in value)


# ---------------------------------------------------------------- the raw columns


def read_columns(dataset: Any, numbers: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Texts, lists of words and whole numbers of some rows; images and floats are not read."""
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        held = _texts_held(dataset)
        return {i: {**_plain(dataset[i]), **{k: v[i] for k, v in held.items()}} for i in numbers}
    schema = dataset.features.arrow_schema
    wanted = [name for name in dataset.column_names if _is_wanted(schema.field(name).type)]
    if not wanted:
        return {i: {} for i in numbers}
    plain = dataset.with_format(None).select_columns(wanted).select(numbers)
    return {number: _plain(row) for row, number in zip(plain, numbers, strict=True)}


def _is_wanted(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_wanted(kind.value_type)
    if pa.types.is_struct(kind):
        return all(_is_wanted(kind.field(i).type) for i in range(kind.num_fields))
    texts = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return bool(texts or pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def _texts_held(dataset: Any) -> dict[str, Sequence[str]]:
    """Lists of texts that a torch data set holds as attributes, one for each of its rows."""
    try:
        held = vars(dataset)
    except TypeError:  # a list of rows
        return {}
    return {
        name: value
        for name, value in held.items()
        if isinstance(value, (list, tuple)) and len(value) == len(dataset)
        and value and isinstance(value[0], str)
    }  # fmt: skip


def _plain(row: Any) -> dict[str, Any]:
    """A row's texts, lists of words and whole numbers, conversations taken apart."""
    found: dict[str, Any] = {}
    for name, value in row.items() if isinstance(row, Mapping) else ():
        if isinstance(value, torch.Tensor) and value.ndim <= 1 and not value.is_floating_point():
            value = value.tolist()
        if isinstance(value, int):
            found[name] = [int(value)]
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            found |= _turns(name, value)
        elif isinstance(value, Mapping):  # {"translation": {"en": ..., "de": ...}}
            found |= {f"{name}.{k}": v for k, v in value.items() if isinstance(v, str)}
        elif isinstance(value, (str, list)):
            found[name] = value[:LONGEST]
    return found


def _turns(name: str, turns: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The first turn of each role of a conversation."""
    found: dict[str, str] = {}
    for turn in turns:
        role, said = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if isinstance(role, str) and isinstance(said, str):
            found.setdefault(f"{name}.{role}", said)
    return found


def is_prompt(column: str) -> bool:
    """Whether a column's name says that it is what the model is given."""
    return bool(PROMPT & set(re.split(r"[^a-z]+", column.lower())))


def is_answer(column: str) -> bool:
    """Whether a column's name says that it is what the model is to say."""
    return bool(ANSWER & set(re.split(r"[^a-z]+", column.lower())))
