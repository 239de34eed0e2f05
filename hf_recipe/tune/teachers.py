"""Is the teacher one? What goes wrong between a teacher and its student, before step 1.

Distilling needs a teacher that means the same by its outputs (label space, order, vocabulary),
that stands still (evaluation mode, no gradients, not in the optimizer), and a loss in which both
teacher and labels are heard. The second and third are seen from outside, by what the Trainer's
own loss does: a Trainer subclass of one's own, with its teacher as an attribute, is checked in
the same way as `DistillationTrainer`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from hf_recipe.core.check import Check, Measurement, Probe, Skip, private
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.batches import Batch
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
    batch = subject.batch(size=ROWS)
    held = subject.optimizer.param_groups if subject.optimizer is not None else []
    optimized = {id(p) for group in held for p in group["params"]}
    for index, teacher in enumerate(teachers_of(subject)):
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
            loss = _loss(subject, batch.inputs)
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


def _loss(subject: Subject, inputs: Mapping[str, Any]) -> Tensor:
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


# ------------------------------------------------------------------ distillation-idle


@dataclass(frozen=True)
class TermWeights(Measurement):
    """How far the gradient of one batch moves when what a term listens to is dealt anew.

    Attributes:
        soft: norm of the change when each row is given another row's teacher.
        hard: norm of the change when the labels are dealt anew among the labelled items; None
            where there are fewer than two different labels.
        alpha: the weight of the teacher, as declared; None: not declared.
        rows: rows of the batch.
    """

    soft: float
    hard: float | None
    alpha: float | None
    rows: int


def weigh_terms(subject: Subject) -> Iterator[TermWeights]:
    """Deal teachers, then labels, anew and see how much the training gradient changes."""
    teachers = teachers_of(subject)
    batch = subject.batch(size=ROWS)
    rows = len(batch)
    if rows < 2:
        raise Skip("a batch of one row has no other row's teacher to compare with")
    subject.model.train()
    parameters = _last_parameters(subject.model)
    base = _gradient(subject, batch.inputs, parameters)
    with _rolled(teachers, rows):
        other = _gradient(subject, batch.inputs, parameters)
    dealt = _dealt(batch)
    hard = None
    if dealt is not None:
        hard = float((_gradient(subject, dealt, parameters) - base).norm())
    yield TermWeights(
        soft=float((other - base).norm()),
        hard=hard,
        alpha=vars(subject.args).get("alpha"),
        rows=rows,
    )


def _last_parameters(
    model: nn.Module, tensors: int = 4, largest: int = 2**22
) -> list[nn.Parameter]:
    """A few trainable tensors near the output, where each term's gradient arrives unweakened."""
    trained = [p for p in model.parameters() if p.requires_grad and p.numel() <= largest]
    if not trained:
        raise Skip("the student has no trainable parameter of a size that can be compared")
    return trained[-tensors:]


def _gradient(subject: Subject, inputs: Mapping[str, Any], parameters: Sequence[Tensor]) -> Tensor:
    torch.manual_seed(0)  # the same dropout each time; the guard puts the run's own state back
    loss = _loss(subject, inputs)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    flat = [
        (torch.zeros_like(p) if g is None else g).float().flatten()
        for p, g in zip(parameters, gradients, strict=True)
    ]
    return torch.cat(flat)


@contextmanager
def _rolled(teachers: Iterable[nn.Module], rows: int) -> Iterator[None]:
    """Each teacher answers for the row before the one it is asked about."""

    def roll(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        def one(value: Any) -> Any:
            whole = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == rows
            return value.roll(1, 0) if whole else value

        return tuple(one(v) for v in arguments), {k: one(v) for k, v in named.items()}

    handles = [t.register_forward_pre_hook(roll, with_kwargs=True) for t in teachers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _dealt(batch: Batch) -> dict[str, Any] | None:
    """The batch with its labels dealt anew, at the same positions; None where that is no change."""
    dealt, changed = dict(batch.inputs), False
    for name in ("labels", "label", "label_ids", "start_positions", "end_positions"):
        labels = dealt.get(name)
        if not isinstance(labels, Tensor) or labels.numel() == 0:
            continue
        if labels.is_floating_point():
            dealt[name] = labels.roll(1, 0)
        else:
            kept = labels != heads.IGNORED
            dealt[name] = labels.masked_scatter(kept, labels[kept].roll(1))
        changed |= not torch.equal(dealt[name], labels)
    return dealt if changed else None


def judge_weights(
    weights: TermWeights,
    *,
    least: Annotated[
        float, "judgement: a term of 2 % of the other's gradient is under a batch's own noise"
    ] = 0.02,
) -> Iterator[Fault]:
    """A term whose share of the gradient is next to nothing."""
    if weights.hard is None:
        if not weights.soft > 0:
            yield _idle("the teacher", weights, "warning")
        return
    if not weights.soft > least * weights.hard:
        yield _idle("the teacher", weights, "warning")
    elif not weights.hard > least * weights.soft:  # teaching without labels can be meant
        yield _idle("the labels", weights, "note")


def _idle(who: str, weights: TermWeights, severity: Any) -> Fault:
    declared = "" if weights.alpha is None else f" (alpha={weights.alpha:g})"
    return Fault(
        f"{who} hardly moves the student{declared}: dealt anew over {weights.rows} rows, the "
        f"teacher changes the gradient by {weights.soft:.3g} and the labels by "
        + ("none" if weights.hard is None else f"{weights.hard:.3g}"),
        subject=who,
        severity=severity,
        evidence={
            "seen": f"{who} next to nothing",
            "expected": "both terms heard",
            "soft": weights.soft,
            "hard": weights.hard,
        },
    )


# ------------------------------------------------------------------ the catalogue's objects

SPACES = Probe("compare teacher and student", "static", (TeacherSpace,), compare_spaces)
STATES = Probe("watch the teacher", "probe", (TeacherState,), watch_teachers)
WEIGHTS = Probe("weigh the loss's terms", "probe", (TermWeights,), weigh_terms)

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
)
DISTILLATION_IDLE = Check(
    name="distillation-idle",
    stage="tune",
    severity="warning",
    moments=("probe",),
    why="A term of next to no weight teaches nothing: alpha, the T^2, or a mean over classes.",
    fix="soft = F.kl_div(log_q, p, reduction='batchmean') * temperature**2",
    source="Hinton et al. 2015, section 2: the T^2",
    unsure="alpha = 1, teaching without labels, can be meant: a note. Teachers that hardly tell "
    "rows apart, such as untrained ones, look idle.",
    judges=(judge_weights,),
)
