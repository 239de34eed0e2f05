"""What the labels are: how many of each, what is missing, how uneven they are.

The recipe starts by looking at distributions and imbalances; the prior's entropy is the loss of
the best guess that never looks at an input.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from hf_recipe.core.check import Check, Located, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.data.hashing import flat_array, is_list, is_number, list_parts, numbers
from hf_recipe.data.source import Roles, Source, roles_of, source_of, splits_of
from hf_recipe.instruments.subject import Subject

MOST_CLASSES = 1_000  # classes that are listed one by one
FEW_VALUES = 64  # whole numbers beyond this many values are a quantity, not classes
IGNORED = -100


@dataclass(frozen=True)
class LabelCounts(Measurement):
    """The labels of one split.

    Attributes:
        column: where they stand.
        form: "class" (one whole number or name a row), "number" (a quantity), "tags" (a class for
            each position), "flags" (a vector of 0 and 1), "vector" (a vector of quantities) or
            "sequence" (token ids).
        rows: rows read; total: rows in the split, None for a stream.
        missing: rows, or positions, without a label (null, NaN, -100).
        distinct: different labels; lowest, highest: the extremes, NaN for names.
        whole: whether all are whole numbers; floating: whether they are stored as floats.
        counts: how often each class (for flags: each position) occurs; the commonest 1,000.
        names: the class names that the data set declares.
        width: length of a vector of flags or quantities; 0 where rows differ.
        single: share of the rows of flags with exactly one flag.
    """

    column: str
    form: str
    rows: int
    total: int | None
    missing: int = 0
    distinct: int = 0
    lowest: float = math.nan
    highest: float = math.nan
    whole: bool = False
    floating: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    width: int = 0
    single: float = 0.0


# ---------------------------------------------------------------- counting


def count_labels(source: Source, roles: Roles) -> LabelCounts:
    """Count the labels of one split in chunks; raises Skip where there are none."""
    if roles.label is None:
        raise Skip(f"the {source.name} data has no label column")
    arrays = [flat_array(chunk.column(roles.label)) for chunk in source.chunks([roles.label])]
    if not arrays or all(array.null_count == len(array) for array in arrays):
        raise Skip(f"every label of the {source.name} data is missing")
    names = class_names(source.features.get(roles.label))
    common: dict[str, Any] = {
        "column": roles.label,
        "rows": len(source),
        "total": source.total,
        "names": names,
    }
    if roles.label == "start_positions":
        raise Skip("the labels are positions in the input, not classes")
    kind = next(array.type for array in arrays if array.null_count < len(array))
    if is_list(kind):
        return _count_lists(arrays, common)
    if is_number(kind):
        values = np.concatenate(
            [numbers(array)[np.asarray(array.is_valid())] for array in arrays if len(array)]
        )
        nulls = sum(array.null_count for array in arrays)
        return _count_numbers(values, nulls, common, pa.types.is_floating(kind))
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return _count_names(arrays, common)
    raise Skip(f"labels of type {kind} cannot be counted")


def _count_numbers(
    values: npt.NDArray[Any], nulls: int, common: Mapping[str, Any], floating: bool
) -> LabelCounts:
    there = values[np.isfinite(values) & (values != IGNORED)]
    distinct, counts = np.unique(there, return_counts=True)
    whole = bool(np.all(distinct == np.round(distinct)))
    classes = bool(common["names"]) or (whole and len(distinct) and is_few(distinct, len(there)))
    return LabelCounts(
        **common,
        form="class" if classes and (not floating or len(distinct) <= FEW_VALUES) else "number",
        missing=nulls + len(values) - len(there),
        distinct=len(distinct),
        lowest=float(distinct[0]) if len(distinct) else math.nan,
        highest=float(distinct[-1]) if len(distinct) else math.nan,
        whole=whole,
        floating=floating,
        counts=_listed([str(int(v)) for v in distinct], counts) if classes else {},
    )


def is_few(distinct: npt.NDArray[Any], rows: int) -> bool:
    """Whether whole numbers look like classes: few values, or small ones that repeat often."""
    if len(distinct) <= FEW_VALUES:
        return True
    return bool(distinct[0] >= 0 and distinct[-1] < rows / 2 and rows >= 4 * len(distinct))


def _count_names(arrays: Sequence[pa.Array], common: Mapping[str, Any]) -> LabelCounts:
    import pyarrow.compute as pc

    column = pa.chunked_array([array.cast(pa.large_string()) for array in arrays])
    tally = pc.value_counts(column.drop_null())
    names, counts = tally.field("values").to_pylist(), np.asarray(tally.field("counts"))
    present = len(column) - column.null_count
    if len(names) > max(FEW_VALUES, present // 2):
        raise Skip(f"column {common['column']} holds free text, not classes")
    return LabelCounts(
        **common,
        form="class",
        missing=column.null_count,
        distinct=len(names),
        counts=_listed(names, counts),
    )


def _count_lists(arrays: Sequence[pa.Array], common: Mapping[str, Any]) -> LabelCounts:
    """Vectors of flags or quantities where all rows are alike in length, else tags or tokens."""
    parts = [list_parts(array) for array in arrays]
    lengths = np.concatenate([np.diff(offsets) for _, offsets in parts])
    children = [flat_array(values) for values, _ in parts]
    if not all(is_number(child.type) for child in children):
        raise Skip(f"labels of type {arrays[0].type} cannot be counted")
    values = np.concatenate([numbers(child) for child in children])
    floating = any(pa.types.is_floating(child.type) for child in children)
    width = int(lengths[0]) if len(lengths) and np.all(lengths == lengths[0]) else 0
    flags = width > 1 and bool(np.all((values == 0) | (values == 1)))
    if flags and floating:
        grid = values.reshape(-1, width)
        on = grid.sum(axis=0).astype(np.int64)
        return LabelCounts(
            **common, form="flags", distinct=2, lowest=0.0, highest=1.0, whole=True,
            floating=True, counts=_listed([str(i) for i in range(width)], on), width=width,
            single=float((grid.sum(axis=1) == 1).mean()),
        )  # fmt: skip
    counted = _count_numbers(values, 0, {**common, "names": ()}, floating)
    form = "vector" if floating else "tags"
    return LabelCounts(**{**vars(counted), "names": common["names"], "form": form, "width": width})


def _listed(names: Sequence[str], counts: npt.NDArray[Any]) -> dict[str, int]:
    order = np.argsort(-counts, kind="stable")[:MOST_CLASSES]
    return {names[i]: int(counts[i]) for i in order}


def class_names(feature: Any) -> tuple[str, ...]:
    """The names that a `datasets` feature, or what its lists hold, gives its numbers."""
    while feature is not None and not hasattr(feature, "names"):
        feature = getattr(feature, "feature", None) or (
            feature[0] if isinstance(feature, list) and feature else None
        )
    return tuple(feature.names or ())[:MOST_CLASSES] if feature is not None else ()


def take_counts(subject: Subject) -> Iterator[Located]:
    """Count the labels of every split that has some."""
    reasons = []
    for split in splits_of(subject):
        try:
            source = source_of(subject, split)
            yield Located(seen_counts(subject, source, roles_of(subject, source)), split)
        except Skip as reason:
            reasons.append(str(reason))
    if len(reasons) == len(splits_of(subject)):
        raise Skip("; ".join(dict.fromkeys(reasons)) or "there is no data set")


def seen_counts(subject: Subject, source: Source, roles: Roles) -> LabelCounts:
    """The counts as the model means them.

    Whole numbers under one output are a quantity; lists under a language model are tokens.
    """
    counts, model = count_labels(source, roles), subject.model
    outputs = head_outputs(model)
    if counts.form == "class" and outputs == 1 and not counts.names:
        return replace(counts, form="number", counts={})
    described = getattr(model, "config", None) is not None
    tokens = outputs is None if described else counts.distinct > FEW_VALUES
    if counts.form == "tags" and tokens and not counts.names:
        return replace(counts, form="sequence", counts={})
    return counts


def other_parts(names: Sequence[str], unused: Sequence[int]) -> bool:
    """Whether each unused tag is a part (I-, E-, ...) of an entity whose other parts are used."""
    parts = [name.partition("-") for name in names]
    if max(unused) >= len(parts):
        return False
    marks = "BIELMSU"  # begin, inside, end or last, middle, single or unit
    used = {kind for i, (mark, _, kind) in enumerate(parts) if mark in marks and i not in unused}
    return all(parts[i][0] in marks and parts[i][2] in used - {""} for i in unused)


def head_outputs(model: Any) -> int | None:
    """The outputs of a classification or regression head; None where the model has none."""
    config = getattr(model, "config", None)
    outputs = getattr(config, "num_labels", None)
    if outputs is None:
        return None
    name = type(model).__name__
    if any(word in name for word in ("Classification", "Regression", "Classifier")):
        return int(outputs)
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    fits = bool(linear) and linear[-1].out_features == outputs
    # language models, and heads that score one candidate at a time
    others = ("CausalLM", "MaskedLM", "LMHead", "Conditional", "MultipleChoice")
    return int(outputs) if fits and not any(word in name for word in others) else None


# ---------------------------------------------------------------- verdicts


def prior_entropy(counts: Mapping[str, int]) -> float:
    """Entropy of the class frequencies in nats: the loss of the best input-blind guess."""
    total = sum(counts.values())
    return -sum(c / total * math.log(c / total) for c in counts.values() if c)


def class_imbalance(
    labels: LabelCounts,
    *,
    ratio: Annotated[
        float, "commonest over rarest class; judged: below it no metric misleads"
    ] = 4.0,
    fewest: Annotated[int, "rows of a class under which its error cannot be resolved"] = 10,
) -> Iterator[Fault]:
    """A note where classes are uneven, or where the rarest has hardly any rows."""
    if labels.form not in ("class", "tags") or not labels.counts:
        return
    counts = labels.counts
    total, most, least = sum(counts.values()), max(counts.values()), min(counts.values())
    if len(counts) > 1 and most < ratio * least and (least >= fewest or most < 2 * least):
        return
    entropy, level = prior_entropy(counts), math.log(max(len(counts), 1))
    if len(counts) == 1:
        message = f"all {total:,} labels in {labels.column} are the same class"
    else:
        message = (
            f"{labels.column}: {len(counts):,} classes, the commonest has {most / total:.1%} of "
            f"{total:,} labels, the rarest {least:,}; prior entropy {entropy:.3f} nats "
            f"of {level:.3f}, so accuracy {most / total:.1%} is the floor"
        )
    yield Fault(
        message=message,
        subject=labels.column,
        severity="warning" if len(counts) == 1 and total > 1 else None,
        fix=f"dataset.unique({labels.column!r})  # in the source: which labels were lost?"
        if len(counts) == 1
        else None,
        evidence={
            "seen": f"commonest class {most / total:.1%}, rarest {least:,} labels",
            "expected": f"about {1 / max(len(counts), 1):.1%} each",
            "entropy": entropy,
            "largest_share": most / total,
            "rarest": least,
        },
    )


COUNTS = Probe("count labels", "dataset", (LabelCounts,), take_counts)

CLASS_IMBALANCE = Check(
    name="class-imbalance",
    stage="data",
    severity="note",
    moments=("dataset",),
    why="With uneven classes accuracy flatters: guessing the commonest class is already that good.",
    fix="report balanced accuracy or F1 beside accuracy; init the head's bias to log(prior)",
    source="Karpathy 2019",
    judges=(class_imbalance,),
    unsure="Unevenness may be the task's own nature; then this is a fact and no fault.",
)
