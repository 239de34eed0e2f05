"""Missing values that were written out as words, and numbers that a word turned into text.

`str(None)` makes the text "None", pandas writes "nan", spreadsheets "#N/A": no null is left to be
counted, and a model learns the word. One such word in a column of numbers, and the file's reader
takes all of them for text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_recipe.core.check import Located, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.data.hashing import flat_array
from hf_recipe.data.source import Source, roles_of, source_of, splits_of
from hf_recipe.instruments.subject import Subject

NULLS = ("None", "none", "nan", "NaN", "NAN", "null", "NULL", "N/A", "n/a", "NA", "<NA>", "NaT",
         "#N/A")  # fmt: skip
NUMBER = r"^\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*$"
SHORT = 24  # bytes of a cell that may be either
VARIED = 50  # different values from which a column is no list of categories
KEPT = 20


@dataclass(frozen=True)
class WrittenCells(Measurement):
    """Cells of one text column of the input that stand for something else.

    Attributes:
        column: its name; rows: rows read; different: values seen, counted up to 51.
        nulls: cells that are a word for a missing value; words: those words, the commonest first.
        numbers: cells that are numbers written out.
        others: different cells that are neither (counted up to 51); shown: the commonest.
        null_rows, other_rows: some of their data set rows.
    """

    column: str
    rows: int
    different: int
    nulls: int = 0
    words: tuple[str, ...] = ()
    numbers: int = 0
    others: int = 0
    shown: str = ""
    null_rows: tuple[int, ...] = ()
    other_rows: tuple[int, ...] = ()


def take_written(subject: Subject) -> Iterator[Located]:
    """Look at the short cells of every text column of the training input."""
    source = source_of(subject, "train")
    columns = [n for n in roles_of(subject, source).inputs if n in source.columns]
    schema = [source.schema.field(name) for name in columns]
    texts = [
        f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)
    ]
    if not texts:
        raise Skip(f"the {splits_of(subject)[0]} data has no column of text")
    for name in texts:
        yield Located(written_cells(source, name), "train")


def written_cells(source: Source, name: str) -> WrittenCells:
    """Count what the cells of a text column stand for."""
    words: Counter[str] = Counter()
    others: Counter[str] = Counter()
    values: set[str] = set()
    numbers, rows, null_rows, other_rows = 0, 0, [], []
    for chunk in source.chunks([name]):
        array = flat_array(chunk.column(name))
        here = source.rows[rows : rows + len(array)]
        rows += len(array)
        short = np.asarray(pc.less_equal(pc.binary_length(array), SHORT).fill_null(False))
        cells = array.filter(pa.array(short))
        is_null = np.asarray(pc.is_in(cells, value_set=pa.array(NULLS, cells.type)))
        is_number = np.asarray(pc.match_substring_regex(cells, NUMBER))
        numbers += int(is_number.sum())
        words.update(cells.filter(pa.array(is_null)).to_pylist())
        null_rows += here[short][is_null].tolist()
        if len(others) <= VARIED:
            rest = ~is_null & ~is_number
            others.update(cells.filter(pa.array(rest)).to_pylist())
            long = array.filter(pa.array(~short)).drop_null()
            others.update(f"{text[:40]} ..." for text in long.slice(0, VARIED + 1).to_pylist())
            other_rows += [*here[short][rest].tolist(), *here[~short].tolist()]
        if len(values) <= VARIED:
            values.update(v for v in array.unique().slice(0, VARIED + 2).to_pylist() if v)
    return WrittenCells(
        column=name,
        rows=rows,
        different=min(len(values), VARIED + 1),
        nulls=sum(words.values()),
        words=tuple(word for word, _ in words.most_common(3)),
        numbers=numbers,
        others=min(len(others), VARIED + 1),
        shown=next((text for text, _ in others.most_common(1)), ""),
        null_rows=tuple(null_rows[:KEPT]),
        other_rows=tuple(other_rows[:KEPT]),
    )


def written_missing(
    seen: WrittenCells,
    *,
    written: Annotated[
        float, "share of cells that are a word for nothing; fewer may be meant; judged"
    ] = 0.002,
    written_rows: Annotated[int, "of them, at least; judged"] = 3,
    numeric: Annotated[float, "share of numbers from which a text column was one; judged"] = 0.5,
    few: Annotated[int, "different words that spoil a column of numbers; more are codes"] = 5,
) -> Iterator[Fault]:
    """Words for nothing in a varied column, and words among numbers.

    In a list of categories "none" is a category.
    """
    words = ", ".join(repr(word) for word in seen.words)
    if seen.different <= VARIED:
        return
    if numeric * seen.rows <= seen.numbers < seen.rows and (seen.nulls or 0 < seen.others <= few):
        spoilt = words or repr(seen.shown)
        rows = seen.null_rows or seen.other_rows
        yield Fault(
            message=f"{seen.column} is read as text: {seen.numbers:,} of {seen.rows:,} cells are "
            f"numbers, the others words ({spoilt}), first in row {rows[0]}",
            subject=f"words in {seen.column}",
            severity="warning",
            fix=f"pandas.to_numeric(frame[{seen.column!r}], errors='coerce')  # then fill or drop",
            evidence={"seen": f"{seen.numbers:,} numbers as text", "expected": "numbers"},
            examples=rows,
        )
    elif seen.nulls >= max(written_rows, written * seen.rows):
        yield Fault(
            message=f"{seen.column} holds {words} as a text in {seen.nulls:,} of {seen.rows:,} "
            f"rows: a missing value that was written out; first in row {seen.null_rows[0]}",
            subject=f"words in {seen.column}",
            severity="warning",
            fix=f"dataset.filter(lambda row: row[{seen.column!r}] not in {list(seen.words)})",
            evidence={"seen": f"{seen.nulls:,} rows", "expected": "none"},
            examples=seen.null_rows,
        )


WRITTEN = Probe("look for words that stand for nothing", "dataset", (WrittenCells,), take_written)
