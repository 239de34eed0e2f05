"""Does the vocabulary fit the text?

An unknown token stands for anything: what it replaces is gone. A word in single characters is
still there, but costs its length in positions.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from hf_recipe.core.check import Check, Located, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.data.source import splits_of
from hf_recipe.data.text_rows import TextRow, text_rows
from hf_recipe.data.tokenizer import (
    attended_tokens,
    collated,
    special_ids,
    splitting,
    token_ids,
    tokenizer_of,
)
from hf_recipe.instruments.subject import Subject

WORDS = 400  # different words that are split


@dataclass(frozen=True)
class Vocabulary(Measurement):
    """How a split's text fits the tokenizer.

    Attributes:
        rows: rows read; tokens: attended ids; unknown: those that are the unknown token.
        lost_rows: rows of which more than half is unknown.
        written: share of the unknown tokens that the text itself spells out, where it was read.
        words: different words of letters (four and more, of scripts that part words) that were
            split; apart: of these, broken into single characters.
        characters: whether the vocabulary itself is made of characters, or short pieces.
        bytes: whether it falls back on bytes; neither is looked at where words hold together.
        examples: rows that are mostly unknown.
    """

    rows: int
    tokens: int
    unknown: int = 0
    lost_rows: int = 0
    written: float = 0.0
    words: int = 0
    apart: int = 0
    characters: bool = False
    bytes: bool = False
    examples: tuple[int, ...] = ()


# ---------------------------------------------------------------- counting


def take_vocabulary(subject: Subject) -> Iterator[Located]:
    """Count unknown tokens of every split, and how its words are split."""
    tokenizer = tokenizer_of(subject)
    if tokenizer is None:
        raise Skip("there is no tokenizer: give the Trainer a processing_class")
    reasons = []
    for split in splits_of(subject) or ["train"]:
        try:
            yield Located(vocabulary(subject, split, tokenizer), split)
        except Skip as reason:
            reasons.append(str(reason))
    if len(reasons) == len(splits_of(subject) or ["train"]):
        raise Skip("; ".join(dict.fromkeys(reasons)))


def vocabulary(subject: Subject, split: str, tokenizer: Any) -> Vocabulary:
    """The counts over a split's batches."""
    special, unknown = special_ids(subject), unknown_id(tokenizer)
    rows = tokens = count = 0
    lost: list[int] = []
    lost_rows = 0
    for batch in collated(subject, split):
        ids = token_ids(batch)
        there = attended_tokens(batch, ids, special)
        is_unknown = there & (ids == unknown) if unknown is not None else there & False
        mostly = is_unknown.sum(1) > 0.5 * there.sum(1)
        rows += len(ids)
        tokens += int(there.sum())
        count += int(is_unknown.sum())
        lost_rows += int(mostly.sum())
        if len(batch.rows) == len(ids):
            lost += [batch.rows[i] for i in mostly.nonzero().flatten().tolist()]
    try:
        texts = [text for row in text_rows(subject, split) for text in _texts(row)]
        spelt = _written(text_rows(subject, split), tokenizer, unknown)
    except Skip:
        texts, spelt = [], 0.0
    words, apart = _broken(texts, tokenizer)
    return Vocabulary(
        rows,
        tokens,
        count,
        lost_rows,
        spelt,
        words,
        apart,
        characters=2 * apart > words and _of_short_pieces(tokenizer),
        bytes=2 * apart > words and _falls_back_on_bytes(tokenizer),
        examples=tuple(lost[:20]),
    )


def unknown_id(tokenizer: Any) -> int | None:
    """The unknown token's id; None where there is none, or where it is a mark that is used."""
    used = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    found = tokenizer.unk_token_id
    return None if found is None or found in used else int(found)


def _texts(row: TextRow) -> list[str]:
    return [*row.texts.values(), *(" ".join(words) for words in row.words.values())]


def _written(rows: Sequence[TextRow], tokenizer: Any, unknown: int | None) -> float:
    """How many of the unknown tokens the texts spell out ("<unk>", as some corpora do)."""
    seen = sum(row.ids.count(unknown) for row in rows) if unknown is not None else 0
    if not seen:
        return 0.0
    mark = str(tokenizer.unk_token)
    spelt = sum(max((text.count(mark) for text in _texts(row)), default=0) for row in rows)
    return min(1.0, spelt / seen)


def _broken(texts: Sequence[str], tokenizer: Any) -> tuple[int, int]:
    """Different words that were split, and those broken into single characters."""
    words: dict[str, None] = {}
    for text in texts:
        words |= dict.fromkeys(w for w in re.findall(r"[^\W\d_]{4,}", text[:2_000]) if _parts(w))
        if len(words) >= WORDS:
            break
    chosen = list(words)[:WORDS]
    with splitting(tokenizer) as splitter:
        apart = sum(len(splitter.ids(f" {word}")) >= 0.8 * len(word) for word in chosen)
    return len(chosen), apart


def _parts(word: str) -> bool:
    """Whether a word belongs to a script that parts words by spaces."""
    name = unicodedata.name(word[0], "")
    unparted = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
    return not name.startswith(unparted)


def _of_short_pieces(tokenizer: Any) -> bool:
    """Whether most of the vocabulary's pieces are one or two letters long."""
    pieces = (re.sub(r"^(##|▁|Ġ)", "", piece) for piece in tokenizer.get_vocab())
    sizes = [len(piece) for piece in pieces if piece.isalpha()]
    return not sizes or float(np.median(sizes)) < 3


def _falls_back_on_bytes(tokenizer: Any) -> bool:
    vocabulary = tokenizer.get_vocab()
    return "<0x0A>" in vocabulary or ("Ġ" in vocabulary and "Ċ" in vocabulary)


# ---------------------------------------------------------------- verdicts


def unknown_token(
    seen: Vocabulary,
    *,
    share: Annotated[float, "of tokens; word-level corpora have up to 5 % unknown (PTB)"] = 0.1,
    rows: Annotated[float, "of rows that are mostly unknown; judged"] = 0.05,
    worth: Annotated[float, "of tokens; below it no line is due; judged"] = 0.02,
    words: Annotated[float, "of words in single characters; names and typos stay under it"] = 0.5,
    enough: Annotated[int, "words split; judged"] = 40,
    some: Annotated[int, "unknown tokens; a handful in a handful of rows says nothing"] = 10,
) -> Iterator[Fault]:
    """Unknown tokens, rows lost to them, and words broken into characters."""
    unknown = seen.unknown / seen.tokens if seen.tokens else 0.0
    lost = seen.lost_rows / seen.rows if seen.rows else 0.0
    seldom = seen.unknown < some or seen.written >= 0.5
    if not seldom and (unknown > worth or lost > rows):
        yield Fault(
            message=f"{seen.unknown:,} of {seen.tokens:,} tokens ({unknown:.1%}) are unknown to "
            f"the tokenizer; {seen.lost_rows:,} of {seen.rows:,} rows ({lost:.1%}) are mostly so",
            severity=None if unknown > share or lost > rows else "note",
            evidence={
                "seen": f"{unknown:.1%} unknown",
                "expected": "almost none",
                "fraction": unknown,
                "rows": lost,
            },
            examples=seen.examples,
        )
    if seen.words >= enough and seen.apart > words * seen.words and not seen.characters:
        yield Fault(
            message=f"{seen.apart:,} of {seen.words:,} different words "
            f"({seen.apart / seen.words:.1%}) are broken into single characters: this "
            "tokenizer was made for other text",
            subject="words",
            severity="note" if seen.bytes else None,
            evidence={
                "seen": f"{seen.apart / seen.words:.1%} of words in characters",
                "expected": "most words in one to three pieces",
            },
        )


VOCABULARY = Probe("count unknown tokens", "batch", (Vocabulary,), take_vocabulary)

UNKNOWN_TOKEN = Check(
    name="unknown-token",
    stage="data",
    severity="warning",
    moments=("batch",),
    why="What an unknown token replaces is gone; words in single characters cost their length.",
    fix="tokenizer = AutoTokenizer.from_pretrained(name_of_the_model)  # the text's own language",
    source="deepchecks, unknown tokens, 2023; LMFlow issue 394, 2023",
    judges=(unknown_token,),
    unsure="Corpora that mark rare words on purpose, where the text is not there to show it.",
    explains=("conflicting-labels", "duplicate-example", "input-ignored"),
)
