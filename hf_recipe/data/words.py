"""Text as rows of token numbers, and the features that cheap probes learn from.

Everything that a probe may look at becomes pairs (row, key): a word, two neighbours, a word in
its eighth of the text, two words in their order. Keys are 64-bit numbers, so that a million of
them cost a sort.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_recipe.data.hashing import Hashes, mix

Integers = npt.NDArray[np.int64]

# words with their accents and case, marks, and white space that is more than one blank
TOKEN = re.compile(r"\w+|[^\w\s]|[^\S ]|\s{2,}|^ | $")
LONGEST = 1_024  # tokens of a row: the first and the last half of them stand for the rest
CHARACTERS = 10_000  # at either end, of longer texts


@dataclass(frozen=True)
class TokenRows:
    """Rows of tokens laid end to end.

    Attributes:
        ids: (tokens,) numbers, 0..vocabulary - 1 for words, the user's own for token ids.
        offsets: (rows + 1,) where each row begins.
        vocabulary: the word of each number; empty for token ids.
        cut: rows that were longer than what is kept of them.
    """

    ids: Integers
    offsets: Integers
    vocabulary: tuple[str, ...] = ()
    cut: int = 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Integers:
        """Tokens of each row."""
        return np.diff(self.offsets)

    @property
    def owner(self) -> Integers:
        """The row of each token."""
        return np.repeat(np.arange(len(self), dtype=np.int64), self.lengths)

    @property
    def place(self) -> Integers:
        """The position of each token in its row."""
        return np.arange(len(self.ids), dtype=np.int64) - np.repeat(self.offsets[:-1], self.lengths)

    def where(self, kept: npt.NDArray[np.bool_]) -> TokenRows:
        """The same rows with the flagged tokens alone."""
        lengths = np.bincount(self.owner[kept], minlength=len(self))
        return TokenRows(self.ids[kept], _offsets(lengths), self.vocabulary, self.cut)

    def take(self, rows: npt.NDArray[Any]) -> TokenRows:
        """The rows at `rows`, in their order."""
        lengths = self.lengths[rows]
        starts = np.repeat(self.offsets[:-1][rows], lengths)
        within = np.arange(int(lengths.sum())) - np.repeat(_offsets(lengths)[:-1], lengths)
        return TokenRows(self.ids[starts + within], _offsets(lengths), self.vocabulary, self.cut)

    def keep(self, count: int, end: str) -> TokenRows:
        """At most `count` tokens of each row, from its "head", its "tail" or its "middle"."""
        lengths = self.lengths
        surplus = np.maximum(lengths - count, 0)
        first = {"head": surplus * 0, "tail": surplus, "middle": surplus // 2}[end]
        place = self.place - np.repeat(first, lengths)
        return self.where((place >= 0) & (place < count))

    def shuffled(self, rng: np.random.Generator) -> TokenRows:
        """The same tokens in every row, in an order that means nothing."""
        order = np.lexsort((rng.random(len(self.ids)), self.owner))
        return TokenRows(self.ids[order], self.offsets, self.vocabulary, self.cut)


def _offsets(lengths: npt.NDArray[Any]) -> Integers:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def tokenise(texts: Sequence[str]) -> TokenRows:
    """Texts as rows of word numbers; very long ones by their two ends."""
    known: dict[str, int] = {}
    ids: list[int] = []
    lengths, cut = [], 0
    half = LONGEST // 2
    for text in texts:
        if len(text) > 2 * CHARACTERS:
            text, cut = f"{text[:CHARACTERS]} {text[-CHARACTERS:]}", cut + 1
        words = TOKEN.findall(text)
        if len(words) > LONGEST:
            words, cut = words[:half] + words[-half:], cut + 1
        lengths.append(len(words))
        ids += [known.setdefault(word, len(known)) for word in words]
    return TokenRows(np.asarray(ids, np.int64), _offsets(np.asarray(lengths)), tuple(known), cut)


def rows_of_ids(ids: Integers, offsets: Integers) -> TokenRows:
    """Token ids as rows; what stands most often at the end of rows as padding is cut off."""
    rows = TokenRows(ids, offsets)
    long = rows.lengths > LONGEST
    if long.any():
        half = LONGEST // 2
        from_end = np.repeat(rows.lengths, rows.lengths) - rows.place
        rows = rows.where((rows.place < half) | (from_end <= LONGEST - half))
    return without_padding(TokenRows(rows.ids, rows.offsets, (), int(long.sum())))


def without_padding(rows: TokenRows) -> TokenRows:
    """Rows without a run of one same token at their end, where most rows of one length have it."""
    lengths = rows.lengths
    if len(rows) < 2 or not lengths.min() or lengths.min() != lengths.max() or lengths[0] < 3:
        return rows
    grid = rows.ids.reshape(len(rows), -1)
    ends, counts = np.unique(grid[:, -1][grid[:, -1] == grid[:, -2]], return_counts=True)
    if not len(ends) or counts.max() < 0.1 * len(rows):
        return rows
    same = grid[:, ::-1] == ends[counts.argmax()]
    padding = np.cumprod(same, axis=1)[:, ::-1].astype(bool)
    padding[:, 0] = False  # a row that is all padding keeps one
    return rows.where(~padding.reshape(-1))


# ---------------------------------------------------------------- features


@dataclass(frozen=True)
class Keys:
    """Features as pairs: `rows[i]` has `keys[i]`."""

    rows: Integers
    keys: Hashes

    def __add__(self, other: Keys) -> Keys:
        return Keys(
            np.concatenate([self.rows, other.rows]), np.concatenate([self.keys, other.keys])
        )


def _key(kind: int, *parts: npt.NDArray[Any]) -> Hashes:
    key = np.full(len(parts[0]), kind, dtype=np.uint64)
    for part in parts:
        key = mix(key ^ part.astype(np.int64).view(np.uint64))
    return key


def bag(tokens: TokenRows) -> Keys:
    """Which words stand in a row."""
    return Keys(tokens.owner, _key(1, tokens.ids))


def neighbours(tokens: TokenRows) -> Keys:
    """Which two words follow each other."""
    owner = tokens.owner
    same = owner[1:] == owner[:-1]
    return Keys(owner[1:][same], _key(2, tokens.ids[:-1][same], tokens.ids[1:][same]))


def placed(tokens: TokenRows, parts: int = 8) -> Keys:
    """Which words stand in which eighth of a row."""
    part = tokens.place * parts // np.maximum(np.repeat(tokens.lengths, tokens.lengths), 1)
    return Keys(tokens.owner, _key(3, tokens.ids, part))


def ordered_pairs(tokens: TokenRows, longest: int = 48) -> Keys:
    """Which word stands anywhere before which, and which two words stand at the two ends.

    Quadratic in length: of longer rows the first and last `longest` / 2 words are looked at.
    """
    half = longest // 2
    from_end = np.repeat(tokens.lengths, tokens.lengths) - tokens.place
    short = tokens.where((tokens.place < half) | (from_end <= half))
    rows, keys = [], []
    owner, ids = short.owner, short.ids
    for gap in range(1, longest):
        same = owner[gap:] == owner[:-gap]
        if not same.any():
            break
        rows.append(owner[gap:][same])
        keys.append(_key(4, ids[:-gap][same], ids[gap:][same]))
    full = np.flatnonzero(short.lengths > 1)
    first, last = short.ids[short.offsets[full]], short.ids[short.offsets[full + 1] - 1]
    rows.append(full)
    keys.append(_key(5, first, last))
    return Keys(np.concatenate(rows), np.concatenate(keys))
