"""Is the teacher one? What goes wrong between a teacher and its student, before step 1.

Distilling needs a teacher that means the same by its outputs (label space, order, vocabulary),
and that stands still (evaluation mode, no gradients, not in the optimizer). The latter is seen
from outside, by what the Trainer's own loss does: a Trainer subclass of one's own, with its
teacher as an attribute, is checked in the same way as `DistillationTrainer`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_recipe.core.check import Check, Measurement, Probe, Skip, private
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.subject import Subject
from hf_recipe.tune import distillation_heads as heads

NAMES = ("teachers", "teacher", "teacher_model")
ROWS = 8


def teachers_of(subject: Subject) -> list[nn.Module]:
    """The teachers that the Trainer holds; raises Skip where there is none."""
    found: list[nn.Module] = []
    for name in NAMES:
        held = vars(subject.trainer).get(name) if subject.trainer is not None else None
        for item in held if isinstance(held, (list, tuple)) else [held]:
            if isinstance(item, nn.Module) and not any(item is other for other in found):
                found.append(item)
    if not found:
        raise Skip("there is no teacher: nothing is distilled")
    return found


# ------------------------------------------------------------------ teacher-mismatch


@dataclass(frozen=True)
class TeacherSpace(Measurement):
    """What the outputs of a student and one of its teachers stand for.

    Attributes:
        teacher: which one, from 0.
        student_size, teacher_size: classes or vocabulary entries; None: the config does not tell.
        first: first class of another name, where both have the same names in another order.
        first_token: first id that the two tokenizers give to different tokens; None: none, or a
            tokenizer is not known.
        cut: the Trainer was told to cut both to the shared classes.
        names: the student's and the teacher's name of that class or token.
    """

    teacher: int
    student_size: int | None
    teacher_size: int | None
    first: int | None = None
    first_token: int | None = None
    cut: bool = False
    names: tuple[str, ...] = private(default=())


def compare_spaces(subject: Subject) -> Iterator[TeacherSpace]:
    """Compare the label spaces and tokenizers of the student and each teacher."""
    trainer = subject.trainer
    for index, teacher in enumerate(teachers_of(subject)):
        student, args = subject.model, subject.args
        try:
            batch = subject.batch(size=2).inputs
        except Skip:  # a stream: the classes and configs tell nearly as much
            batch = {}
        ours = heads.space_of(student, heads.task_of(student, batch))
        theirs = heads.space_of(teacher, heads.task_of(teacher, batch))
        first = token = None
        names: tuple[str, ...] = ()
        if ours is not None and theirs is not None:
            first = heads.first_difference(ours.names, theirs.names)
            if first is not None:
                names = (ours.names[first], theirs.names[first])
        known = (subject.processing_class, vars(trainer).get("teacher_processing_class"))
        if all(hasattr(tokenizer, "get_vocab") for tokenizer in known):
            token = heads.first_other_token(*known)
        yield TeacherSpace(
            teacher=index,
            student_size=ours.size if ours else None,
            teacher_size=theirs.size if theirs else None,
            first=first,
            first_token=token,
            cut=vars(args).get("distill_vocabulary") == "cut",
            names=names,
        )


def judge_space(space: TeacherSpace) -> Iterator[Fault]:
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


# ------------------------------------------------------------------ teacher-trains


@dataclass(frozen=True)
class TeacherState(Measurement):
    """How a teacher stood when the Trainer's own training loss asked it.

    Attributes:
        teacher: which one, from 0.
        asked: how often the loss of one batch called it.
        noisy: modules that draw at random or update statistics, in training mode at that time.
        recording: it was called with gradient recording on and parameters that ask for gradients.
        gradients: its parameters that the loss's backward pass reached.
        optimized: its parameters that the optimizer holds.
    """

    teacher: int
    asked: int
    noisy: int
    recording: bool
    gradients: int
    optimized: int


NOISY = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)


def watch_teachers(subject: Subject) -> Iterator[TeacherState]:
    """Compute the training loss of one batch and note how each teacher stands meanwhile."""
    teachers = teachers_of(subject)
    batch = subject.batch(size=ROWS)
    held = subject.optimizer.param_groups if subject.optimizer is not None else []
    optimized = {id(p) for group in held for p in group["params"]}
    for index, teacher in enumerate(teachers):
        calls: list[tuple[int, bool]] = []

        def note(module: nn.Module, *_: Any, calls: list[tuple[int, bool]] = calls) -> None:
            parts = module.modules()
            noisy = sum(m.training and isinstance(m, NOISY) and _draws(m) for m in parts)
            recording = torch.is_grad_enabled() and any(
                p.requires_grad for p in module.parameters()
            )
            calls.append((noisy, recording))

        parameters = [p for p in teacher.parameters() if p.requires_grad]
        handle = teacher.register_forward_pre_hook(note)
        try:
            subject.model.train()
            loss = training_loss(subject, batch.inputs)
        finally:
            handle.remove()
        reached = 0
        if parameters and loss.requires_grad:
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            reached = sum(g is not None for g in gradients)
        yield TeacherState(
            teacher=index,
            asked=len(calls),
            noisy=max((noisy for noisy, _ in calls), default=0),
            recording=any(recording for _, recording in calls),
            gradients=reached,
            optimized=sum(id(p) in optimized for p in teacher.parameters()),
        )


def training_loss(subject: Subject, inputs: Mapping[str, Any]) -> Tensor:
    """The Trainer's training loss; raises Skip where teacher and student cannot be compared."""
    try:
        loss: Tensor = subject.compute_loss(inputs)
    except heads.SpacesDiffer as error:
        raise Skip(f"there is no loss to look at: {error}") from None
    return loss


def _draws(module: nn.Module) -> bool:
    rate = vars(module).get("p")
    return rate is None or rate > 0


def judge_state(state: TeacherState) -> Iterator[Fault]:
    """A teacher that draws noise, gets gradients, or is itself trained."""
    said = [
        (state.noisy, f"{state.noisy} of its modules draw noise or update statistics"),
        (state.gradients, f"{state.gradients} of its parameters get gradients from the loss"),
        (state.optimized, f"{state.optimized} of its parameters are in the optimizer"),
    ]
    reasons = [text for count, text in said if count > 0]
    if reasons:
        yield Fault(
            "the teacher does not stand still while the student trains: " + "; ".join(reasons),
            subject=f"teacher {state.teacher}",
            evidence={
                "seen": ", ".join(reasons),
                "expected": "evaluation mode, no gradients, not in the optimizer",
                "noisy": state.noisy,
                "gradients": state.gradients,
                "optimized": state.optimized,
            },
        )


# ------------------------------------------------------------------ the catalogue's objects

SPACES = Probe("compare teacher and student", "static", (TeacherSpace,), compare_spaces)
STATES = Probe("watch the teacher", "probe", (TeacherState,), watch_teachers)

TEACHER_MISMATCH = Check(
    name="teacher-mismatch",
    stage="tune",
    severity="error",
    moments=("static",),
    why="Output i of the teacher is matched with output i of the student, whatever they mean.",
    fix="student.config.id2label = teacher.config.id2label  # before the labels are encoded",
    source="Hinton et al. 2015; reports of padded vocabularies in TRL's tracker, 2024",
    unsure="Padded vocabularies of one tokenizer may be cut on purpose (distill_vocabulary='cut').",
    judges=(judge_space,),
)
TEACHER_TRAINS = Check(
    name="teacher-trains",
    stage="tune",
    severity="error",
    moments=("probe",),
    why="A teacher with dropout on, or that learns too, gives the student a moving, noisy target.",
    fix="teacher.requires_grad_(False).eval()",
    source="Hinton et al. 2015",
    unsure="Mutual learning and online distillation train the teacher on purpose.",
    judges=(judge_state,),
    explains=("eval-nondeterministic",),
)
