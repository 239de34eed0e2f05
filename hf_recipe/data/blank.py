"""Rows with nothing in them, once they are numbers.

A failed download becomes a black image, an empty answer two special tokens. Texts and sequences
of no length are told column by column (`data/columns.py`); here are the rows that have a length
and no content: token ids that are all beginnings, ends and padding, and signals of a single value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hf_recipe.core.check import Located, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.data.hashing import flat_array, flat_lists, is_list, is_number, numbers
from hf_recipe.data.source import Source, roles_of, source_of, splits_of
from hf_recipe.data.tokenizer import special_ids, tokenizer_of
from hf_recipe.instruments.subject import Subject

Flags = npt.NDArray[np.bool_]
SIGNALS = ("pixel_values", "input_values", "input_features")
TOKENS = ("input_ids",)
FEWEST = 16  # numbers of a signal; fewer may agree by nature
KEPT = "blank rows"  # key of what a source keeps


@dataclass(frozen=True)
class BlankRows(Measurement):
    """Rows of one split without any content.

    Attributes:
        rows: rows read; tokens: rows of nothing but beginnings, ends and padding, in `column`.
        signals: rows whose every number is the same, in `column`.
        column: where; the first of several.
        examples: data set rows.
    """

    rows: int
    tokens: int = 0
    signals: int = 0
    column: str = ""
    examples: tuple[int, ...] = ()


def structural_ids(subject: Subject) -> frozenset[int]:
    """Ids that carry no content: padding, beginnings, ends and separators."""
    if tokenizer_of(subject) is None:
        return frozenset()  # a config's default ids may be anybody's
    special = special_ids(subject)
    separator = getattr(tokenizer_of(subject), "sep_token_id", None)
    found = {special.pad, separator, *special.ends, *special.begins}
    return frozenset(i for i in found if i is not None)


def blank_rows(subject: Subject, source: Source, inputs: Sequence[str]) -> dict[str, Flags]:
    """For each input column that can be judged so, which rows hold nothing; kept by the source.

    Texts (null ones too), empty lists and images are among them, although `Columns` counts those.
    """
    if KEPT not in source.kept:
        found: dict[str, Flags] = {}
        special = np.asarray(sorted(structural_ids(subject)), dtype=np.int64)
        for name in inputs:
            arrays = [flat_array(chunk.column(name)) for chunk in source.chunks([name])]
            parts = [_blank(array, name, special) for array in arrays]
            if parts and all(part is not None for part in parts):
                found[name] = np.concatenate([part for part in parts if part is not None])
        source.kept[KEPT] = found
    kept: dict[str, Flags] = source.kept[KEPT]
    return kept


def _blank(array: pa.Array, name: str, special: npt.NDArray[np.int64]) -> Flags | None:
    """Which rows of a chunk are blank; None for a column that is neither tokens nor a signal."""
    if pa.types.is_struct(array.type) and array.type.get_field_index("std") >= 0:
        alike: Flags = np.asarray(array.is_valid()) & (numbers(array.field("std")) == 0)
        return alike
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        return np.asarray(pc.equal(pc.utf8_trim_whitespace(array), "").fill_null(True))
    if not is_list(array.type) or not len(array):
        return None
    values, offsets = flat_lists(array)
    if not is_number(values.type):
        return None
    flat, lengths = numbers(values), np.diff(offsets)
    there = lengths > 0
    starts = offsets[:-1][there]
    blank = np.zeros(len(array), dtype=bool)
    if name in TOKENS and len(special):
        blank[there] = np.logical_and.reduceat(np.isin(flat, special), starts)
        return blank
    whole = flat.dtype.kind != "f" or bool(np.all(flat == np.floor(flat)))
    if not len(starts) or name in TOKENS or (whole and name not in SIGNALS):
        return None
    low, high = np.minimum.reduceat(flat, starts), np.maximum.reduceat(flat, starts)
    blank[there] = (low == high) & np.isfinite(low) & (lengths[there] >= FEWEST)
    return blank


def take_blank(subject: Subject) -> Iterator[Located]:
    """Count rows without content in every split."""
    reasons = []
    for split in splits_of(subject):
        try:
            source = source_of(subject, split)
            inputs = roles_of(subject, source).inputs
            lists = [n for n in inputs if is_list(source.schema.field(n).type)]
            found = blank_rows(subject, source, inputs) if lists else {}
            flags = {name: found[name] for name in lists if name in found}
            if not flags:
                raise Skip(f"the {split} data holds neither token ids nor signals")
            yield Located(_counted(source, flags), split)
        except Skip as reason:
            reasons.append(str(reason))
    if len(reasons) == len(splits_of(subject)):
        raise Skip("; ".join(dict.fromkeys(reasons)) or "there is no data set")


def _counted(source: Source, flags: dict[str, Flags]) -> BlankRows:
    column = next((name for name, found in flags.items() if found.any()), "")
    if not column:
        return BlankRows(len(source))
    found = flags[column]
    count = int(found.sum())
    tokens = column in TOKENS
    return BlankRows(
        len(source),
        tokens=count if tokens else 0,
        signals=0 if tokens else count,
        column=column,
        examples=tuple(source.rows[found][:20].tolist()),
    )


def nothing_inside(
    seen: BlankRows,
    *,
    all_alike: Annotated[
        float, "share from which constant rows are what the column is (a level for each row)"
    ] = 0.5,
) -> Iterator[Fault]:
    """Rows of special tokens alone, or of a single value."""
    count = seen.tokens + seen.signals
    share = count / max(seen.rows, 1)
    if not count or (seen.signals and share > all_alike):
        return
    what = "hold no token but special ones" if seen.tokens else "hold one value alone"
    cell = f"row[{seen.column!r}]"
    test = f"set({cell}) - set(tokenizer.all_special_ids)" if seen.tokens else f"np.ptp({cell}) > 0"
    yield Fault(
        message=f"{count:,} of {seen.rows:,} rows ({share:.1%}) of {seen.column} {what}",
        subject=seen.column,
        fix=f"dataset = dataset.filter(lambda row: {test})",
        evidence={"seen": f"{count:,} blank rows", "expected": "none"},
        examples=seen.examples,
    )


BLANK = Probe("look for rows without content", "dataset", (BlankRows,), take_blank)
