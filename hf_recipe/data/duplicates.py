"""Which rows of a split are copies of each other, and do copies agree on their label?

Copies weigh double in the loss. The same input under two labels puts a floor under the loss that
no model can pass: the mean entropy of the labels given the input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hf_recipe.core.check import Check, Located, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.data.blank import blank_rows
from hf_recipe.data.hashing import Hashes, glances, shared, table_hashes
from hf_recipe.data.labels import seen_counts
from hf_recipe.data.source import Roles, Source, roles_of, source_of, splits_of
from hf_recipe.instruments.subject import Subject


@dataclass(frozen=True)
class Repeats(Measurement):
    """Inputs that occur more than once in a split.

    Attributes:
        columns: what was compared.
        rows, distinct: rows read, different inputs among them.
        copies: rows that repeat an earlier one; examples: some of them.
        conflicting: rows whose input also stands under another label; None without class labels.
        conflict_groups: different inputs with more than one label.
        floor: mean entropy of the label given the input, in nats per row: the loss floor.
        conflict_examples: rows of conflicts, the most divided inputs first.
        note: how much was read, where not all was.
    """

    columns: tuple[str, ...]
    rows: int
    distinct: int
    copies: int
    examples: tuple[int, ...] = ()
    conflicting: int | None = None
    conflict_groups: int = 0
    floor: float = 0.0
    conflict_examples: tuple[int, ...] = ()
    note: str = ""


def repeats(
    source: Source,
    inputs: tuple[str, ...],
    label: str | None,
    blank: npt.NDArray[np.bool_] | None = None,
) -> Repeats:
    """Find copies by hash; and, where `label` holds classes, the copies that disagree.

    Rows that are `blank` agree in having nothing: their labels contradict nobody.
    """
    if source.varies:
        raise Skip("a row comes out differently each time it is read, so copies cannot be seen")
    if not inputs:
        raise Skip(f"the {source.name} data has no input column")
    rows, every, told = _alike(source, inputs, label)
    order = np.argsort(every)  # equal rows stand side by side
    new = np.ones(len(every), dtype=bool)
    new[1:] = every[order[1:]] != every[order[:-1]]
    later = np.ones(len(every), dtype=bool)
    later[np.minimum.reduceat(order, np.flatnonzero(new))] = False
    found = Repeats(
        columns=tuple(inputs),
        rows=len(source),
        distinct=len(source) - int(later.sum()),
        copies=int(later.sum()),
        examples=tuple(source.rows[rows[later]][:20].tolist()),
        note=source.note,
    )
    if told is None:
        return found
    places = np.empty(len(every), dtype=np.int64)
    places[order] = np.cumsum(new) - 1
    if blank is not None and blank[rows].any():
        told = np.where(blank[rows], told[blank[rows]][0], told)
    return _conflicts(found, source.rows[rows], places, told)


def _alike(
    source: Source, inputs: tuple[str, ...], label: str | None
) -> tuple[npt.NDArray[np.int64], Hashes, Hashes | None]:
    """The rows that may have a copy: their places, and hashes of their inputs and labels."""
    looks = [table_hashes(chunk, inputs, glances) for chunk in source.chunks(inputs)]
    alike = shared(np.concatenate(looks)) if looks else np.zeros(0, dtype=bool)
    hashes, labels, start = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)], 0
    for chunk in source.chunks([*inputs, *([label] if label else [])]):
        here = alike[start : start + chunk.num_rows]
        start += chunk.num_rows
        some = chunk if here.all() else chunk.filter(pa.array(here))
        hashes.append(table_hashes(some, inputs))
        if label is not None:
            labels.append(table_hashes(some, [label]))
    told = np.concatenate(labels) if label is not None else None
    return np.flatnonzero(alike), np.concatenate(hashes), told


def _conflicts(found: Repeats, rows: np.ndarray, places: np.ndarray, labels: np.ndarray) -> Repeats:
    """Add what the labels of equal inputs say about each other; `rows`: of the data set."""
    _, codes = np.unique(labels, return_inverse=True)
    pairs, counts = np.unique(np.stack([places, codes]), axis=1, return_counts=True)
    sizes = np.bincount(places)
    parts = counts / sizes[pairs[0]]
    entropy = np.bincount(pairs[0], weights=-parts * np.log(parts), minlength=len(sizes))
    divided = np.bincount(pairs[0], minlength=len(sizes)) > 1
    torn = np.flatnonzero(divided[places])
    worst = torn[np.argsort(-entropy[places[torn]], kind="stable")][:20]
    return Repeats(
        **{
            **vars(found),
            "conflicting": len(torn),
            "conflict_groups": int(divided.sum()),
            "floor": float((entropy * sizes).sum() / max(found.rows, 1)),
            "conflict_examples": tuple(rows[worst].tolist()),
        }
    )


def _classes(subject: Subject, source: Source, roles: Roles) -> str | None:
    """The label's column if it holds classes: quantities that differ are no conflict."""
    try:
        counts = seen_counts(subject, source, roles)
    except Skip:
        return None
    return counts.column if counts.form == "class" else None


def _missing(source: Source, inputs: tuple[str, ...]) -> npt.NDArray[np.bool_]:
    """Rows without any input."""
    missing = np.ones(len(source), dtype=bool)
    start = 0
    for chunk in source.chunks(inputs) if inputs else ():
        for column in chunk.columns:
            here = missing[start : start + chunk.num_rows]
            here &= np.asarray(column.is_null()) if column.null_count else False
        start += chunk.num_rows
    return missing & bool(inputs)


def take_repeats(subject: Subject) -> Iterator[Located]:
    """Find copies in every split."""
    reasons = []
    for split in splits_of(subject):
        try:
            source = source_of(subject, split)
            roles = roles_of(subject, source)
            columns = blank_rows(subject, source, roles.inputs)
            blank = _missing(source, roles.inputs)
            if columns:
                blank |= np.logical_and.reduce(list(columns.values()))
            classes = _classes(subject, source, roles)
            yield Located(repeats(source, roles.inputs, classes, blank), split)
        except Skip as reason:
            reasons.append(str(reason))
    if len(reasons) == len(splits_of(subject)):
        raise Skip("; ".join(dict.fromkeys(reasons)) or "there is no data set")


def duplicate_example(
    seen: Repeats,
    *,
    fraction: Annotated[float, "share of copies worth a note; web text has 1 to 10 %"] = 0.01,
) -> Iterator[Fault]:
    """A note on exact copies inside a split."""
    share = seen.copies / max(seen.rows, 1)
    if seen.distinct > 1 and share >= fraction:
        yield Fault(
            message=f"{seen.copies:,} of {seen.rows:,} rows ({share:.1%}) repeat an earlier input "
            f"(compared: {', '.join(seen.columns)})" + (f"; {seen.note}" if seen.note else ""),
            evidence={"seen": f"{seen.copies:,} copies", "expected": "few", "fraction": share},
            examples=seen.examples,
        )


def conflicting_labels(
    seen: Repeats,
    *,
    fraction: Annotated[float, "share of rows in conflict that a loss curve would show"] = 0.005,
    per_input: Annotated[
        float, "rows per input beyond which labels are drawn, not assigned (a noisy rule); judged"
    ] = 3.0,
) -> Iterator[Fault]:
    """The same input under different labels."""
    if not seen.conflicting or seen.distinct < 2:
        return
    share = seen.conflicting / seen.rows
    small_world = seen.rows > per_input * seen.distinct
    if share < fraction:
        return
    yield Fault(
        message=f"{seen.conflicting:,} of {seen.rows:,} rows ({share:.1%}) share their input with "
        f"a row of another label, in {seen.conflict_groups:,} inputs; no model can get its "
        f"training loss under {seen.floor:.4f} nats",
        severity="note" if small_world else None,
        evidence={
            "seen": f"{seen.conflicting:,} rows in conflict",
            "expected": "none",
            "floor": seen.floor,
        },
        examples=seen.conflict_examples,
    )


REPEATS = Probe("find copies", "dataset", (Repeats,), take_repeats)

DUPLICATE_EXAMPLE = Check(
    name="duplicate-example",
    stage="data",
    severity="note",
    moments=("dataset",),
    why="A copied row weighs twice, and copies are the first thing that a model memorises.",
    fix="keep = {str(v): i for i, v in enumerate(dataset[column])}.values(); dataset.select(keep)",
    source="Lee et al. 2022 (arXiv:2107.06499)",
    judges=(duplicate_example,),
    unsure="Few categories repeat by nature; oversampling repeats on purpose.",
)

CONFLICTING_LABELS = Check(
    name="conflicting-labels",
    stage="data",
    severity="warning",
    moments=("dataset",),
    why="The same input under different labels cannot be learnt; it sets a floor under the loss.",
    fix="look at the rows in `examples`; keep the majority label or drop them",
    source="Karpathy 2019; Northcutt et al. 2021 (arXiv:2103.14749)",
    judges=(conflicting_labels,),
    unsure="Tasks whose labels are drawn (preferences, noisy rules) conflict by nature.",
)
