"""What stands in each column: ranges, spread, lengths, what is missing, blank or constant.

Become one with the data: one pass over Arrow, a chunk at a time, gives every column's numbers.
The checks judge only the columns that the model gets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hf_recipe.core.check import Check, Located, Measurement, Probe, Skip
from hf_recipe.core.exhibit import Table
from hf_recipe.core.finding import Fault
from hf_recipe.data.hashing import array_hashes, flat_array, is_list, is_number, list_parts, numbers
from hf_recipe.data.source import Source, roles_of, source_of, splits_of
from hf_recipe.instruments.subject import Subject

EXAMPLES = 20


@dataclass(frozen=True)
class ColumnNumbers:
    """One column of one split.

    Attributes:
        name, kind: the column and its type ("text", "number", "numbers", "image", "other").
        role: "input", "label" or "" for what the model does not get.
        rows, nulls: rows read, rows that are null.
        nonfinite: rows that hold NaN or infinity.
        blank: rows of white space, of length zero, or (images) of one colour.
        constant: whether all rows are the same; never said of a single row.
        low, high, mean, deviation: of the numbers, elements of lists included.
        shortest, longest, mean_length: characters, or elements; 0 for scalars.
        bad_rows: data set rows that are NaN, infinite or null; blank_rows: that are blank.
    """

    name: str
    kind: str
    role: str
    rows: int
    nulls: int = 0
    nonfinite: int = 0
    blank: int = 0
    constant: bool = False
    low: float = math.nan
    high: float = math.nan
    mean: float = math.nan
    deviation: float = math.nan
    shortest: int = 0
    longest: int = 0
    mean_length: float = 0.0
    bad_rows: tuple[int, ...] = ()
    blank_rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Columns(Measurement):
    """Every column of one split; `note` says how much was read, where not all was.

    `training` tells the training set, where a constant column is a fault, from a small
    evaluation set, where it may be chance.
    """

    columns: tuple[ColumnNumbers, ...]
    rows: int
    note: str = ""
    training: bool = True


@dataclass
class _Tally:
    """Numbers of one column that add up over chunks."""

    kind: str = "other"
    rows: int = 0
    nulls: int = 0
    nonfinite: int = 0
    blank: int = 0
    values: int = 0
    total: float = 0.0
    squares: float = 0.0
    shift: float = math.nan
    low: float = math.inf
    high: float = -math.inf
    shortest: int = 2**62
    longest: int = 0
    length: int = 0
    hashes: set[int] = field(default_factory=set)
    bad: list[int] = field(default_factory=list)
    blanks: list[int] = field(default_factory=list)

    def add(self, array: pa.Array, rows: npt.NDArray[np.int64]) -> None:
        """Take in one chunk; `rows` are its data set row numbers."""
        array, kind = flat_array(array), array.type
        self.rows += len(array)
        self.nulls += array.null_count
        valid = np.asarray(array.is_valid())
        self._note(self.bad, rows, ~valid)
        if len(self.hashes) < 2:
            self.hashes.update(np.unique(array_hashes(array))[:2].tolist())
        if is_number(kind):
            self.kind = "number"
            flat = numbers(array).astype(np.float64)
            broken = valid & ~np.isfinite(flat)
            self._numbers(flat[valid & ~broken])
            self._broken(rows, broken)
        elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
            self.kind = "text"
            self._lengths(np.asarray(pc.utf8_length(array).fill_null(0)), valid)
            bare = np.asarray(pc.equal(pc.utf8_trim_whitespace(array), "").fill_null(False))
            self._blank(rows, bare)
        elif is_list(kind):
            self._lists(array, rows, valid)
        elif pa.types.is_struct(kind):
            self._struct(array, rows, valid)

    def _lists(self, array: pa.Array, rows: npt.NDArray[np.int64], valid: Any) -> None:
        values, offsets = list_parts(array)
        lengths = np.diff(offsets)
        self._lengths(lengths, valid)
        self._blank(rows, valid & (lengths == 0))
        values = flat_array(values)
        if is_number(values.type):
            self.kind = "numbers"
            flat = numbers(values).astype(np.float64)
            finite = np.isfinite(flat) & np.asarray(values.is_valid())
            self._numbers(flat[finite])
            if not finite.all():
                owner = np.repeat(np.arange(len(array)), lengths)
                broken = np.zeros(len(array), dtype=bool)
                broken[owner[~finite]] = True
                self._broken(rows, broken)

    def _struct(self, array: pa.Array, rows: npt.NDArray[np.int64], valid: Any) -> None:
        names = {array.type.field(i).name for i in range(array.type.num_fields)}
        self.kind = "image" if names == {"bytes", "path"} or "digest" in names else "other"
        if "digest" in names:  # a large array, as its hash and moments
            parts = {
                key: numbers(array.field(key)) for key in ("low", "high", "mean", "std", "size")
            }
            broken = valid & ~np.isfinite(parts["mean"])
            self._broken(rows, broken)
            good = valid & ~broken
            self._numbers(parts["mean"][good])
            if good.any():
                self.low = min(self.low, float(parts["low"][good].min()))
                self.high = max(self.high, float(parts["high"][good].max()))
            self._blank(rows, good & (parts["std"] == 0))
            self._lengths(parts["size"], valid)

    def _numbers(self, flat: npt.NDArray[np.float64]) -> None:
        if not len(flat):
            return
        if math.isnan(self.shift):  # moments about a value of the column: no cancellation
            self.shift = float(flat[0])
        moved = flat - self.shift
        self.values += len(flat)
        self.total += float(moved.sum())
        self.squares += float((moved**2).sum())
        self.low = min(self.low, float(flat.min()))
        self.high = max(self.high, float(flat.max()))

    def _lengths(self, lengths: npt.NDArray[Any], valid: Any) -> None:
        lengths = lengths[valid]
        if len(lengths):
            self.shortest = min(self.shortest, int(lengths.min()))
            self.longest = max(self.longest, int(lengths.max()))
            self.length += int(lengths.sum())

    def _broken(self, rows: npt.NDArray[np.int64], flags: Any) -> None:
        self.nonfinite += int(flags.sum())
        self._note(self.bad, rows, flags)

    def _blank(self, rows: npt.NDArray[np.int64], flags: Any) -> None:
        self.blank += int(flags.sum())
        self._note(self.blanks, rows, flags)

    @staticmethod
    def _note(noted: list[int], rows: npt.NDArray[np.int64], flags: Any) -> None:
        if len(noted) < EXAMPLES:
            noted += rows[flags][: EXAMPLES - len(noted)].tolist()

    def finish(self, name: str, role: str) -> ColumnNumbers:
        """The column's numbers, all chunks seen."""
        there = self.values > 0
        mean = self.total / self.values if there else math.nan
        spread = max(self.squares / self.values - mean**2, 0.0) if there else math.nan
        present = self.rows - self.nulls
        return ColumnNumbers(
            name=name,
            kind=self.kind,
            role=role,
            rows=self.rows,
            nulls=self.nulls,
            nonfinite=self.nonfinite,
            blank=self.blank,
            constant=self.rows > 1 and len(self.hashes) == 1,
            low=self.low if there else math.nan,
            high=self.high if there else math.nan,
            mean=self.shift + mean,
            deviation=math.sqrt(spread) if there else math.nan,
            shortest=self.shortest if self.longest else 0,
            longest=self.longest,
            mean_length=self.length / present if present else 0.0,
            bad_rows=tuple(self.bad),
            blank_rows=tuple(self.blanks),
        )


def measure_columns(source: Source, inputs: tuple[str, ...], label: str | None) -> Columns:
    """The numbers of every column of `source`, in one pass."""
    tallies = {name: _Tally() for name in source.columns}
    start = 0
    for chunk in source.chunks():
        rows = source.rows[start : start + chunk.num_rows]
        for name, tally in tallies.items():
            tally.add(flat_array(chunk.column(name)), rows)
        start += chunk.num_rows
    roles = {**{name: "input" for name in inputs}, **({label: "label"} if label else {})}
    return Columns(
        tuple(tally.finish(name, roles.get(name, "")) for name, tally in tallies.items()),
        rows=len(source),
        note=source.note,
        training=source.name == "train",
    )


def take_columns(subject: Subject) -> Iterator[Located | Table]:
    """Measure every split's columns, with the table that the report shows."""
    reasons = []
    for split in splits_of(subject):
        try:
            source = source_of(subject, split)
            roles = roles_of(subject, source)
            measured = measure_columns(source, roles.inputs, roles.label)
            yield Located(measured, split)
            yield column_table(measured, split)
        except Skip as reason:
            reasons.append(str(reason))
    if len(reasons) == len(splits_of(subject)):
        raise Skip("; ".join(reasons) or "there is no data set")


def column_table(measured: Columns, split: str) -> Table:
    """The columns as a table for the report."""

    def shown(value: float) -> float | None:
        return float(f"{value:.4g}") if math.isfinite(value) else None

    head = ("column", "type", "role", "rows", "missing", "blank", "low", "high", "mean",
            "deviation", "shortest", "longest", "mean length")  # fmt: skip
    rows = tuple(
        (c.name, c.kind, c.role, c.rows, c.nulls + c.nonfinite, c.blank, shown(c.low),
         shown(c.high), shown(c.mean), shown(c.deviation), c.shortest, c.longest,
         shown(c.mean_length))
        for c in measured.columns
    )  # fmt: skip
    return Table(f"Columns of {split}", "data", head, rows, caption=measured.note)


# ---------------------------------------------------------------- verdicts


def missing_value(seen: Columns) -> Iterator[Fault]:
    """NaN or infinity (error), null (warning) in what the model gets."""
    for column in seen.columns:
        if not column.role or not (column.nonfinite or column.nulls):
            continue
        what = [
            f"{count:,} {name}"
            for count, name in ((column.nonfinite, "NaN or infinite"), (column.nulls, "null"))
            if count
        ]
        yield Fault(
            message=f"{column.role} {column.name}: {' and '.join(what)} in {column.rows:,} rows"
            + (f", first in row {column.bad_rows[0]}" if column.bad_rows else ""),
            subject=column.name,
            severity="error" if column.nonfinite else "warning",
            evidence={
                "seen": f"{column.nonfinite + column.nulls:,} rows",
                "expected": "none",
                "nonfinite": column.nonfinite,
                "null": column.nulls,
            },
            examples=column.bad_rows,
        )


def blank_example(seen: Columns) -> Iterator[Fault]:
    """Inputs with nothing in them."""
    for column in seen.columns:
        if column.role == "input" and column.blank:
            share = column.blank / column.rows
            yield Fault(
                message=f"{column.blank:,} of {column.rows:,} rows ({share:.1%}) of {column.name} "
                "are blank",
                subject=column.name,
                evidence={"seen": f"{column.blank:,} blank rows", "expected": "none"},
                examples=column.blank_rows,
            )


def constant_input(
    seen: Columns,
    *,
    rows: Annotated[int, "rows from which sameness is no chance; judged"] = 16,
) -> Iterator[Fault]:
    """A feature, or every input, that is the same in all rows."""
    inputs = [column for column in seen.columns if column.role == "input"]
    if seen.rows < rows or not inputs:
        return
    same = [column for column in inputs if column.constant]
    if len(same) == len(inputs):
        yield Fault(
            message=f"all {seen.rows:,} rows have the same {', '.join(c.name for c in same)}",
            evidence={"seen": "1 different input", "expected": f"up to {seen.rows:,}"},
        )
        return
    still = [column.name for column in same if column.kind == "number"] if seen.training else []
    if still:
        named = ", ".join(still[:5]) + (", ..." if len(still) > 5 else "")
        yield Fault(
            message=f"{len(still)} of {len(inputs)} input columns are the same in all "
            f"{seen.rows:,} rows: {named}",
            subject=named,
            evidence={"seen": f"{len(still)} constant columns", "expected": "none"},
        )


COLUMNS = Probe("measure columns", "dataset", (Columns,), take_columns)

MISSING_VALUE = Check(
    name="missing-value",
    stage="data",
    severity="error",
    moments=("dataset",),
    why="One NaN in a batch makes the whole gradient NaN; the Trainer's log hides it.",
    fix="dataset = dataset.filter(lambda row: row[column] is not None and isfinite(row[column]))",
    source="Karpathy 2019; Zhang et al. 2020, TheDeepChecker 2022",
    judges=(missing_value,),
    unsure="Models that take NaN as 'not observed' (time series).",
    explains=("loss-not-finite",),
)

BLANK_EXAMPLE = Check(
    name="blank-example",
    stage="data",
    severity="warning",
    moments=("dataset",),
    why="A blank input teaches the prior alone, and often stands for a failed download or parse.",
    fix="dataset = dataset.filter(lambda row: row['text'].strip())",
    source="Karpathy 2019",
    judges=(blank_example,),
    unsure="Optional fields that are lawfully empty.",
)

CONSTANT_INPUT = Check(
    name="constant-input",
    stage="data",
    severity="warning",
    moments=("dataset",),
    why="What never varies carries nothing; if every input is the same, the loader is broken.",
    fix="dataset = dataset.remove_columns(column); read two rows and compare them",
    source="Karpathy 2019",
    judges=(constant_input,),
    unsure="A prompt column that is the same on purpose.",
)
