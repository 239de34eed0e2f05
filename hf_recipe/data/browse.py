"""The rows themselves: a table to sort, filter and page through, and the same of all rows on disk.

Up to 2,000 rows stand on the page, with what is known of each: its label, its length or picture,
the checks that named it, its place among the suspects. Rows that were named come first, evenly
spaced ones fill up. `write_rows` puts the facts of every row into a parquet file.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hf_recipe.core.check import Skip
from hf_recipe.core.exhibit import Cell, Exhibit, Picture, Table
from hf_recipe.core.report import Report
from hf_recipe.data.hashing import flat_array, is_list, is_number
from hf_recipe.data.label_probe import opened
from hf_recipe.data.sample import gather
from hf_recipe.data.source import Roles, Source, roles_of, source_of, splits_of
from hf_recipe.instruments.interview import png
from hf_recipe.instruments.subject import Subject

TITLE = "Rows, to be sorted and filtered"
MOST = 2_000  # rows on the page
MOST_DRAWN = 480  # where each has a picture
GALLERY = 60
SHOWN = 8  # columns of content
LONGEST = 160  # characters of a cell
SHORT = 16  # length up to which a cell shows its own length
SIDE = 64  # pixels of a picture

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Named:
    """What the checks said of single rows of one split.

    Attributes:
        checks: by row number, the checks that named it.
        suspects: by row number, its place among suspect labels, from 1 on; empty where no check
            claims that there are any.
    """

    checks: Mapping[int, list[str]] = field(default_factory=dict)
    suspects: Mapping[int, int] = field(default_factory=dict)

    def told(self, rows: Iterable[int]) -> tuple[list[str], list[int | None]]:
        """Both for some rows, as columns."""
        listed = list(rows)
        return [", ".join(self.checks.get(r, ())) for r in listed], [
            self.suspects.get(r) for r in listed
        ]


def named_rows(report: Report, split: str) -> Named:
    """The rows of `split` that findings and measurements of `report` name."""
    checks: dict[int, list[str]] = {}
    for finding in report.flat:
        if finding.split in (split, None):
            for row in finding.examples:
                known = checks.setdefault(int(row), [])
                if finding.check not in known:
                    known.append(finding.check)
    suspects: dict[int, int] = {}
    claimed = any(finding.check == "suspect-label" for finding in report.flat)
    for stored in report.measurements if claimed else ():
        if stored.kind == "LabelSuspects" and stored.split in (split, None):
            suspects |= {int(row): i for i, row in enumerate(stored.values["worst"], start=1)}
    return Named(checks, suspects)


def rows_exhibits(subject: Subject, report: Report) -> Iterator[Exhibit]:
    """Pictures of the first split that has any, and the table of rows."""
    splits, parts, total = splits_of(subject), [], 0
    for split in splits:
        try:
            source = source_of(subject, split)
        except Skip:
            continue
        named, roles = named_rows(report, split), roles_of(subject, source)
        parts.append(part_of(source, roles, named, len(splits)))
        total += len(source)
    pictured = next((part for part in parts if any(part.pngs)), None)
    if pictured is not None:
        yield gallery(pictured)
    if not parts:
        return
    columns = list(dict.fromkeys(name for part in parts for name in part.columns))
    cells = [
        row
        for part in parts
        for row in zip(*(part.columns.get(c, [None] * len(part)) for c in columns), strict=True)
    ]
    caption = f"{len(cells):,} of {total:,} rows: those that checks name first, then evenly spaced"
    yield Table(
        TITLE, "data", tuple(columns), tuple(cells), caption, private=True, browse=True,
        pngs=tuple(png for part in parts for png in part.pngs) if pictured is not None else (),
    )  # fmt: skip


def chosen(source: Source, named: Named, most: int) -> Integers:
    """Places of the rows to show: named ones, suspects (half of the room), then evenly spaced."""
    listed = [*sorted(named.checks), *named.suspects]
    wanted = np.array(list(dict.fromkeys(listed))[: most // 2], dtype=np.int64)
    places = np.searchsorted(source.rows, wanted)
    inside = places < len(source)
    places = places[inside][source.rows[places[inside]] == wanted[inside]]
    free = np.ones(len(source), dtype=bool)
    free[places] = False
    others = np.flatnonzero(free)
    count = min(most - len(places), len(others))
    even = np.linspace(0, max(len(others) - 1, 0), count).astype(np.int64)
    return np.concatenate([places, others[even]]).astype(np.int64)


@dataclass(frozen=True)
class Part:
    """The rows of one split that are shown.

    Attributes:
        split: its name.
        columns: their cells.
        pngs: a picture of each, or "".
        label: the column that holds the label, or "".
    """

    split: str
    columns: Mapping[str, list[Cell]]
    pngs: tuple[str, ...]
    label: str

    def __len__(self) -> int:
        return len(self.pngs)


def part_of(source: Source, roles: Roles, named: Named, splits: int) -> Part:
    """The rows to show of one of `splits` splits."""
    label = roles.label if roles.label in source.columns else None
    rest = [c for c in source.columns if c not in (*roles.inputs, label)]
    names = [*([label] if label else []), *roles.inputs[:SHOWN], *rest[:2]]
    drawn = next((n for n in names if type(source.features.get(n)).__name__ == "Image"), None)
    places = chosen(source, named, (MOST_DRAWN if drawn else MOST) // splits)
    table, rows = gather(source, places, names), source.rows[places].tolist()
    checks, suspects = named.told(rows)
    columns: dict[str, list[Cell]] = {"split": [source.name] * len(rows), "row": rows}
    columns |= {"named by": list(checks)} if any(checks) else {}
    columns |= {"suspect": list(suspects)} if any(suspects) else {}
    for name in names:
        columns |= content(name, flat_array(table.column(name)), source.features.get(name))
    pngs = [""] * len(rows)
    if drawn is not None and pa.types.is_struct(table.schema.field(drawn).type):
        pngs = [_drawn(cell.as_py()) for cell in flat_array(table.column(drawn))]
    return Part(source.name, columns, tuple(pngs), label or "")


def gallery(part: Part) -> Picture:
    """Pictures side by side, as many of each class."""
    labels = [str(v) for v in part.columns.get(part.label, [""] * len(part))]
    seen: Counter[str] = Counter()
    turns = []
    for place in np.flatnonzero([bool(drawn) for drawn in part.pngs]).tolist():
        turns.append((seen[labels[place]], labels[place], place))  # the first of each, the second
        seen[labels[place]] += 1
    shown = sorted((label, place) for _, label, place in sorted(turns)[:GALLERY])
    return Picture(
        f"Pictures of {part.split}, as they are stored", "data",
        tuple(part.pngs[place] for _, place in shown), tuple(label for label, _ in shown),
    )  # fmt: skip


# ---------------------------------------------------------------- cells


def facts(name: str, array: pa.Array) -> dict[str, pa.Array]:
    """Numbers about each cell of a column: itself, its length, its size."""
    kind = array.type
    if is_number(kind):
        return {name: array}
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return {f"{name}: characters": pc.utf8_length(array)}
    if is_list(kind):
        return {f"{name}: elements": pc.list_value_length(array)}
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return {f"{name}: bytes": pc.binary_length(array.field("bytes"))}
    return {}


def content(name: str, array: pa.Array, feature: Any = None) -> dict[str, list[Cell]]:
    """A column as a reader sees it, beside the numbers about each cell."""
    names = getattr(feature, "names", None)
    found: dict[str, list[Cell]] = {}
    if names:
        found[name] = [
            names[v] if v is not None and 0 <= v < len(names) else _short(v)
            for v in array.to_pylist()
        ]
        return found
    if not is_number(array.type) and not pa.types.is_struct(array.type):
        found[name] = [_short(cell.as_py()) for cell in array]
    for fact, values in facts(name, array).items():
        if fact != name and (pc.max(values).as_py() or 0) <= SHORT:
            continue
        found[fact] = [_number(value) for value in values.to_pylist()]
    return found


def _short(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, list) and len(value) > SHOWN:
        value = [*value[:SHOWN], "..."]
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."


def _number(value: Any) -> Cell:
    if isinstance(value, float):  # what is no number is a word, which a filter finds
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    found: Cell = value
    return found


def _drawn(cell: Mapping[str, Any] | None) -> str:
    """A stored image as a small PNG in base64; "" where it cannot be read."""
    picture = opened(cell)
    if picture is None:
        return ""
    picture.thumbnail((SIDE, SIDE))
    return png(picture)


# ---------------------------------------------------------------- all rows


def write_rows(subject: Subject, report: Report, path: str | os.PathLike[str]) -> None:
    """The facts of every row that was read, as parquet: a chunk at a time."""
    import pyarrow.parquet as pq

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    partial = Path(f"{os.fspath(path)}.partial")
    schema = None
    for split in splits_of(subject):
        try:
            source = source_of(subject, split)
        except Skip:
            continue
        roles, named, start = roles_of(subject, source), named_rows(report, split), 0
        for chunk in source.chunks():
            rows = source.rows[start : start + chunk.num_rows]
            start += chunk.num_rows
            table = _facts_of_chunk(source, roles, named, chunk, rows)
            if schema is None:
                schema, writer = table.schema, pq.ParquetWriter(partial, table.schema)
            writer.write_table(_as(table, schema))
    if schema is not None:
        writer.close()
        os.replace(partial, path)


def _facts_of_chunk(
    source: Source, roles: Roles, named: Named, chunk: pa.Table, rows: Integers
) -> pa.Table:
    checks, suspects = named.told(rows.tolist())
    columns: dict[str, pa.Array] = {
        "split": pa.array([source.name] * len(rows), pa.string()),
        "row": pa.array(rows),
        "named by": pa.array(checks, pa.string()),
        "suspect": pa.array(suspects, pa.int64()),
    }
    for name in chunk.column_names:
        array = flat_array(chunk.column(name))
        if name == roles.label:
            columns |= content_column(name, array, source.features.get(name))
        for fact, values in facts(name, array).items():
            if fact not in columns:
                columns[fact] = values.cast(pa.float64())
    return pa.table(columns)


def content_column(name: str, array: pa.Array, feature: Any) -> dict[str, pa.Array]:
    """A label's column: names where it declares them, numbers and texts as they stand."""
    if getattr(feature, "names", None):
        return {name: pa.array(content(name, array, feature)[name], pa.string())}
    return {} if pa.types.is_nested(array.type) or is_number(array.type) else {
        name: array.cast(pa.string())
    }  # fmt: skip


def _as(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """`table` with the columns of `schema`, missing ones null."""
    columns = [
        table.column(f.name).cast(f.type)
        if f.name in table.column_names
        else pa.nulls(table.num_rows, f.type)
        for f in schema
    ]
    return pa.table(columns, schema=schema)
