"""Do a teacher and its student mean the same by output i, and by input i?

Distilling matches numbers by their place. Another size, the same names in another order, a
tokenizer that gives an id to another word: the loss falls all the same. Names are compared where
configs and tokenizers tell them; where they do not, the teacher's answers to labelled rows do: if
renaming its classes makes a poor teacher a good one, they stand in another order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from hf_recipe.core.check import Check, Measurement, Probe, Skip, private
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.subject import Subject
from hf_recipe.tune import distillation_heads as heads
from hf_recipe.tune import distillation_models as models
from hf_recipe.tune.teacher_answers import ROWS, ask
from hf_recipe.tune.teachers import teachers_of

Labels = np.ndarray[Any, np.dtype[np.int64]]


# ------------------------------------------------------------------ by their names


@dataclass(frozen=True)
class TeacherSpace(Measurement):
    """What the outputs and inputs of a student and one of its teachers stand for.

    Attributes:
        teacher: which one, from 0.
        student_size, teacher_size: classes or vocabulary entries; None: the config does not tell.
        first: first class of another name, where both have the same names in another order.
        first_token: first id that the two tokenizers give to different tokens; None: none, or a
            tokenizer is not known.
        cut: the Trainer was told to cut both to the shared classes.
        names: the student's and the teacher's name of that class or token.
        student_tokens, teacher_tokens: sizes of the vocabularies that both read the same token ids
            by; None: they read no ids, or their tokenizers were compared.
    """

    teacher: int
    student_size: int | None
    teacher_size: int | None
    first: int | None = None
    first_token: int | None = None
    cut: bool = False
    names: tuple[str, ...] = private(default=())
    student_tokens: int | None = None
    teacher_tokens: int | None = None


def compare_spaces(subject: Subject) -> Iterator[TeacherSpace]:
    """Compare the label spaces, vocabularies and tokenizers of the student and each teacher."""
    teachers, student = teachers_of(subject), subject.model
    try:
        batch = subject.batch(size=2).inputs
    except Skip:  # a stream: the classes and configs tell nearly as much
        batch = {}
    known = (
        subject.processing_class,
        getattr(subject.trainer, "teacher_processing_class", None),
    )
    tokenizers = all(hasattr(tokenizer, "get_vocab") for tokenizer in known)
    for index, teacher in enumerate(teachers):
        ours = models.space_of(student, heads.task_of(student, batch))
        theirs = models.space_of(teacher, heads.task_of(teacher, batch))
        first = None
        names: tuple[str, ...] = ()
        if ours is not None and theirs is not None:
            first = models.first_difference(ours.names, theirs.names)
            if first is not None:
                names = (ours.names[first], theirs.names[first])
        read = [None if tokenizers else _tokens(model, batch) for model in (student, teacher)]
        yield TeacherSpace(
            teacher=index,
            student_size=ours.size if ours else None,
            teacher_size=theirs.size if theirs else None,
            first=first,
            first_token=models.first_other_token(*known) if tokenizers else None,
            cut=vars(subject.args).get("distill_vocabulary") == "cut",
            names=names,
            student_tokens=read[0],
            teacher_tokens=read[1],
        )


def _tokens(model: nn.Module, batch: Any) -> int | None:
    """How many token ids the model knows, where it reads the batch's."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    return size if isinstance(size, int) and "input_ids" in batch else None


def judge_space(
    space: TeacherSpace,
    *,
    padding: Annotated[int, "vocabularies are padded to multiples of up to 128: Qwen's two"] = 128,
) -> Iterator[Fault]:
    """Sizes that differ, or the same names in another order."""
    ours, theirs, subject = space.student_size, space.teacher_size, f"teacher {space.teacher}"
    evidence = {"student_size": ours, "teacher_size": theirs}
    if ours is not None and theirs is not None and ours != theirs and not space.cut:
        yield Fault(
            f"the student has {ours} outputs and its teacher {theirs}; the first entry that one "
            f"of them lacks is {min(ours, theirs)}",
            subject=subject,
            evidence=evidence
            | {"seen": f"{ours} against {theirs} outputs", "expected": "the same outputs"},
        )
    for what, first in (("class", space.first), ("token", space.first_token)):
        if first is not None:
            yield Fault(
                f"{what} {first} has another name for the student than for its teacher, of "
                f"{ours} and {theirs} outputs",
                subject=subject,
                evidence=evidence
                | {
                    "first": first,
                    "seen": f"{what} {first} is the first in another order",
                    "expected": "the same order",
                },
                quotes=space.names if what == "class" else (),
            )
    read, others = space.student_tokens, space.teacher_tokens
    if read is None or others is None or ours != theirs or abs(read - others) <= padding:
        return
    yield Fault(
        f"both read the same token ids, the student by a vocabulary of {read}, its teacher by one "
        f"of {others}: the first id that one of them lacks is {min(read, others)}",
        subject=subject,
        severity="warning",
        evidence={
            "seen": f"{read} against {others} token ids",
            "expected": "one tokenizer",
            "student_tokens": read,
            "teacher_tokens": others,
        },
    )


# ------------------------------------------------------------------ by their answers


@dataclass(frozen=True)
class TeacherOrder(Measurement):
    """How right the teachers are, and how right they would be if their classes had other names.

    The names are chosen on one half of the items and tried on the other, in turn.

    Attributes:
        accuracy, renamed: share of right top answers; with the classes renamed.
        gain, standard_error: mean of the paired difference, and its error, over items.
        majority: share of the most common label: what a constant answer reaches.
        first, name: the first class that would be renamed, and to what; None: none would be.
        items: labelled items.
        split: where they came from.
    """

    accuracy: float
    renamed: float
    gain: float
    standard_error: float
    majority: float
    first: int | None
    name: int | None
    items: int
    split: str


def measure_order(subject: Subject) -> Iterator[TeacherOrder]:
    """Rename the teacher's classes so that its answers fit the labels best."""
    teachers = teachers_of(subject)
    split = next(iter(subject.evaluation), "train")
    found = ask(subject, teachers, split, ROWS).teacher
    if not found.losses:
        raise Skip("the labels are not a few classes")
    labels, said = (torch.cat(x).cpu().numpy() for x in (found.labels, found.said))
    if len(labels) < 4:
        raise Skip(f"the {split} rows carry {len(labels)} labels")
    yield order_of(labels, said, split)


def order_of(labels: Labels, said: Labels, split: str) -> TeacherOrder:
    """The `TeacherOrder` of top answers to labelled items: two (items,) arrays of classes."""
    halves = np.arange(len(labels)) % 2
    renamed = said.copy()
    for half in (0, 1):
        names = best_names(labels[halves != half], said[halves != half], int(said.max()))
        renamed[halves == half] = names[said[halves == half]]
    right, better = said == labels, renamed == labels
    gain = better.astype(float) - right
    names = best_names(labels, said, int(said.max()))
    moved = np.flatnonzero((names != np.arange(len(names))) & np.isin(np.arange(len(names)), said))
    return TeacherOrder(
        accuracy=float(right.mean()),
        renamed=float(better.mean()),
        gain=float(gain.mean()),
        standard_error=float(gain.std(ddof=1) / len(gain) ** 0.5),
        majority=float(np.bincount(labels).max() / len(labels)),
        first=int(moved[0]) if len(moved) else None,
        name=int(names[moved[0]]) if len(moved) else None,
        items=len(labels),
        split=split,
    )


def best_names(labels: Labels, said: Labels, highest: int) -> Labels:
    """For each class that may be said, the label it fits best, one to one; its own by default."""
    classes = 1 + max(highest, int(labels.max(initial=0)))
    counts = np.zeros((classes, classes))
    np.add.at(counts, (said, labels), 1.0)
    names: Labels = linear_sum_assignment(counts + 0.5 * np.eye(classes), maximize=True)[1]
    return names


def judge_order(
    found: TeacherOrder,
    *,
    sigmas: Annotated[float, "judgement: four standard errors of a gain that was looked for"] = 4.0,
    share: Annotated[
        float, "judgement: half of the errors; an untrained teacher saves fewer"
    ] = 0.5,
) -> Iterator[Fault]:
    """A teacher that would be right if its classes had other names."""
    if found.first is None or not found.gain > sigmas * found.standard_error:
        return
    constant = (found.majority * (1 - found.majority) / found.items) ** 0.5
    if found.renamed <= found.majority + sigmas * constant:
        return
    if 1 - found.renamed > share * (1 - found.accuracy):
        return
    yield Fault(
        f"the teacher is right on {found.accuracy:.0%} of {found.items} {found.split} labels, and "
        f"on {found.renamed:.0%} if its classes are renamed: its class {found.first} is what the "
        f"labels call {found.name}",
        subject="the order of classes",
        evidence={
            "seen": f"right on {found.accuracy:.1%}",
            "expected": f"right on {found.renamed:.1%}, its classes in the labels' order",
            "gain": found.gain,
            "standard_error": found.standard_error,
            "first": found.first,
        },
    )


# ------------------------------------------------------------------ the catalogue's objects

SPACES = Probe("compare teacher and student", "static", (TeacherSpace,), compare_spaces)
ORDER = Probe("rename the teacher's classes", "probe", (TeacherOrder,), measure_order)

TEACHER_MISMATCH = Check(
    name="teacher-mismatch",
    stage="tune",
    severity="error",
    moments=("static", "probe"),
    why="Output i of the teacher is matched with output i of the student, whatever they mean.",
    fix="student.config.id2label = teacher.config.id2label  # before the labels are encoded",
    source="Hinton et al. 2015; reports of padded vocabularies in TRL's tracker, 2024",
    unsure="Padded vocabularies of one tokenizer may be cut on purpose (distill_vocabulary='cut').",
    judges=(judge_space, judge_order),
)
