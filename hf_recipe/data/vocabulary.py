"""Does the vocabulary fit the text, and are the ids the text's own?

An unknown token stands for anything: what it replaces is gone. A word in single characters is
still there, but costs its length in positions. And ids that were made by another tokenizer (an old
cache, a changed vocabulary) are legal numbers that mean something else.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import numpy as np

from hf_recipe.core.check import Check, Located, Measurement, Probe, Skip, private
from hf_recipe.core.finding import Fault
from hf_recipe.data.source import splits_of
from hf_recipe.data.text_rows import TextRow, of_every_split, text_rows
from hf_recipe.data.tokenizer import (
    Splitter,
    attended_tokens,
    collated,
    special_ids,
    splitting,
    token_ids,
    tokenizer_of,
)
from hf_recipe.instruments.subject import Subject

WORDS = 400  # different words that are split
LONGEST = 20_000  # characters of a text that are compared
GRAM = 5


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


@dataclass(frozen=True)
class TextMatch(Measurement):
    """Whether ids decode back to the text beside them.

    Attributes:
        rows: rows with ids and a text; alike: those whose ids are, or decode to, that text.
        kinship: correlation between the length of the text and the number of ids, NaN where
            either does not vary: whether the ids come from this text at all.
        column: the text.
        quotes: what the worst row's ids decode to, and its text.
        examples: rows that do not decode back.
    """

    rows: int
    alike: int
    kinship: float
    column: str
    quotes: tuple[str, ...] = private(default=())
    examples: tuple[int, ...] = ()


# ---------------------------------------------------------------- unknown tokens


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
        raise Skip("; ".join(reasons))


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


# ---------------------------------------------------------------- stale ids


def take_match(subject: Subject) -> Iterator[Located]:
    """Compare the ids of every split with the texts beside them."""
    tokenizer = tokenizer_of(subject)
    if tokenizer is None:
        raise Skip("there is no tokenizer: give the Trainer a processing_class")
    found = False
    for split, rows in of_every_split(subject):
        with splitting(tokenizer) as splitter:
            match = text_match(rows, splitter, frozenset(special_ids(subject).every))
        if match is not None:
            found = True
            yield Located(match, split)
    if not found:
        raise Skip("no text stands beside the token ids")


def text_match(
    rows: Sequence[TextRow], splitter: Splitter, special: frozenset[int]
) -> TextMatch | None:
    """How many rows' ids are those of a text beside them; None where no row has a text."""
    counted, alike = 0, 0
    sizes: dict[str, list[tuple[int, int]]] = {}
    odd: list[tuple[int, str, str]] = []
    for row in rows:
        texts = {k: v[:LONGEST] for k, v in row.texts.items()}
        texts |= {k: " ".join(v)[:LONGEST] for k, v in row.words.items()}
        parts = [[i for i in part if i not in special] for part in (row.ids, row.target or [])]
        if not texts or len(parts[0]) < 4 or max(map(len, texts.values())) < 2 * GRAM:
            continue
        counted += 1
        for column, text in texts.items():
            sizes.setdefault(column, []).append((len(text), len(parts[0])))
        if any(_alike(part, text, splitter) for part in parts for text in texts.values()):
            alike += 1
        else:
            said = _decoded(parts[0], splitter)
            odd.append((row.number, said, max(texts.values(), key=len)))
    if not counted:
        return None
    column = max(sizes, key=lambda c: np.nan_to_num(_correlation(sizes[c]), nan=-1.0))
    return TextMatch(
        counted,
        alike,
        _correlation(sizes[column]),
        column,
        quotes=tuple(f"{said[:120]!r} for {text[:120]!r}" for _, said, text in odd[:1]),
        examples=tuple(number for number, _, _ in odd[:20]),
    )


def _alike(ids: Sequence[int], text: str, splitter: Splitter) -> bool:
    """Whether ids share their pairs with a text's ids, or decode to its characters."""
    if len(ids) < 2 or len(text) < 2:
        return False
    own = splitter.ids(text)
    if _overlap(list(pairwise(ids)), list(pairwise(own))) >= 0.5:
        return True
    said, meant = _plain(_decoded(ids, splitter)), _plain(text)
    if _overlap(_grams(said), _grams(meant)) >= 0.5:
        return True
    if re.search(r"\s", text.strip()):
        return False
    pieces = [p for p in re.split(r"\s+", _decoded(ids, splitter).lower()) if len(p) >= 3]
    return bool(pieces) and sum(p in meant for p in pieces) >= 0.5 * len(pieces)


def _overlap(one: Sequence[Any], two: Sequence[Any]) -> float:
    """Shared items over the items of the shorter."""
    shared = (Counter(one) & Counter(two)).total()
    return shared / min(len(one), len(two)) if one and two else 0.0


def _decoded(ids: Sequence[int], splitter: Splitter) -> str:
    known = [i for i in ids if 0 <= i < len(splitter.tokenizer)]
    return str(splitter.tokenizer.decode(known, skip_special_tokens=True))


def _plain(text: str) -> str:
    """Without case, accents and white space, which tokenizers may drop."""
    bare = unicodedata.normalize("NFKD", text).casefold()
    return "".join(c for c in bare if not c.isspace() and not unicodedata.combining(c))


def _grams(text: str) -> list[str]:
    return [text[i : i + GRAM] for i in range(len(text) - GRAM + 1)]


def _correlation(pairs: Sequence[tuple[int, int]]) -> float:
    """Between texts' lengths and ids' numbers, rows at the greatest length (cut) left out."""
    most = max(count for _, count in pairs)
    kept = np.array([p for p in pairs if p[1] < most], dtype=float)
    if len(kept) < 10 or kept[:, 0].std() == 0 or kept[:, 1].std() == 0:
        return float("nan")
    return float(np.corrcoef(kept[:, 0], kept[:, 1])[0, 1])


# ---------------------------------------------------------------- verdicts


def unknown_token(
    seen: Vocabulary,
    *,
    share: Annotated[float, "of tokens; word-level corpora have up to 5 % unknown (PTB)"] = 0.1,
    rows: Annotated[float, "of rows that are mostly unknown; judged"] = 0.05,
    worth: Annotated[float, "of tokens; below it no line is due; judged"] = 0.02,
    words: Annotated[float, "of words in single characters; names and typos stay under it"] = 0.5,
    enough: Annotated[int, "words split; judged"] = 40,
) -> Iterator[Fault]:
    """Unknown tokens, rows lost to them, and words broken into characters."""
    unknown = seen.unknown / seen.tokens if seen.tokens else 0.0
    lost = seen.lost_rows / seen.rows if seen.rows else 0.0
    if seen.written < 0.5 and (unknown > worth or lost > rows):
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


def stale_tokens(
    seen: TextMatch,
    *,
    share: Annotated[float, "of rows that do not decode back; cleaning leaves fewer"] = 0.2,
    kinship: Annotated[float, "correlation of lengths that shows the ids' source"] = 0.8,
    enough: Annotated[int, "rows compared; judged"] = 10,
) -> Iterator[Fault]:
    """Ids that follow their text in length, or in other rows, and decode to something else."""
    odd = seen.rows - seen.alike
    if seen.rows < enough or odd <= share * seen.rows:
        return
    if seen.kinship >= kinship or seen.alike > share * seen.rows:
        yield Fault(
            message=f"in {odd:,} of {seen.rows:,} rows the token ids decode to something else than "
            f"the text beside them ({seen.column}): another tokenizer made them",
            subject=seen.column,
            evidence={
                "seen": f"{seen.alike:,} of {seen.rows:,} rows decode back",
                "expected": "all but a few",
                "kinship": seen.kinship,
            },
            examples=seen.examples,
            quotes=seen.quotes,
        )


VOCABULARY = Probe("count unknown tokens", "batch", (Vocabulary,), take_vocabulary)
MATCH = Probe("decode the token ids", "dataset", (TextMatch,), take_match)

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
)

STALE_TOKENS = Check(
    name="stale-tokens",
    stage="data",
    severity="warning",
    moments=("dataset",),
    why="Ids of another tokenizer are legal numbers with another meaning: nothing raises, and the "
    "model reads noise.",
    fix="dataset.map(tokenize, batched=True, load_from_cache_file=False)",
    source="LMFlow issue 394, 2023; open-instruct issues 1509 and 1518, 2026",
    judges=(stale_tokens,),
    unsure="Ids made on purpose from another form of the text (phonemes, a translation).",
    explains=("unknown-token", "truncated-example", "eos-missing"),
)
