"""A sample of a split that a cheap probe can learn from: what goes in, and the class of each row.

The questions about the data (is order needed, how short may it be, what gives the label away) are
asked of cheap models on a few thousand rows. The rows are drawn with a fixed seed, equal inputs
once, no class more than three times as often as the rarest; half of them, chosen by the input's
hash, are kept for judging. Columns that cannot be read are named in `unread`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hf_recipe.core.check import Skip
from hf_recipe.data.audio import Sounds, is_audio, read_sounds
from hf_recipe.data.hashing import (
    Hashes,
    flat_array,
    flat_lists,
    is_list,
    is_number,
    list_parts,
    mix,
    numbers,
    table_hashes,
)
from hf_recipe.data.labels import IGNORED, seen_counts
from hf_recipe.data.pictures import Pictures, read_pictures
from hf_recipe.data.source import Source, roles_of, source_of
from hf_recipe.data.words import TokenRows, rows_of_ids
from hf_recipe.instruments.subject import Subject

Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

ROWS = 6_000  # of text or numbers: the held-out half then resolves about two points of accuracy
IMAGES = 1_500
FEWEST = 200  # rows under which no probe is tried
MOST_CLASSES = 20  # the commonest ones stand for all
FEWEST_OF_CLASS = 20
UNEVEN = 3  # a class may come this many times as often as the rarest
FEW_TEXTS = 50  # different values of a text column that is a category
WIDEST = 4_096  # elements of a vector


@dataclass(frozen=True)
class Contents:
    """The columns of some rows, by what they hold.

    Attributes:
        texts: the text of each row, where a column holds free text; several are joined.
        tokens: token ids, where a column holds them.
        pictures: images, where a column holds them.
        sounds: recordings, where a column holds them.
        columns: numbers by column (vectors as "name[0]", ...), NaN where missing; categories as
            codes in order of appearance.
        categories: those of `columns` that are codes.
        unread: columns of kinds that no probe reads, each with its type.
    """

    texts: list[str] | None = None
    tokens: TokenRows | None = None
    pictures: Pictures | None = None
    sounds: Sounds | None = None
    columns: Mapping[str, Floats] = field(default_factory=dict)
    categories: frozenset[str] = frozenset()
    unread: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """Rows of one split with their classes.

    Attributes:
        rows: data set row numbers, rising.
        labels: (n,) class of each row, 0..K - 1; names: the K classes.
        held: (n,) which rows judge; the others teach.
        inputs: their contents, of the columns that the model gets.
        note: how much was read, and what was done to the labels.
        source: where they come from.
        places: their positions in the source.
    """

    rows: Integers
    labels: Integers
    names: tuple[str, ...]
    held: Flags
    inputs: Contents
    note: str
    source: Source
    places: Integers

    @property
    def classes(self) -> int:
        return len(self.names)


def sample_of(subject: Subject) -> Sample:
    """The sample of the training set, drawn once per subject; raises Skip with the reason."""
    if "sample" not in subject.cache:
        try:
            subject.cache["sample"] = draw(subject)
        except Skip as reason:
            subject.cache["sample"] = reason
    found: Sample | Skip = subject.cache["sample"]
    if isinstance(found, Skip):
        raise Skip(str(found))
    return found


def draw(
    subject: Subject,
    *,
    seed: int = 0,
    rows: int = ROWS,
    fewest: int = FEWEST,
    of_class: int = FEWEST_OF_CLASS,
) -> Sample:
    """Draw a sample of the training set.

    Args:
        rows: the most that are drawn; fewest: under which none is.
        of_class: rows of a class under which it is left out.
    """
    source = source_of(subject, "train")
    roles = roles_of(subject, source)
    if not roles.inputs:
        raise Skip("there is no input column")
    if source.varies:
        raise Skip("a row comes out differently each time it is read")
    codes, names, how = class_of_rows(subject, source)
    first: pa.Table = next(source.chunks(roles.inputs))
    pictured = any(pa.types.is_struct(column.type) for column in first.schema)
    limit = min(IMAGES, rows) if pictured else rows
    places, kept = _balanced(codes, len(names), limit, of_class, np.random.default_rng(seed))
    table = gather(source, places, roles.inputs)
    hashes = table_hashes(table, table.column_names)
    _, firsts = np.unique(hashes, return_index=True)
    firsts.sort()
    copies = len(places) - len(firsts)
    places, table, hashes = places[firsts], table.take(pa.array(firsts)), hashes[firsts]
    if len(places) < fewest:
        raise Skip(f"{len(places)} different rows with a usable label; {fewest} are the least")
    inputs, good = contents_of(subject, source, table, places)
    labels = np.searchsorted(kept, codes[places][good])
    notes = [f"a sample of {int(good.sum()):,} rows", source.note, how]
    if copies:
        notes.append(f"{copies:,} copies left out")
    if not good.all():
        broken = source.rows[places][~good]
        notes.append(f"{len(broken)} rows could not be decoded, first row {broken[0]}")
    if len(kept) < len(names):
        notes.append(f"{len(kept)} of {len(names):,} classes")
    return Sample(
        rows=source.rows[places][good],
        labels=labels.astype(np.int64),
        names=tuple(names[k] for k in kept),
        held=halves(hashes)[good],
        inputs=inputs,
        note="; ".join(note for note in notes if note),
        source=source,
        places=places[good],
    )


def halves(hashes: Hashes) -> Flags:
    """Which rows judge: a fair coin that falls alike for equal rows."""
    return np.asarray((mix(hashes) >> np.uint64(17)) & np.uint64(1), dtype=bool)


def gather(source: Source, places: Integers, columns: Sequence[str]) -> pa.Table:
    """Rows of `source` at `places` as one table."""
    picked = list(columns)
    if isinstance(source.data, pa.Table):
        return source.data.select(picked).take(pa.array(places))
    chosen = source.data.select_columns(picked).select(places).with_format("arrow")
    table: pa.Table = chosen[:]
    return table


# ---------------------------------------------------------------- labels


def class_of_rows(subject: Subject, source: Source) -> tuple[Integers, list[str], str]:
    """The class of every row of `source` (-1: none), the classes' names, and how they were made.

    A quantity becomes two classes, cut at its median. Raises Skip where a row has no one class.
    """
    roles = roles_of(subject, source)
    counts = seen_counts(subject, source, roles)
    name = counts.column
    column = pa.chunked_array([flat_array(c.column(name)) for c in source.chunks([name])])
    if counts.form == "number":
        values = np.concatenate([floats_of(chunk) for chunk in column.chunks])
        middle = float(np.nanmedian(values[np.isfinite(values)]))
        codes = np.where(np.isfinite(values), values > middle, -1).astype(np.int64)
        return codes, ["at most the median", "above it"], f"{name} cut at its median"
    if counts.form != "class":
        raise Skip(f"labels of the form {counts.form!r} are not one class a row")
    encoded = column.combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.chunk(0)
    values = encoded.dictionary.to_pylist()
    codes = np.asarray(encoded.indices.fill_null(-1), dtype=np.int64)
    missing = [k for k, v in enumerate(values) if v is None or v != v or v == IGNORED]
    codes[np.isin(codes, missing)] = -1
    return codes, [str(v) for v in values], ""


def _balanced(
    codes: Integers, classes: int, limit: int, fewest: int, rng: np.random.Generator
) -> tuple[Integers, Integers]:
    """Positions of up to `limit` rows, and the classes that they are of, in rising order."""
    counts = np.bincount(codes[codes >= 0], minlength=classes)
    order = np.argsort(-counts, kind="stable")[:MOST_CLASSES]
    kept = np.sort(order[counts[order] >= fewest])
    if len(kept) < 2:
        raise Skip(f"fewer than two classes with {fewest} rows")
    cap = UNEVEN * int(counts[kept].min())
    chosen = []
    for code in kept:
        inside = np.flatnonzero(codes == code)
        chosen.append(rng.permutation(inside)[:cap])
    places = rng.permutation(np.concatenate(chosen))[:limit]
    return np.sort(places), kept


# ---------------------------------------------------------------- columns


def contents_of(
    subject: Subject, source: Source, table: pa.Table, places: Integers | None
) -> tuple[Contents, Flags]:
    """What the columns of `table` hold, and which of its rows could be read.

    Args:
        places: the position of each row of `table` in `source`, for what Arrow does not hold;
            None: no images are looked for.
    """
    found = Contents()
    texts: list[list[str]] = []
    columns: dict[str, Floats] = {}
    categories, unread = set(), []
    good = np.ones(table.num_rows, dtype=bool)
    for name in table.column_names:
        array = flat_array(table.column(name))
        pictures = None
        if found.pictures is None and places is not None:
            pictures, read = read_pictures(subject, source, name, array, places)
        if pictures is not None:
            found = replace(found, pictures=pictures)
            good &= read
        elif found.sounds is None and is_audio(source, name):
            found = replace(found, sounds=read_sounds(array))
        elif is_number(array.type):
            columns[name] = floats_of(array)
        elif pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
            if _is_category(array):
                columns[name] = _codes(array)
                categories.add(name)
            else:
                texts.append(array.fill_null("").to_pylist())
        elif is_list(array.type) and found.tokens is None and name == "input_ids":
            found = replace(found, tokens=rows_of_ids(*_ids(array)))
        elif (vector := _vector(array)) is not None:
            columns |= {f"{name}[{i}]": vector[:, i] for i in range(vector.shape[1])}
        else:
            unread.append(f"{name} ({array.type})")
    joined = [" | ".join(parts) for parts in zip(*texts, strict=True)] if texts else None
    found = replace(
        found,
        texts=joined,
        columns=columns,
        categories=frozenset(categories),
        unread=tuple(unread),
    )
    if not good.all():  # of the pictures only those that could be read are there
        found = replace(only(replace(found, pictures=None), good), pictures=found.pictures)
    return found, good


def only(contents: Contents, kept: Flags) -> Contents:
    """The contents of the rows in `kept` alone."""
    chosen = np.flatnonzero(kept)
    return replace(
        contents,
        texts=[contents.texts[i] for i in chosen] if contents.texts is not None else None,
        tokens=contents.tokens.take(chosen) if contents.tokens is not None else None,
        pictures=contents.pictures.take(chosen) if contents.pictures is not None else None,
        sounds=contents.sounds.take(chosen) if contents.sounds is not None else None,
        columns={name: values[chosen] for name, values in contents.columns.items()},
    )


def _is_category(array: pa.Array) -> bool:
    """Few short values that come back often."""
    distinct = len(pc.unique(array.drop_null()))
    return distinct <= min(FEW_TEXTS, max(len(array) // 20, 2))


def _codes(array: pa.Array) -> Floats:
    codes = array.dictionary_encode().indices
    return np.asarray(codes.cast(pa.float64()).fill_null(np.nan), dtype=np.float64)


def floats_of(array: pa.Array) -> Floats:
    """Numbers as floats; nulls and infinities as NaN."""
    values = numbers(array).astype(np.float64)
    values[~np.asarray(array.is_valid())] = np.nan
    return np.where(np.isfinite(values), values, np.nan)


def vectors_of(column: pa.ChunkedArray, width: int) -> Floats:
    """(rows, width) of a column of vectors of one length; rows that are null are left out."""
    values, _ = list_parts(flat_array(column).drop_null())
    return floats_of(flat_array(values)).reshape(-1, width)


def _ids(array: pa.Array) -> tuple[Integers, Integers]:
    values, offsets = flat_lists(array)  # of multiple choice, all choices of a row
    return numbers(values).astype(np.int64), offsets


def _vector(array: pa.Array) -> Floats | None:
    """Lists of as many numbers in every row as a matrix; None for anything else."""
    if not is_list(array.type) or array.null_count:
        return None
    values, offsets = list_parts(array)
    values, lengths = flat_array(values), np.diff(offsets)
    if not is_number(values.type) or not len(lengths) or lengths.min() != lengths.max():
        return None
    width = int(lengths[0])
    return floats_of(values).reshape(-1, width) if 0 < width <= WIDEST else None
