"""Is anybody listening? The weight of the teacher and of the labels in the student's gradient.

With alpha at an end, T^2 forgotten, or a mean over classes where a sum was meant, one of the two
terms of the loss is silent and training looks as it always does. Seen from outside: if each row
is given another row's teacher, or another row's label, the gradient must move; and where the loss
is made of torch's own `kl_div` and `cross_entropy`, what they are given, and how they are weighed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.batches import Batch
from hf_recipe.instruments.subject import Subject
from hf_recipe.tune import distillation_heads as heads
from hf_recipe.tune.loss_parts import LossParts
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
        misgiven: "input" or "target" where a `kl_div` is given no (log-)probabilities there.
        temperature, kl_weight, entropy_weight: T of the student's part of the loss's only
            `kl_div`, and the factors of this and of its only `cross_entropy` in the loss; None:
            the loss is made otherwise.
    """

    soft: float
    hard: float | None
    alpha: float | None
    rows: int
    averaged: int = 0
    misgiven: str = ""
    temperature: float | None = None
    kl_weight: float | None = None
    entropy_weight: float | None = None


def weigh_terms(subject: Subject) -> Iterator[TermWeights]:
    """Deal teachers, then labels, anew and see how much the training gradient changes."""
    teachers = teachers_of(subject)
    batch = subject.batch(size=ROWS)
    rows = len(batch)
    if rows < 2:
        raise Skip("a batch of one row has no other row's teacher to compare with")
    subject.model.train()
    parameters = _last_parameters(subject.model)
    parts = LossParts()
    with parts.watching(subject.model):
        loss = _loss(subject, batch.inputs)
    made = parts.weights(loss)
    base = _gradient(loss, parameters)
    with _rolled(teachers, rows) as asked:
        other = _gradient(_loss(subject, batch.inputs), parameters)
    if not asked and _parts_called(teachers, subject, batch):
        raise Skip("the loss asks parts of the teacher, which cannot be dealt anew as a whole")
    dealt = _dealt(batch)
    hard = None
    if dealt is not None:
        hard = float((_gradient(_loss(subject, dealt), parameters) - base).norm())
    yield TermWeights(
        soft=float((other - base).norm()),
        hard=hard,
        alpha=vars(subject.args).get("alpha"),
        rows=rows,
        averaged=parts.averaged,
        misgiven=parts.misgiven,
        **made,
    )


def _last_parameters(
    model: nn.Module, tensors: int = 4, largest: int = 2**22
) -> list[nn.Parameter]:
    """A few trainable tensors near the output, where each term's gradient arrives unweakened."""
    trained = [p for p in model.parameters() if p.requires_grad and p.numel() <= largest]
    if not trained:
        raise Skip("the student has no trainable parameter of a size that can be compared")
    return trained[-tensors:]


def _loss(subject: Subject, inputs: Mapping[str, Any]) -> Tensor:
    torch.manual_seed(0)  # the same dropout each time; the guard puts the run's own state back
    return training_loss(subject, inputs)


def _gradient(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
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
        _loss(subject, batch.inputs)
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
    hot: Annotated[float, "judgement: below, T^2 is 1.44 at most"] = 1.2,
) -> Iterator[Fault]:
    """A term whose share of the gradient is next to nothing, or is not what its weight says."""
    made = _misused(weights, hot)
    if made is not None:
        yield made
        return
    if weights.hard is None:
        if not weights.soft > 0:
            yield _idle("the teacher", weights, "warning")
        return
    if not weights.soft > least * weights.hard:
        yield _idle("the teacher", weights, "warning")
    elif not weights.hard > least * weights.soft:  # teaching without labels can be meant
        yield _idle("the labels", weights, "note")


def _misused(weights: TermWeights, hot: float) -> Fault | None:
    """What is wrong with the `kl_div` of the loss by itself."""
    heat, soft, hard = weights.temperature, weights.kl_weight, weights.entropy_weight
    if weights.misgiven:
        said = f"kl_div's {weights.misgiven} holds no distributions: the teacher's term measures "
        said += "no distance to the teacher"
        seen, expected = f"{weights.misgiven} does not sum to 1", "kl_div(log_q, p)"
    elif weights.averaged > 1:
        said = f"kl_div takes its mean over {weights.averaged} classes as well as over the rows: "
        said += f"the teacher's term is 1/{weights.averaged} of the divergence that it is meant to "
        said += "be"
        seen, expected = "reduction='mean'", "reduction='batchmean'"
    elif heat is not None and soft is not None and hard is not None and heat > hot:
        if not (soft > 0 and hard > 0 and abs(soft + hard - 1) < 1e-3):
            return None  # two weights that make 1 are what they would be with T^2 outside of them
        said = f"the teacher's term is softened at T = {heat:.3g} and weighs {soft:.3g} beside the "
        said += f"labels' {hard:.3g}: without the factor T^2 its gradient is {heat**-2:.2g} of that"
        seen, expected = f"a factor of {soft:.3g}", f"{soft:.3g} * T^2 = {soft * heat**2:.3g}"
    else:
        return None
    evidence = {"seen": seen, "expected": expected, "soft": weights.soft, "hard": weights.hard}
    return Fault(said, subject="the teacher", evidence=evidence)


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
