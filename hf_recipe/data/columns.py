"""What stands in each column: ranges, spread, lengths, what is missing, blank or constant.

Become one with the data: one pass over Arrow, a chunk at a time, gives every column's numbers.
The checks judge only the columns that the model gets.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any

import numpy as np

from hf_recipe.core.check import Check, Located, Probe, Skip
from hf_recipe.core.exhibit import Exhibit
from hf_recipe.core.finding import Fault
from hf_recipe.data.associations import association_exhibits
from hf_recipe.data.audio import is_audio
from hf_recipe.data.blank import nothing_inside
from hf_recipe.data.column_exhibits import column_tables, distributions, split_exhibits
from hf_recipe.data.column_numbers import ColumnNumbers, Columns, column_numbers
from hf_recipe.data.hashing import flat_array
from hf_recipe.data.sample import vectors_of
from hf_recipe.data.source import Source, roles_of, source_of, splits_of
from hf_recipe.data.summaries import Summary
from hf_recipe.data.unreadable import unreadable_files
from hf_recipe.data.written import written_missing
from hf_recipe.instruments.distributed import from_all_ranks, rank, world_size
from hf_recipe.instruments.subject import Subject

BACKGROUND = 0.01  # share of the other elements' cells from which a number is the background
TOKENS = ("_ids", "_mask")  # names of columns that run along tokens end so


def summarise(source: Source) -> dict[str, Summary]:
    """A summary of every column of `source`, in one pass."""
    found = {name: Summary() for name in source.columns}
    start = 0
    for chunk in source.chunks():
        rows = source.rows[start : start + chunk.num_rows]
        for name, summary in found.items():
            summary.add(flat_array(chunk.column(name)), rows)
        start += chunk.num_rows
    return found


def measure_columns(source: Source, inputs: tuple[str, ...], label: str | None) -> Columns:
    """The numbers of every column of `source`, in one pass."""
    return columns_of(source, summarise(source), inputs, label)


def columns_of(
    source: Source,
    summaries: Mapping[str, Summary],
    inputs: tuple[str, ...],
    label: str | None,
    *,
    raw: bool = False,
) -> Columns:
    """The measurement that `summaries` of the columns of `source` come to."""
    roles = {**{name: "input" for name in inputs}, **({label: "label"} if label else {})}
    for name, summary in summaries.items():
        if is_audio(source, name):
            summary.kind = "audio"
    found = (column_numbers(s, name, roles.get(name, "")) for name, s in summaries.items())
    return Columns(
        tuple(replace(c, **_still(source, summaries[c.name], c.name)) for c in found),
        rows=len(source),
        note=source.note,
        training=source.name == "train",
        raw=raw,
    )


def _still(source: Source, summary: Summary, name: str) -> dict[str, Any]:
    """Places of a vector that never vary, unlike a border pixel or an unused category.

    Those hold the background's number, which stands in the other places too. A place among
    tokens is no feature: every sequence begins with the same token, and templates repeat.
    """
    places = summary.still
    if summary.kind != "numbers" or summary.element_low is None:
        return {}
    width = len(summary.element_low)
    if not 0 < len(places) < width or source.varies or name.endswith(TOKENS):
        return {"elements": width}
    grid = vectors_of(next(source.chunks([name])).column(name), width)
    others = np.delete(grid, places, axis=1)
    rare = [int(p) for p in places if (others == summary.element_low[p]).mean() < BACKGROUND]
    return {"elements": width, "still": tuple(rare)}


def take_columns(subject: Subject) -> Iterator[Located | Exhibit]:
    """Measure every split's columns, with the tables and curves that the report shows."""
    reasons = []
    seen: dict[str, dict[str, Summary]] = {}
    roles = None
    for split in splits_of(subject):
        try:
            source = source_of(subject, split)
            roles = roles_of(subject, source)
            seen[split] = summaries_of(subject, split)
            raw = bool(subject.cache.get("raw"))
            measured = columns_of(source, seen[split], roles.inputs, roles.label, raw=raw)
            yield Located(measured, split)
            yield from column_tables(measured, split)
            yield from split_exhibits(source, seen[split], roles)
            if raw and split == "train":
                yield from association_exhibits(source, roles)
        except Skip as reason:
            reasons.append(str(reason))
    if not seen or roles is None:
        raise Skip("; ".join(dict.fromkeys(reasons)) or "there is no data set")
    yield from distributions(seen, roles)


def share_summaries(subject: Subject) -> None:
    """Every process summarises its part of the rows; all get the whole.

    A collective: all ranks call it, with the same data sets. Streams are read by each of them.
    """
    for split in splits_of(subject):
        try:
            source = source_of(subject, split)
        except Skip:
            continue
        if source.total is None:
            continue
        parts = from_all_ranks(summarise(source.part(rank(), world_size())))
        whole = {name: functools.reduce(Summary.merge, (part[name] for part in parts))
                 for name in source.columns}  # fmt: skip
        subject.cache[f"summaries:{split}"] = whole


def summaries_of(subject: Subject, split: str) -> dict[str, Summary]:
    """The summaries of a split's columns, made once per subject."""
    key = f"summaries:{split}"
    if key not in subject.cache:
        subject.cache[key] = summarise(source_of(subject, split))
    found: dict[str, Summary] = subject.cache[key]
    return found


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
            fix=f"dataset = dataset.filter(lambda row: {_there(column)})",
            evidence={
                "seen": f"{column.nonfinite + column.nulls:,} rows",
                "expected": "none",
                "nonfinite": column.nonfinite,
                "null": column.nulls,
            },
            examples=column.bad_rows,
        )


def _there(column: ColumnNumbers) -> str:
    """The test that a row of this column passes if nothing is missing, as code."""
    cell = f"row[{column.name!r}]"
    if not column.nonfinite:
        return f"{cell} is not None"
    finite = f"np.isfinite({cell}).all()" if column.kind == "numbers" else f"math.isfinite({cell})"
    return f"{cell} is not None and {finite}" if column.nulls else finite


def _something(column: ColumnNumbers) -> str:
    """The test that a row of this column passes unless it is blank, as code."""
    cell = f"row[{column.name!r}]"
    return {"text": f"{cell}.strip()", "image": f"np.ptp({cell}) > 0"}.get(
        column.kind, f"len({cell}) > 0"
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
                fix=f"dataset = dataset.filter(lambda row: {_something(column)})",
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
            fix="assert str(dataset[0]) != str(dataset[1])  # does __getitem__ use its index?",
            evidence={"seen": "1 different input", "expected": f"up to {seen.rows:,}"},
        )
        return
    for column in inputs if seen.training else []:
        if column.still:
            shown = ", ".join(map(str, column.still[:5])) + (", ..." if column.still[5:] else "")
            yield Fault(
                message=f"{len(column.still)} of {column.elements} elements of {column.name} are "
                f"the same in all {seen.rows:,} rows: {shown}",
                subject=f"elements of {column.name}",
                severity="note",
                evidence={"seen": f"{len(column.still)} constant elements", "expected": "none"},
            )
    still = [column.name for column in same if column.kind == "number"] if seen.training else []
    if still:
        named = ", ".join(still[:5]) + (", ..." if len(still) > 5 else "")
        yield Fault(
            message=f"{len(still)} of {len(inputs)} input columns are the same in all "
            f"{seen.rows:,} rows: {named}",
            subject=named,
            fix=f"dataset = dataset.remove_columns({still[:5]})",
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
    judges=(missing_value, written_missing, unreadable_files),
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
    judges=(blank_example, nothing_inside),
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
