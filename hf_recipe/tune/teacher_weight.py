"""Is anybody listening? The weight of the teacher and of the labels in the student's gradient.

With alpha at an end, T^2 forgotten, or a mean over classes where a sum was meant, one of the two
terms of the loss is silent and training looks as it always does. Seen from outside: if each row
is given another row's teacher, or another row's label, the gradient must move.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.batches import Batch
from hf_recipe.instruments.subject import Subject
from hf_recipe.tune import distillation_heads as heads
from hf_recipe.tune.teachers import ROWS, teachers_of, training_loss


@dataclass(frozen=True)
class TermWeights(Measurement):
    """How far the gradient of one batch moves when what a term listens to is dealt anew.

    Attributes:
        soft: norm of the change when each row is given another row's teacher.
        hard: norm of the change when the labels are dealt anew among the labelled items; None
            where there are fewer than two different labels.
        alpha: the weight of the teacher, as declared; None: not declared.
        rows: rows of the batch.
        averaged: classes over which a `kl_div` of the loss takes its mean, besides the rows; 0:
            none does.
    """

    soft: float
    hard: float | None
    alpha: float | None
    rows: int
    averaged: int = 0


class _Divergences(TorchFunctionMode):
    """Notes the largest number of classes that a `kl_div` of the loss averages over."""

    def __init__(self) -> None:
        super().__init__()
        self.averaged = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        if func is functional.kl_div and named.get("reduction", "mean") == "mean":
            first = args[0] if args else named.get("input")
            if isinstance(first, Tensor) and first.ndim > 1 and len(args) < 5:
                self.averaged = max(self.averaged, first.shape[-1])
        return func(*args, **named)


def weigh_terms(subject: Subject) -> Iterator[TermWeights]:
    """Deal teachers, then labels, anew and see how much the training gradient changes."""
    teachers = teachers_of(subject)
    batch = subject.batch(size=ROWS)
    rows = len(batch)
    if rows < 2:
        raise Skip("a batch of one row has no other row's teacher to compare with")
    subject.model.train()
    parameters = _last_parameters(subject.model)
    with _Divergences() as divergences:
        base = _gradient(subject, batch.inputs, parameters)
    with _rolled(teachers, rows) as asked:
        other = _gradient(subject, batch.inputs, parameters)
    if not asked and any(_parts_called(teachers, subject, batch)):
        raise Skip("the loss asks parts of the teacher, which cannot be dealt anew as a whole")
    dealt = _dealt(batch)
    hard = None
    if dealt is not None:
        hard = float((_gradient(subject, dealt, parameters) - base).norm())
    yield TermWeights(
        soft=float((other - base).norm()),
        hard=hard,
        alpha=vars(subject.args).get("alpha"),
        rows=rows,
        averaged=divergences.averaged,
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
    loss = training_loss(subject, inputs)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    flat = [
        (torch.zeros_like(p) if g is None else g).float().flatten()
        for p, g in zip(parameters, gradients, strict=True)
    ]
    return torch.cat(flat)


def _parts_called(teachers: Iterable[nn.Module], subject: Subject, batch: Batch) -> list[int]:
    """The parts of the teachers that the loss calls."""
    called: list[int] = []
    handles = [
        part.register_forward_pre_hook(lambda module, arguments: called.append(id(module)))
        for teacher in teachers
        for part in teacher.modules()
    ]
    try:
        training_loss(subject, batch.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return called


@contextmanager
def _rolled(teachers: Iterable[nn.Module], rows: int) -> Iterator[list[int]]:
    """Each teacher answers for the row before the one it is asked about; yields who was asked."""
    asked: list[int] = []

    def roll(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        asked.append(id(module))

        def one(value: Any) -> Any:
            whole = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == rows
            return value.roll(1, 0) if whole else value

        return tuple(one(v) for v in arguments), {k: one(v) for k, v in named.items()}

    handles = [t.register_forward_pre_hook(roll, with_kwargs=True) for t in teachers]
    try:
        yield asked
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
    """A term whose share of the gradient is next to nothing, or is divided by the classes."""
    if weights.averaged > 1:
        yield Fault(
            f"kl_div takes its mean over {weights.averaged} classes as well as over the rows: the "
            f"teacher's term is 1/{weights.averaged} of the divergence that it is meant to be",
            subject="the teacher",
            evidence={
                "seen": "reduction='mean'",
                "expected": "reduction='batchmean'",
                "soft": weights.soft,
                "hard": weights.hard,
            },
        )
        return
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


WEIGHTS = Probe("weigh the loss's terms", "probe", (TermWeights,), weigh_terms)

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
