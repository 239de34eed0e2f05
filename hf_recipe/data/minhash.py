"""Near copies of texts: one-permutation MinHash, banded lookup, and an exact comparison at the end.

Texts become sets of word pairs (`shingles`); the overlap of two sets (Jaccard) says how alike two
texts are, and one word in twenty replaced leaves about 0.8 of it. Each text keeps, for each of 96
bins, the lowest hash that falls into it; texts that agree in a band of bins are looked at
together. Whoever is reported was compared set by set, so that no hash can raise an alarm.

Everything is arithmetic on Arrow's buffers, a chunk at a time: no loop over rows. Sources: Li,
Owen and Zhang 2012 (one permutation); Shrivastava 2017 (empty bins); Leskovec et al. 2014,
Mining of Massive Datasets (banding).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hf_recipe.data.hashing import flat_array, is_list, list_parts, mix, numbers

Hashes = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

BANDS, DEPTH = (
    24,
    4,
)  # an overlap of .8 is found with 1 - 6e-6, one of .6 with .96, one of .2 with .04
BINS = BANDS * DEPTH
MOST_PAIRS = 400_000  # compared set by set; beyond it, those that agree in most bands
BLOCK = 20_000

_ODD = np.uint64(0x9E3779B97F4A7C15)
_INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 2**64))
_EMPTY = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class Shingles:
    """The word pairs of some rows, laid end to end: row i has ``values[bounds[i]:bounds[i + 1]]``.

    They are sorted and different within a row.
    """

    values: Hashes
    bounds: Integers

    @property
    def sizes(self) -> Integers:
        return np.diff(self.bounds)

    def take(self, rows: Integers) -> tuple[Hashes, Integers]:
        """The values of `rows`, end to end, and which of `rows` each belongs to."""
        sizes = self.sizes[rows]
        owner = np.repeat(np.arange(len(rows)), sizes)
        inside = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return self.values[np.repeat(self.bounds[:-1][rows], sizes) + inside], owner


# ---------------------------------------------------------------- words


def words_of(array: pa.Array) -> tuple[Hashes, Integers]:
    """A hash of every word (or token id) of a column, and the bounds of each row's.

    Case and punctuation do not count; scripts written without spaces count by character.
    """
    array = flat_array(array)
    if is_list(array.type):
        values, offsets = list_parts(array)
        return mix(numbers(flat_array(values)).view(np.uint64)), offsets
    wide = pa.types.is_large_string(array.type)
    _, offset_buffer, data = array.buffers()
    bounds = np.frombuffer(offset_buffer, np.int64 if wide else np.int32)
    bounds = bounds[array.offset : array.offset + len(array) + 1].astype(np.int64)
    if data is None or bounds[-1] == bounds[0]:
        return np.zeros(0, np.uint64), np.zeros(len(array) + 1, np.int64)
    text = np.frombuffer(data, np.uint8)[bounds[0] : bounds[-1]]
    return _hash_words(text, bounds - bounds[0])


def _hash_words(text: npt.NDArray[np.uint8], bounds: Integers) -> tuple[Hashes, Integers]:
    """Polynomial hashes of the words in `text`: differences of one running sum."""
    letters = _LETTERS[text]
    inside = letters != 0
    starts = inside.copy()
    np.greater(inside[1:], inside[:-1], out=starts[1:])
    heads = bounds[:-1][bounds[:-1] < bounds[1:]]
    starts[heads] = inside[heads]  # a row's first character follows another row's last
    starts |= text >= 0xE0  # Chinese, Japanese, Thai, ...: every character is a word
    first = np.flatnonzero(starts)
    powers = _powers(len(text))
    running = np.zeros(len(text) + 1, dtype=np.uint64)
    np.cumsum(letters * powers[:-1], out=running[1:])
    last = np.append(first[1:], len(text))  # what follows a word up to the next counts as zero
    hashes = (running[last] - running[first]) * _backwards(len(text))[first]
    return mix(hashes), np.searchsorted(first, bounds).astype(np.int64)


def _letter_table() -> npt.NDArray[np.uint64]:
    table = np.arange(256, dtype=np.uint64)
    kept = np.zeros(256, dtype=bool)
    kept[128:] = True
    for char in b"abcdefghijklmnopqrstuvwxyz0123456789":
        kept[char] = True
    for low, high in zip(b"abcdefghijklmnopqrstuvwxyz", b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", strict=True):
        kept[high], table[high] = True, low
    return np.where(kept, table, 0).astype(np.uint64)


_LETTERS = _letter_table()
_TABLES: dict[str, npt.NDArray[np.uint64]] = {}


def _grown(name: str, factor: np.uint64, size: int) -> npt.NDArray[np.uint64]:
    """1, factor, factor^2, ... modulo 2^64; kept between chunks."""
    known = _TABLES.get(name)
    if known is None or len(known) < size:
        steps = np.full(max(size, 1 << 20), factor, dtype=np.uint64)
        steps[0] = 1
        known = _TABLES[name] = np.cumprod(steps, dtype=np.uint64)
    return known


def _powers(size: int) -> npt.NDArray[np.uint64]:
    return _grown("forward", _ODD, size + 1)[: size + 1]


def _backwards(size: int) -> npt.NDArray[np.uint64]:
    return _grown("backward", _INVERSE, size + 1)[: size + 1]


def _pairs_of(columns: Iterable[pa.Array]) -> tuple[Hashes, Integers, int]:
    """The word pairs of rows, over one or more columns, whose each is, and the number of rows.

    A lone word stands for itself.
    """
    parts: list[Hashes] = [np.zeros(0, np.uint64)]
    owners: list[Integers] = [np.zeros(0, np.int64)]
    rows = 0
    for place, array in enumerate(columns):
        words, bounds = words_of(array)
        rows = len(array)
        sizes = np.diff(bounds)
        owner = np.repeat(np.arange(rows), sizes)
        salt = np.uint64(place * int(_ODD) % 2**64)
        if len(words) > 1:
            together = owner[1:] == owner[:-1]
            parts.append((words[:-1] * _ODD + words[1:] + salt)[together])
            owners.append(owner[1:][together])
        lone = sizes == 1
        parts.append(words[bounds[:-1][lone]] + salt)
        owners.append(np.flatnonzero(lone))
    return mix(np.concatenate(parts)), np.concatenate(owners), rows


def shingles_of(columns: Iterable[pa.Array]) -> Shingles:
    """The different word pairs of each row."""
    values, owner, rows = _pairs_of(columns)
    # A row's shingles sort within it: its number takes the place of their highest bits.
    bits = np.uint64(max(int(rows - 1).bit_length(), 1))
    keys = np.sort((owner.astype(np.uint64) << (np.uint64(64) - bits)) | (values >> bits))
    keys = keys[np.append(True, keys[1:] != keys[:-1])] if len(keys) else keys
    owner = (keys >> (np.uint64(64) - bits)).astype(np.int64)
    bounds = np.searchsorted(owner, np.arange(rows + 1)).astype(np.int64)
    return Shingles(mix(keys << bits), bounds)


# ---------------------------------------------------------------- signatures


def band_keys(columns: Iterable[pa.Array]) -> tuple[Hashes, Integers]:
    """One number per row and band, (rows, BANDS), and the number of word pairs in each row.

    Rows that agree in a band may be near copies.
    """
    values, owner, rows = _pairs_of(columns)
    low = values & np.uint64(0xFFFFFFFF)
    bins = ((values >> np.uint64(32)) * np.uint64(BINS)) >> np.uint64(32)
    lowest = np.full(rows * BINS, _EMPTY)
    np.minimum.at(lowest, owner * BINS + bins.astype(np.int64), low)
    grid = _densified(lowest.reshape(rows, BINS))
    keys = np.zeros((rows, BANDS), dtype=np.uint64)
    for depth in range(DEPTH):  # bins of a band lie far apart: neighbours share what fills them
        keys = mix(keys ^ grid[:, depth * BANDS : (depth + 1) * BANDS])
    return keys, np.bincount(owner, minlength=rows)


def _densified(grid: Hashes) -> Hashes:
    """Empty bins take the value of a full one of their row, tried in an order of their own.

    The same order in every row: two rows fill a bin alike where they agree in what fills it.
    """
    rows, bins = np.nonzero(grid == _EMPTY)
    filled = grid.copy()
    for order in _ORDERS:
        if not len(rows):
            break
        values = grid[rows, order[bins]]
        full = values != _EMPTY
        filled[rows[full], bins[full]] = values[full]
        rows, bins = rows[~full], bins[~full]
    return filled


def _orders() -> npt.NDArray[np.int64]:
    """Where each bin looks first, second, ...: (tries, BINS); every bin looks everywhere."""
    draw = np.random.default_rng(0)
    return np.stack([draw.permutation(BINS) for _ in range(BINS)]).T.copy()


_ORDERS = _orders()


def candidate_pairs(keys: Hashes, alive: npt.NDArray[np.bool_]) -> Integers:
    """Pairs of rows, (pairs, 2), that agree in a band; those that agree in most bands first.

    In a band's bucket each row is paired with its neighbour and with the first of them, so that a
    bucket of n rows costs 2 n pairs and its rows still hang together.
    """
    rows = np.flatnonzero(alive)
    pairs: list[Integers] = []
    total = len(keys)
    for band in range(keys.shape[1]):
        column = keys[rows, band]
        order = np.argsort(column, kind="stable")
        column = column[order]
        same = np.flatnonzero(column[1:] == column[:-1])
        if not len(same):
            continue
        heads = np.concatenate([[True], column[1:] != column[:-1]])
        first = np.maximum.accumulate(np.where(heads, np.arange(len(column)), 0))
        numbered = rows[order]
        pairs.append(numbered[same] * total + numbered[same + 1])
        far = same[first[same + 1] < same]
        pairs.append(numbered[first[far + 1]] * total + numbered[far + 1])
    if not pairs:
        return np.zeros((0, 2), dtype=np.int64)
    codes, times = np.unique(np.concatenate(pairs), return_counts=True)
    if len(codes) > MOST_PAIRS:
        codes = np.sort(codes[np.argsort(-times, kind="stable")[:MOST_PAIRS]])
    return np.stack([codes // total, codes % total], axis=1)


def overlaps(pairs: Integers, shingles: Shingles) -> Floats:
    """The exact overlap (Jaccard) of the shingles of each pair of rows."""
    found = [
        _overlaps(pairs[start : start + BLOCK], shingles) for start in range(0, len(pairs), BLOCK)
    ]
    return np.concatenate(found) if found else np.zeros(0)


def _overlaps(pairs: Integers, shingles: Shingles) -> Floats:
    one, owner = shingles.take(pairs[:, 0])
    two, other = shingles.take(pairs[:, 1])
    bits = np.uint64(max(int(len(pairs) - 1).bit_length(), 1))

    def keyed(values: Hashes, owner: Integers) -> Hashes:
        return (owner.astype(np.uint64) << (np.uint64(64) - bits)) | (values >> bits)

    both = np.sort(np.concatenate([keyed(one, owner), keyed(two, other)]))
    shared = both[1:][both[1:] == both[:-1]] >> (np.uint64(64) - bits)
    common = np.bincount(shared.astype(np.int64), minlength=len(pairs))
    sizes = shingles.sizes
    union = sizes[pairs[:, 0]] + sizes[pairs[:, 1]] - common
    return np.asarray(common / np.maximum(union, 1))
