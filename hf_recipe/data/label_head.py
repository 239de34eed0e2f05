"""Can the model's head hold the labels?

A label without an output crashes (or asserts on the device); an output without a label, names in
another order, and classes going into one output (a silent regression) all train without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

from hf_recipe.core.check import Check, Located, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.data.collated_labels import collated_as_read, labels_as_collated, values_of
from hf_recipe.data.label_names import names_beside
from hf_recipe.data.labels import (
    MOST_CLASSES,
    LabelCounts,
    count_labels,
    head_outputs,
    other_parts,
)
from hf_recipe.data.source import roles_of, source_of, splits_of
from hf_recipe.instruments.subject import Subject


@dataclass(frozen=True)
class LabelsOnHead(Measurement):
    """The labels of one split against the model's head.

    Attributes:
        labels: the labels' counts.
        outputs: the head's outputs.
        problem_type: as the config has it; None: inferred from the labels.
        head_names: the names of the outputs: the config's, or, where those are LABEL_0, LABEL_1,
            ..., the training set's for the other splits; empty where nothing names them.
        named_by: whose names these are.
        own_loss: whether another loss than the model's own is computed.
        data_names: the names of the classes in the data: declared with the labels, or beside them.
        outside: labels without an output; outside_rows: where.
        unused: outputs that no label uses (at most 1,000); unused_count: how many.
        elsewhere: of these, outputs that an evaluation set's labels use.
    """

    labels: LabelCounts
    outputs: int
    problem_type: str | None = None
    head_names: tuple[str, ...] = ()
    named_by: str = "config.id2label"
    own_loss: bool = False
    outside: int = 0
    outside_rows: tuple[int, ...] = ()
    unused: tuple[int, ...] = ()
    unused_count: int = 0
    elsewhere: int = 0
    data_names: tuple[str, ...] = ()


def take_on_head(subject: Subject) -> Iterator[Located]:
    """Compare each split's labels, as the collator hands them over, with the head."""
    outputs = head_outputs(subject.model)
    if outputs is None:
        raise Skip("no model was given whose config describes a classification or regression head")
    found: dict[str, tuple[LabelCounts, npt.NDArray[np.int64], npt.NDArray[Any]]] = {}
    changed: dict[str, tuple[LabelCounts, npt.NDArray[np.int64], npt.NDArray[Any]]] = {}
    beside: dict[str, tuple[str, ...]] = {}
    reasons = []
    for split in splits_of(subject):
        try:
            source = source_of(subject, split)
            roles = roles_of(subject, source)
            counts = count_labels(source, roles)
            if collated_as_read(subject, source, roles):
                found[split] = (counts, *values_of(source, roles))
                if not counts.names and counts.whole:
                    beside[split] = names_beside(source, counts.column)
            else:
                changed[split] = labels_as_collated(subject, split, counts)
        except Skip as reason:
            reasons.append(str(reason))
    if not found and not changed:
        raise Skip("; ".join(dict.fromkeys(reasons)) or "there is no data set")
    for split, (counts, rows, values) in changed.items():
        located = on_head(subject, counts, rows, values, outputs, set())
        # The classes of a few batches; and the names were given to other numbers.
        yield Located(replace(located, unused=(), unused_count=0, head_names=()), split)
    others = [values for split, (_, _, values) in found.items() if split != "train"]
    seen_elsewhere = set(np.unique(np.concatenate(others)).tolist()) if others else set()
    for split, (counts, rows, values) in found.items():
        located = on_head(subject, counts, rows, values, outputs, seen_elsewhere)
        if split != "train":  # what evaluation does not use is no fault
            located = replace(located, unused=(), unused_count=0, elsewhere=0)
            taught = found["train"][0].names if "train" in found else ()
            if taught and not located.head_names:
                located = replace(located, head_names=taught, named_by="the training set")
        yield Located(replace(located, data_names=counts.names or beside.get(split, ())), split)


def on_head(
    subject: Subject,
    counts: LabelCounts,
    rows: npt.NDArray[np.int64],
    values: npt.NDArray[Any],
    outputs: int,
    elsewhere: set[Any],
) -> LabelsOnHead:
    """One split's labels against `outputs`."""
    outside = np.zeros(0, dtype=np.int64)
    unused: list[int] = []
    if counts.form in ("class", "tags") and counts.whole:
        outside = rows[(values < 0) | (values >= outputs)]
        unused = sorted(set(range(outputs)) - set(np.unique(values).astype(int).tolist()))
    elif counts.form == "flags" and counts.width == outputs:
        unused = [i for i in range(outputs) if not counts.counts.get(str(i))]
    config = subject.config
    names = tuple(str(config.id2label.get(i, "")) for i in range(outputs)) if config else ()
    default = all(name in (f"LABEL_{i}", str(i)) for i, name in enumerate(names))
    return LabelsOnHead(
        labels=counts,
        outputs=outputs,
        problem_type=getattr(config, "problem_type", None),
        head_names=() if default else names[:MOST_CLASSES],
        own_loss=has_own_loss(subject),
        outside=len(outside),
        outside_rows=tuple(int(row) for row in np.unique(outside)[:20]),
        unused=tuple(unused[:MOST_CLASSES]),
        unused_count=len(unused),
        elsewhere=len(set(unused) & elsewhere),
    )


def has_own_loss(subject: Subject) -> bool:
    """Whether the loss is anything but what a transformers model computes from its labels."""
    from transformers import Trainer

    if not type(subject.model).__module__.startswith("transformers."):
        return True
    trainer = subject.trainer
    if trainer is None:
        return False
    return (
        type(trainer).compute_loss is not Trainer.compute_loss
        or trainer.compute_loss_func is not None
    )


# ---------------------------------------------------------------- verdicts

RENAMED = "AutoModel...from_pretrained(name, id2label=dict(enumerate(names)))  # as in the data"


def absent_class(
    found: LabelsOnHead,
    *,
    chance: Annotated[
        float, "probability that even classes would leave one out; 1 in 1,000"
    ] = 1e-3,
) -> Iterator[Fault]:
    """Outputs that no training label uses, where too many labels were seen for it to be chance."""
    labels = found.labels
    if not found.unused_count or found.outputs < 2 or found.outside:
        return
    seen = labels.rows if labels.form == "flags" else sum(labels.counts.values())
    if labels.form != "flags" and found.outputs * (1 - 1 / found.outputs) ** seen > chance:
        return
    listed = ", ".join(str(i) for i in found.unused[:5]) + (
        ", ..." if found.unused_count > 5 else ""
    )
    message = (
        f"{found.unused_count:,} of {found.outputs:,} outputs are used by none of {seen:,} "
        f"labels in {labels.column} (output {listed})"
    )
    if found.unused == (0,) and labels.lowest == 1:
        message += "; labels start at 1: off by one?"
    whole = (
        labels.form == "tags" and not found.elsewhere and len(found.unused) == found.unused_count
    )
    if found.elsewhere:
        message += f"; an evaluation set uses {found.elsewhere} of them"
    yield Fault(
        message=message,
        subject=labels.column,
        evidence={
            "seen": f"{found.outputs - found.unused_count} outputs used",
            "expected": f"all {found.outputs}",
            "unused": list(found.unused[:20]),
        },
        severity="note" if whole and other_parts(found.head_names, found.unused) else None,
    )


def label_out_of_range(found: LabelsOnHead) -> Iterator[Fault]:
    """Labels for which the head has no output; -100 is left out of the loss and counts as none."""
    if not found.outside or found.outputs < 2:
        return
    labels = found.labels
    yield Fault(
        message=f"{found.outside:,} labels in {labels.column} lie outside 0..{found.outputs - 1}: "
        f"they run from {labels.lowest:.0f} to {labels.highest:.0f}, num_labels={found.outputs}"
        + (f"; first in row {found.outside_rows[0]}" if found.outside_rows else ""),
        subject=labels.column,
        fix=_into_range(found),
        evidence={
            "seen": f"labels {labels.lowest:.0f}..{labels.highest:.0f}",
            "expected": f"labels 0..{found.outputs - 1}",
            "outside": found.outside,
        },
        examples=found.outside_rows,
    )


def _into_range(found: LabelsOnHead) -> str | None:
    """Numbers that start elsewhere than at 0 are moved; only higher ones need a wider head."""
    labels, row = found.labels, f"row[{found.labels.column!r}]"
    if labels.lowest > 0 and labels.highest - labels.lowest < found.outputs:
        moved = f"{row} - {labels.lowest:.0f}"
    elif labels.lowest < 0 and labels.distinct <= found.outputs:
        moved = f"sorted(classes).index({row})"
    else:
        return None
    return f"dataset = dataset.map(lambda row: {{{found.labels.column!r}: {moved}}})  # 0, 1, ..."


def label_name_mismatch(found: LabelsOnHead) -> Iterator[Fault]:
    """Names that data set and config share, at different numbers."""
    names = found.data_names or found.labels.names
    data = {name.strip().lower(): i for i, name in enumerate(names)}
    head = {name.strip().lower(): i for i, name in enumerate(found.head_names)}
    shared = sorted(set(data) & set(head), key=data.__getitem__)
    moved = [name for name in shared if data[name] != head[name]]
    if not moved or len(shared) < 2 or "" in moved:
        return
    yield Fault(
        message=f"{len(moved)} of {len(shared)} class names stand at another number in "
        f"{found.named_by} than in the data set's {found.labels.column}",
        subject=found.labels.column,
        fix=None if found.labels.names else RENAMED,
        evidence={
            "seen": f"{len(moved)} names moved",
            "expected": "the same order",
            "data_ids": [data[name] for name in moved[:20]],
            "head_ids": [head[name] for name in moved[:20]],
        },
        quotes=tuple(
            f"{name}: {data[name]} in the data, {head[name]} in {found.named_by}"
            for name in moved[:20]
        ),
    )


def problem_type_mismatch(
    found: LabelsOnHead,
    *,
    most_classes: Annotated[
        int, "whole numbers 0..k up to here are taken for classes; ratings have about 5 to 10"
    ] = 5,
    rows: Annotated[int, "rows of flags from which one flag in each is no chance; judged"] = 32,
) -> Iterator[Fault]:
    """Classes into one output (a silent regression), or one flag a row into BCE."""
    labels, declared = found.labels, found.problem_type
    if found.own_loss:
        return
    regression = "problem_type='regression'"
    contiguous = labels.lowest == 0 and labels.distinct == labels.highest + 1
    if found.outputs == 1 and labels.form == "class" and labels.distinct > 1:
        classes = bool(labels.names) or (
            contiguous and (labels.distinct == 2 or not labels.floating)
            and labels.distinct <= most_classes
        )  # fmt: skip
        if classes:
            yield Fault(
                message=f"{labels.distinct} classes in {labels.column} go into one output: the "
                "model regresses on class numbers (mean squared error), without a word",
                subject=labels.column,
                severity="error" if labels.names or not labels.floating else "warning",
                fix=f"num_labels={max(len(labels.names), int(labels.highest) + 1)}",
                evidence={
                    "seen": f"num_labels=1, {labels.distinct} classes",
                    "expected": f"num_labels={labels.distinct}",
                },
            )
    elif (
        found.outputs > 1
        and labels.form == "class"
        and declared
        not in (
            None,
            "single_label_classification",
        )
    ):
        yield Fault(
            message=f"one class number a row in {labels.column}, but problem_type is {declared!r} "
            f"with {found.outputs} outputs",
            subject=labels.column,
            fix="config.problem_type = 'single_label_classification'",
            evidence={"seen": declared, "expected": "single_label_classification"},
        )
    elif (
        labels.form == "flags" and labels.single == 1.0 and labels.rows >= rows
        and labels.width == found.outputs and declared != "regression"
    ):  # fmt: skip
        yield Fault(
            message=f"every one of {labels.rows:,} rows of {labels.column} sets exactly one of "
            f"{labels.width} flags: one-hot classes, trained as {labels.width} separate "
            "yes-or-no questions",
            subject=labels.column,
            severity="warning" if declared == "multi_label_classification" else "error",
            fix="labels = [row.index(1.0) for row in labels]  # class numbers, cross-entropy",
            evidence={
                "seen": "one flag in every row",
                "expected": f"class numbers, or {regression}",
            },
        )


ON_HEAD = Probe("compare labels with the head", "dataset", (LabelsOnHead,), take_on_head)

ABSENT_CLASS = Check(
    name="absent-class",
    stage="data",
    severity="warning",
    moments=("dataset",),
    why="An output without training labels is never learnt: labels off by one, a lost class, or a "
    "head that is too wide.",
    fix="num_labels = len(set(train['label'])), or map labels onto 0..num_labels-1",
    source="NeuraLint, Nikanjam et al. 2021 (arXiv:2105.08095)",
    judges=(absent_class,),
    unsure="A head made for more classes than this data set has (kept from pretraining).",
    explains=("output-bias-unset", "hockey-stick"),
)

LABEL_OUT_OF_RANGE = Check(
    name="label-out-of-range",
    stage="data",
    severity="error",
    moments=("dataset",),
    why="The loss looks up an output that is not there: a crash on the CPU, a device-side assert "
    "on a GPU.",
    fix="model = AutoModel...from_pretrained(name, num_labels=max(labels) + 1)",
    source="transformers issue 12763, 2021",
    judges=(label_out_of_range,),
)

LABEL_NAME_MISMATCH = Check(
    name="label-name-mismatch",
    stage="data",
    severity="error",
    moments=("dataset",),
    why="A head that means class 0 by another name than the data predicts the wrong class, surely.",
    fix="dataset = dataset.align_labels_with_mapping(model.config.label2id, 'label')",
    source="transformers issues 10386 and 12822, 2021",
    judges=(label_name_mismatch,),
    unsure="Labels renumbered by map() may keep the old ClassLabel names.",
    explains=("initial-loss-unexpected",),
)

PROBLEM_TYPE_MISMATCH = Check(
    name="problem-type-mismatch",
    stage="data",
    severity="error",
    moments=("dataset",),
    why="The loss is inferred from num_labels and the labels' type; a wrong guess trains another "
    "task in silence.",
    fix="num_labels = number of classes, with integer labels; or floats and one output to regress",
    source="transformers issues 10232 and 27707, 2021-2023",
    judges=(problem_type_mismatch,),
    unsure="Ratings from 0 to 4 that are regressed on purpose: store them as floats.",
)
