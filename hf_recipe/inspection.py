"""`inspect_dataset`: know the data before any model is there.

Runs every data and batch check of the catalogue on a data set by itself: a `datasets.Dataset`, a
dict of them, a stream, a torch data set, or a path to csv, json, parquet or a folder of images.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import nn

from hf_recipe.catalogue import CHECKS, PROBES
from hf_recipe.core.check import Skip
from hf_recipe.core.config import Settings
from hf_recipe.core.exhibit import Answer
from hf_recipe.core.report import Report
from hf_recipe.data.browse import rows_exhibits, write_rows
from hf_recipe.data.columns import share_summaries
from hf_recipe.data.files import load_path
from hf_recipe.data.hashing import is_list, is_number
from hf_recipe.data.preview import preview
from hf_recipe.data.remembered import remembering
from hf_recipe.data.source import (
    LABELS,
    Roles,
    Source,
    input_columns,
    read_source,
    read_stream,
)
from hf_recipe.examiner import Examiner
from hf_recipe.instruments.batches import Rows, has_rows
from hf_recipe.instruments.distributed import from_rank_0, rank, world_size
from hf_recipe.instruments.quiet import quiet
from hf_recipe.instruments.subject import Subject

INSPECTED_ROWS = 1_000_000
LABEL_NAMES = (*LABELS, "target", "targets", "class", "y", "score", "rating")


def inspect_dataset(
    dataset: Any,
    *,
    label: str | None = None,
    text: str | Sequence[str] | None = None,
    image: str | None = None,
    processing_class: Any = None,
    model: Any = None,
    ignore: Sequence[str] = (),
    thresholds: Mapping[str, Mapping[str, Any]] | None = None,
    together: bool = False,
    rows_path: str | Path | None = None,
) -> Report:
    """Look at a data set and say what stands in it, what is wrong, what could not be checked.

    Args:
        dataset: a `datasets.Dataset`, `DatasetDict`, dict of data sets, stream, map-style torch
            data set, or a path to csv, tsv, json, jsonl, parquet or a folder of images.
        label: the label's column; guessed where it is not given, and the report says so.
        text, image: the input's columns; otherwise all columns but label and row numbers.
        processing_class: tokenizes `text` (a tokenizer), so that batches can be looked at too.
        model: what the labels and token ids are to fit.
        ignore: checks not to run.
        thresholds: keyword arguments of judging functions, by check.
        together: all processes of a launch call this with the same data; each reads its part of
            the rows for the columns' numbers, the first one asks the rest, all get its report.
        rows_path: where to write the facts of every row that was read, as parquet.

    Raises:
        ValueError: a column that is not there (with the nearest name), a split without rows, a
            file that cannot be read.
        TypeError: not a data set.
    """
    splits = load_splits(dataset)
    settings = Settings.resolve(
        {"select": ("data",), "ignore": ignore, "thresholds": thresholds},
        checks={name: tuple(check.thresholds) for name, check in CHECKS.items()},
    )
    named = [name for name in (label, image) if name]
    named += [text] if isinstance(text, str) else list(text or ())
    sources = {name: read_split(name, data) for name, data in splits.items()}
    for name, source in sources.items():
        if not len(source):
            raise ValueError(f"the {name} split has no rows")
        for column in named:
            require_column(column, source)
    require_same_kinds(sources)
    first = next(iter(sources))
    main = "train" if "train" in sources else first
    roles, guessed = choose_roles(sources[main], label, [c for c in named if c != label])
    subject = subject_of(splits, sources, main, roles, processing_class, model)
    report = Report(title="Data set")
    report.answer(Answer("Which columns are the input and the label?", "data", guessed))
    report.environment["rows"] = {n: s.total or s.note for n, s in sources.items()}
    if together and world_size() > 1:
        share_summaries(subject)
        examiner = Examiner(settings, report, agree=from_rank_0, leads=rank() == 0)
    else:
        examiner = Examiner(settings, report)

    def guard() -> Any:
        return quiet(subject.model)

    for probe in PROBES.values():
        if probe.moment in ("dataset", "batch"):
            examiner.examine(remembering(probe), subject, guard)
    with guard():
        try:
            for exhibit in preview(subject):
                report.exhibit(exhibit)
        except Skip as reason:
            report.environment["preview"] = f"none: {reason}"
    examiner.close()
    report.exhibits[:0] = rows_exhibits(subject, report)  # the rows are looked at first
    if rows_path is not None and (not together or rank() == 0):
        write_rows(subject, report, rows_path)
    report.status = "finished"
    return report


# ---------------------------------------------------------------- what was given


def load_splits(dataset: Any) -> dict[str, Any]:
    """The splits of whatever was given, by name; a single data set is "train"."""
    if isinstance(dataset, (str, Path)):
        return load_path(Path(dataset))
    if isinstance(dataset, Mapping):
        if not dataset:
            raise ValueError("the dict of data sets is empty")
        return {str(name): data for name, data in dataset.items()}
    if has_rows(dataset) or hasattr(dataset, "__iter__"):
        return {"train": dataset}
    raise TypeError(
        "expected a datasets.Dataset, a dict of them, an iterable or map-style data set, or a "
        f"path; got {type(dataset).__name__}"
    )


def read_split(name: str, data: Any) -> Source:
    """One split as a source; a stream is sampled from its front."""
    if has_rows(data):
        return read_source(Rows(data, data, _no_collator, name), limit=INSPECTED_ROWS)
    return read_stream(name, data)


def _no_collator(features: list[Any]) -> Mapping[str, Any]:
    raise Skip("without a processing_class that fits the columns no batch can be made")


def require_column(column: str, source: Source) -> None:
    """Raise ValueError, with the nearest name, unless the split has the column."""
    if column not in source.columns:
        near = difflib.get_close_matches(column, source.columns, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"columns: {', '.join(source.columns)}"
        raise ValueError(f"the {source.name} split has no column {column!r}; {hint}")


def require_same_kinds(sources: Mapping[str, Source]) -> None:
    """Raise ValueError where a column holds texts in one split and numbers in another."""
    known: dict[str, tuple[str, str]] = {}
    for split, source in sources.items():
        for column in source.schema:
            kind = kind_of(column.type)
            first, where = known.setdefault(column.name, (kind, split))
            if kind and first and kind != first:
                raise ValueError(
                    f"column {column.name} holds {first} in {where} and {kind} in {split}"
                )


def kind_of(kind: pa.DataType) -> str:
    """What cells of a type are, in one word; "" where any other kind may stand beside them."""
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    return "numbers" if is_number(kind) else "lists" if is_list(kind) else ""


# ---------------------------------------------------------------- columns and batches


def choose_roles(source: Source, label: str | None, inputs: Sequence[str]) -> tuple[Roles, str]:
    """The label and the inputs, as given or guessed, and a sentence that says which."""
    how = []
    if label is None:
        declared = [c for c, f in source.features.items() if hasattr(f, "names")]
        lower = {c.lower(): c for c in reversed(source.columns)}
        known = [lower[name] for name in LABEL_NAMES if name in lower]
        label = next(iter([*declared, *known]), None)
        how.append(f"label: {label} (guessed)" if label else "no label column found; give label=")
    else:
        how.append(f"label: {label}")
    if not inputs:
        rest = [c for c in source.columns if c != label and c.lower() not in LABELS]
        pictured = [c for c in rest if type(source.features.get(c)).__name__ == "Image"]
        inputs = pictured or input_columns(rest)
        how.append(f"input: {_listed(inputs) or 'none'} (guessed)")
    else:
        how.append(f"input: {_listed(inputs)}")
    unread = [c for c in inputs if c in source.columns and not is_read(source, c)]
    if unread:
        how.append(f"of kinds that few checks read: {_listed(unread)}")
    return Roles(label, tuple(inputs)), "; ".join(how)


def _listed(names: Sequence[str], most: int = 12) -> str:
    more = f", ... ({len(names)} columns)" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def is_read(source: Source, column: str) -> bool:
    """Whether a column holds texts, numbers, lists, images or recordings."""
    kind = source.schema.field(column).type
    if pa.types.is_struct(kind):
        names = {kind.field(i).name for i in range(kind.num_fields)}
        return names == {"bytes", "path"} or "digest" in names
    return bool(kind_of(kind)) or pa.types.is_dictionary(kind) or pa.types.is_null(kind)


def subject_of(
    splits: Mapping[str, Any],
    sources: Mapping[str, Source],
    main: str,
    roles: Roles,
    processing_class: Any,
    model: Any,
) -> Subject:
    """A subject without a Trainer: data alone, with a model where one was given."""
    collate = collator(processing_class, roles, sources[main])
    rows = {
        name: Rows(
            data,
            None if not has_rows(data) else undecoded(data) if collate is _no_collator else data,
            collate,
            name,
        )
        for name, data in splits.items()
    }
    subject = Subject(
        model=model if model is not None else nn.Module(),
        args=None,
        train=rows[main],
        evaluation={name: held for name, held in rows.items() if name != main},
        processing_class=processing_class,
    )
    subject.cache.update({"roles": roles, "raw": True})
    for name, source in sources.items():
        subject.cache[f"source:{'train' if name == main else name}"] = source
    return subject


def undecoded(data: Any) -> Any:
    """`data` with its images and recordings left as files: no batch is made of them here."""
    import datasets

    if not isinstance(data, datasets.Dataset):
        return data
    for name, feature in data.features.items():
        if isinstance(feature, (datasets.Image, datasets.Audio)) and feature.decode:
            data = data.cast_column(name, type(feature)(decode=False))
    return data


def collator(
    processing_class: Any, roles: Roles, source: Source
) -> Callable[[list[Any]], Mapping[str, Any]]:
    """How rows become a batch: text is tokenized, token ids are padded."""
    if processing_class is None:
        return _no_collator
    schema = next(source.chunks(roles.inputs)).schema
    texts = [n for n in roles.inputs if pa.types.is_string(schema.field(n).type)
             or pa.types.is_large_string(schema.field(n).type)]  # fmt: skip

    def tokenize(features: list[Any]) -> Mapping[str, Any]:
        columns = [[str(row[name] or "") for row in features] for name in texts[:2]]
        return dict(processing_class(*columns, padding=True, truncation=True, return_tensors="pt"))

    def pad(features: list[Any]) -> Mapping[str, Any]:
        from transformers import DataCollatorForSeq2Seq

        kept = [{k: row[k] for k in (*roles.inputs, "labels") if k in row} for row in features]
        return dict(DataCollatorForSeq2Seq(processing_class)(kept))

    if texts:
        return tokenize
    return pad if "input_ids" in roles.inputs else _no_collator
