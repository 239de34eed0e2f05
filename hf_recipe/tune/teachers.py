"""Who is the teacher, and does it stand still?

A teacher answers in evaluation mode, gets no gradients and is in no optimizer. That is seen from
outside, by what the Trainer's own loss does: a Trainer subclass of one's own, with its teacher as
an attribute, beside it in the script or inside its model, is checked as `DistillationTrainer` is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, ValuesView
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.held_modules import held_teachers
from hf_recipe.instruments.subject import Subject
from hf_recipe.tune import distillation_models as models

ROWS = 8


def teachers_of(subject: Subject) -> list[nn.Module]:
    """The teachers that the Trainer holds; raises Skip where there is none."""
    found = held_teachers(subject.trainer, subject.model)
    if not found:
        raise Skip("there is no teacher: nothing is distilled")
    return found


@dataclass(frozen=True)
class TeacherState(Measurement):
    """How a teacher stood when the Trainer's own training loss asked it.

    Attributes:
        teacher: which one, from 0.
        asked: how often the loss of one batch called it.
        noisy: modules that draw at random or update statistics, in training mode at that time;
            1 where there are none, and yet two passes over the same rows differ.
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
        parameters = [p for p in teacher.parameters() if p.requires_grad]
        subject.model.train()
        with _heard(teacher) as calls:
            loss = training_loss(subject, batch.inputs)
        reached = 0
        if parameters and loss.requires_grad:
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            reached = sum(g is not None for g in gradients)
        yield TeacherState(
            teacher=index,
            asked=len(calls),
            noisy=max((call.noisy for call in calls), default=0),
            recording=any(call.recording for call in calls),
            gradients=reached,
            optimized=sum(id(p) in optimized for p in teacher.parameters()),
        )


@dataclass(frozen=True)
class _Call:
    noisy: int
    recording: bool


@contextmanager
def _heard(teacher: nn.Module) -> Iterator[list[_Call]]:
    """How the teacher stands whenever it is asked."""
    calls: list[_Call] = []

    def note(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        noisy = sum(m.training and isinstance(m, NOISY) and _draws(m) for m in module.modules())
        if module.training and not noisy:
            noisy = int(_differs(module, arguments, named))
        asking = any(p.requires_grad for p in module.parameters())
        calls.append(_Call(noisy, torch.is_grad_enabled() and asking))

    handle = teacher.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def _differs(module: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> bool:
    """Whether two passes over the same inputs give different numbers (noise without a module)."""
    with torch.no_grad():  # by `forward`, not through the module's hooks, of which one is at work
        first, second = (_numbers(module.forward(*arguments, **named)) for _ in range(2))
    return any(not torch.equal(a, b) for a, b in zip(first, second, strict=False))


def _numbers(outputs: Any) -> list[Tensor]:
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    values = values if isinstance(values, (tuple, list, ValuesView)) else [values]
    return [v for v in values if isinstance(v, Tensor)]


def training_loss(subject: Subject, inputs: Mapping[str, Any]) -> Tensor:
    """The Trainer's training loss; raises Skip where teacher and student cannot be compared."""
    try:
        loss: Tensor = subject.compute_loss(inputs)
    except models.SpacesDiffer as error:
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

STATES = Probe("watch the teacher", "probe", (TeacherState,), watch_teachers)

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
