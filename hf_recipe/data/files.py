"""Files as data sets, read into memory: csv, tsv, json, jsonl, parquet, folders of images.

A file that would be misread is refused, with the place and the reason: an encoding that is not
UTF-8, a quote that never closes, two columns of one name, rows of different kinds. Nothing is
written to a cache folder.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa

READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
DELIMITERS = ";\t|"  # tried where the first line holds no comma
UTF_8, UTF_16 = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")  # marks at a file's start


def load_path(path: Path) -> dict[str, Any]:
    """Read a file, or a folder of images or of one file per split.

    Raises:
        ValueError: there is no such file, or it cannot be read; with the reason.
    """
    import datasets

    if not path.exists():
        near = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else [], n=1
        )
        raise ValueError(f"no such file or folder: {path}" + (f"; {near[0]}?" if near else ""))
    if path.is_file():
        files = {"train": path}
    else:
        files = {p.stem: p for p in sorted(path.iterdir()) if p.suffix.lower() in READERS}
    kinds = {READERS.get(p.suffix.lower()) for p in files.values()}
    if path.is_file() and None in kinds:
        raise ValueError(f"cannot read {path.name}; known: {', '.join(READERS)}, image folders")
    try:
        if not files:
            return dict(datasets.load_dataset("imagefolder", data_dir=str(path)))
        return {name: as_dataset(read_table(file)) for name, file in files.items()}
    except (datasets.exceptions.DatasetsError, pa.ArrowException, ValueError, OSError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"cannot read {path}: {cause}") from error


def as_dataset(table: pa.Table) -> Any:
    """A table as a `datasets.Dataset`.

    Raises:
        ValueError: two columns have one name.
    """
    import datasets

    twice = [name for name, count in Counter(table.column_names).items() if count > 1]
    if twice:
        raise ValueError(f"{len(twice)} column names occur more than once: {', '.join(twice[:5])}")
    return datasets.Dataset(table)


def read_table(path: Path) -> pa.Table:
    """One file as a table."""
    import pyarrow.parquet

    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return pyarrow.parquet.read_table(path)
    with path.open("rb") as file:
        start = file.read(4)
    if start[:2] in UTF_16:
        raise ValueError("it is written in UTF-16; save it as UTF-8")
    return _read_json(path) if suffix in (".json", ".jsonl") else _read_csv(path, suffix)


# ---------------------------------------------------------------- csv


def _read_csv(path: Path, suffix: str) -> pa.Table:
    import pyarrow.csv

    options = pyarrow.csv.ParseOptions(
        delimiter="\t" if suffix == ".tsv" else _delimiter(path), newlines_in_values=True
    )
    table = pyarrow.csv.read_csv(path, parse_options=options)
    for column in table.schema:
        if pa.types.is_binary(column.type):
            raise ValueError(f"column {column.name} is not UTF-8; save the file as UTF-8")
    _require_closed_quotes(path, table)
    return _without_blanks(table)


def _without_blanks(table: pa.Table) -> pa.Table:
    """Where the header is written "a, b": names and texts without the blanks after the comma."""
    import pyarrow.compute as pc

    names = [name.strip() for name in table.column_names]
    if names == table.column_names:
        return table
    columns = [
        pc.utf8_trim_whitespace(c) if pa.types.is_string(c.type) else c for c in table.columns
    ]
    return pa.table(columns, names=names)


def _delimiter(path: Path) -> str:
    """The comma, unless the first line holds none and one of the other usual signs."""
    with path.open("rb") as file:
        head = file.readline(1 << 16).decode("utf-8", "replace")
    others = {sign: head.count(sign) for sign in DELIMITERS}
    best = max(others, key=lambda sign: others[sign])
    return best if "," not in head and others[best] else ","


def _require_closed_quotes(path: Path, table: pa.Table) -> None:
    """Raise ValueError where a quote that never closes has swallowed the rest of the file."""
    texts = [c for c in table.columns if pa.types.is_string(c.type) and len(c)]
    if not any("\n" in (c[-1].as_py() or "") for c in texts):
        return
    with path.open("rb") as file:
        quotes = sum(part.count(b'"') for part in iter(lambda: file.read(1 << 20), b""))
    if quotes % 2:
        raise ValueError(f"row {table.num_rows - 1} opens a quote that never closes")


# ---------------------------------------------------------------- json


def _read_json(path: Path) -> pa.Table:
    """Lines of objects, a list of objects, or one object that holds such a list."""
    import pyarrow.json

    with path.open("rb") as file:
        marked = file.read(3) == UTF_8
        file.seek(3 if marked else 0)
        begins = next((line.strip()[:1] for line in file if line.strip()), b"")
    if begins == b"{":
        try:
            table = pyarrow.json.read_json(
                pa.BufferReader(path.read_bytes()[3:]) if marked else path
            )
        except pa.ArrowInvalid:  # an object over several lines is no row
            if _object_of(path) is None:
                raise
        else:
            if table.num_rows > 1:
                return table
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    return _table_of_list(_rows_in(content))


def _object_of(path: Path) -> dict[str, Any] | None:
    """The file as one JSON object; None where it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _rows_in(content: Any) -> list[dict[str, Any]]:
    """The rows that a JSON file holds.

    Raises:
        ValueError: none that could be told apart from the rest.
    """
    if isinstance(content, dict):
        lists = {name: value for name, value in content.items() if _is_rows(value)}
        if len(lists) > 1:
            raise ValueError(f"it holds several lists of rows: {', '.join(lists)}; keep one")
        content = next(iter(lists.values())) if lists else [content]
    if not _is_rows(content):
        raise ValueError("it holds no list of objects, one for each row")
    rows: list[dict[str, Any]] = content
    return rows


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) for row in value)


def _table_of_list(rows: list[dict[str, Any]]) -> pa.Table:
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
            first = next(v for v in values if v is not None)
            other = next(
                (i for i, v in enumerate(values) if v is not None and type(v) is not type(first)), 0
            )
            raise ValueError(
                f"column {name} holds {type(first).__name__} and "
                f"{type(values[other]).__name__}, first in row {other}"
            ) from None
    return pa.table(columns)
