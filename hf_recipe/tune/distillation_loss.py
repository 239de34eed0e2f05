"""The loss of distillation, dense and in chunks of rows.

Distilling is matching the teacher's distribution, softened by a temperature (Hinton et al. 2015);
`divergences` has the four ways to measure the distance.

Plain autograd keeps five to ten tensors of (rows, vocabulary) alive. Here each kind's gradient is
known in closed form, so it is computed in the forward pass, in place, one chunk of rows at a time;
rows without a label are left out before the first multiplication. What stays is the gradient of
the hidden states and of the head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hf_recipe.tune.divergences import KINDS, Head, Objective, hard_rows, soft_rows

__all__ = ["KINDS", "Head", "Objective", "chunked_divergence", "chunked_loss", "divergence"]

Vocabulary = Literal["error", "cut"]

# Logits held at once, in elements: 16 MiB in float32 on a CPU, where a chunk should stay near the
# cache; 256 MiB on an accelerator, where a matrix product needs rows to be busy. Judgement.
CHUNK_ELEMENTS = {"cpu": 2**22}
CHUNK_ELEMENTS_ELSEWHERE = 2**26


@dataclass(frozen=True)
class _Task:
    """What the chunked function needs besides its tensors."""

    objective: Objective
    student: Head
    teacher: Head
    chunk_rows: int
    ignore_index: int
    operand: torch.dtype
    compute: torch.dtype
    wants: tuple[bool, bool, bool] = (False, False, False)


def _chunked(
    task: _Task, tensors: tuple[Any, ...], divisor: Tensor
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    """The loss, its two terms, and the gradients of hidden states, weight and bias."""
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, labels = tensors
    supervised = (labels != task.ignore_index).nonzero().squeeze(-1)
    wide, objective = task.compute, task.objective
    totals = torch.zeros(2, dtype=wide, device=hidden.device)
    gradients: list[Tensor | None] = [
        torch.zeros_like(tensor, dtype=wide if tensor.element_size() < 4 else tensor.dtype)
        if wanted and tensor is not None
        else None
        for tensor, wanted in zip((hidden, weight, bias), task.wants, strict=True)
    ]
    own, other = weight.to(task.operand), teacher_weight.to(task.operand)
    bounded = any(b is not None and bool(b.isinf().any()) for b in (bias, teacher_bias))
    bias = bias if bias is None else bias.to(task.operand)
    teacher_bias = teacher_bias if teacher_bias is None else teacher_bias.to(task.operand)
    for rows in torch.split(supervised, task.chunk_rows):
        states = hidden[rows].to(task.operand)
        z = task.student.logits(states, own, bias, wide)
        slope = task.student.slope(z) if any(task.wants) else None
        hard = z.clone() if objective.hard else None
        t = task.teacher.logits(teacher_hidden[rows].to(task.operand), other, teacher_bias, wide)
        values, gradient = soft_rows(z, t, objective, bounded)
        del z, t
        totals[0] += values.sum()
        if objective.soft != 1.0:
            gradient.mul_(objective.soft)
        if hard is not None:
            values, hard_gradient = hard_rows(hard, labels[rows], objective.smoothing)
            totals[1] += values.sum()
            gradient.add_(hard_gradient, alpha=objective.hard)
            del hard, hard_gradient
        if any(task.wants):
            if slope is not None:
                gradient.mul_(slope)
            gradient.mul_(task.student.scale / divisor)
            _collect(gradients, gradient, states, own, rows)
        del gradient
    totals = totals / divisor
    loss = objective.soft * totals[0] + objective.hard * totals[1]
    return loss, totals[0], totals[1], gradients


def _collect(
    gradients: list[Tensor | None], by_logits: Tensor, states: Tensor, weight: Tensor, rows: Tensor
) -> None:
    """Add one chunk's share to the gradients of hidden states, weight and bias."""
    by_hidden, by_weight, by_bias = gradients
    if by_bias is not None:
        by_bias += by_logits.sum(0)
    narrow = by_logits.to(weight.dtype)
    if by_hidden is not None:
        by_hidden[rows] = (narrow @ weight).to(by_hidden.dtype)
    if by_weight is not None:
        if by_weight.dtype == narrow.dtype:
            by_weight.addmm_(narrow.T, states)
        else:
            by_weight += narrow.T @ states


class _ChunkedLoss(torch.autograd.Function):
    """The gradient is ready when the forward is; backward hands it over, scaled in place."""

    @staticmethod
    def forward(ctx: Any, task: _Task, divisor: Tensor, *tensors: Tensor | None) -> Any:
        with torch.autocast(device_type=divisor.device.type, enabled=False):
            loss, soft, hard, gradients = _chunked(task, tensors, divisor)
        if any(task.wants):
            ctx.save_for_backward(*tensors)
            ctx.task, ctx.divisor, ctx.gradients = task, divisor, gradients
        ctx.mark_non_differentiable(soft, hard)
        return loss, soft, hard

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        tensors = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # a second backward over a retained graph: the first one took them
            with torch.no_grad():
                gradients = _chunked(ctx.task, tensors, ctx.divisor)[3]
        scaled = [
            None if g is None else g.mul_(outer[0]).to(source.dtype)
            for g, source in zip(gradients, tensors, strict=False)
        ]
        del gradients
        return (None, None, *scaled, None, None, None, None)


def chunked_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    *,
    objective: Objective,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_head: Head | None = None,
    teacher_head: Head | None = None,
    chunk_rows: int | None = None,
    num_items: Tensor | float | None = None,
    ignore_index: int = -100,
    vocabulary: Vocabulary = "error",
) -> tuple[Tensor, Tensor, Tensor]:
    """``soft * divergence + hard * cross-entropy`` from hidden states, in chunks of rows.

    Args are those of `chunked_divergence`; the weights of the two terms are the objective's.

    Returns:
        The loss, and the divergence and cross-entropy by themselves (without gradient).
    """
    _check_shapes(student_hidden, student_weight, teacher_hidden, teacher_weight, labels)
    shared = shared_classes(student_weight.shape[0], teacher_weight.shape[0], vocabulary)
    if shared < student_weight.shape[0]:
        student_weight = student_weight[:shared]
        student_bias = None if student_bias is None else student_bias[:shared]
    teacher_bias = None if teacher_bias is None else teacher_bias[:shared]
    chunk_rows = (
        rows_of_a_chunk(shared, student_hidden.device) if chunk_rows is None else chunk_rows
    )
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1; got {chunk_rows}")
    device = student_hidden.device
    operand = student_weight.dtype
    if torch.is_autocast_enabled(device.type):
        operand = torch.get_autocast_dtype(device.type)
    compute = torch.promote_types(student_weight.dtype, torch.float32)
    labels = labels.reshape(-1).to(device)
    if num_items is None:
        divisor = (labels != ignore_index).sum().clamp(min=1).to(compute)
    else:
        divisor = torch.as_tensor(num_items, device=device).to(compute).clamp(min=1e-30)
    trained = (student_hidden, student_weight, student_bias)
    wants = torch.is_grad_enabled()
    task = _Task(
        objective=objective,
        student=student_head or Head(),
        teacher=teacher_head or student_head or Head(),
        chunk_rows=chunk_rows,
        ignore_index=ignore_index,
        operand=operand,
        compute=compute,
        wants=tuple(wants and t is not None and t.requires_grad for t in trained),  # type: ignore[arg-type]
    )
    loss, soft, hard = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        task,
        divisor,
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        student_weight,
        student_bias,
        teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]).to(device),
        teacher_weight[:shared].detach().to(device),
        None if teacher_bias is None else teacher_bias.detach().to(device),
        labels,
    )
    return loss, soft, hard


def chunked_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    *,
    kind: str = "forward_kl",
    temperature: float = 1.0,
    chunk_rows: int | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    num_items: Tensor | float | None = None,
    ignore_index: int = -100,
    beta: float = 0.5,
    skew: float = 0.1,
    teacher_head: Head | None = None,
    vocabulary: Vocabulary = "error",
) -> Tensor:
    """The divergence of student and teacher without any (rows, vocabulary) tensor.

    Gradients go to `student_hidden`, `student_weight` and `student_bias`. Logits are softened in
    float32 (float64 for float64 weights), whatever the dtype of the weights.

    Args:
        student_hidden, teacher_hidden: (rows, width) or (batch, length, width), what each head is
            given; the two widths may differ.
        student_weight, teacher_weight: (vocabulary, width).
        labels: (rows,) or (batch, length), aligned with the rows: whoever calls shifts. Only
            ``labels != ignore_index`` counts.
        kind: "forward_kl", "reverse_kl", "jsd" or "skewed_kl"; see the module.
        temperature: T; the divergence is multiplied by T^2.
        chunk_rows: rows whose logits are held at once; default: by the size of the vocabulary.
        student_bias, teacher_bias: (vocabulary,).
        logit_scale, softcap: what the model does to its head's output; see `Head`.
        num_items: divide the sum over rows by this; default: by the supervised rows.
        beta, skew: the teacher's share in the mixture of "jsd" and of "skewed_kl".
        teacher_head: the teacher's scale and cap, where they are not the student's.
        vocabulary: what to do where the two sizes differ: "error", or "cut" both to the shared
            first entries and renormalise.

    Returns:
        A scalar in nats; 0 with a live graph where no row is supervised.

    Raises:
        ValueError: a shape, kind, temperature or vocabulary size that does not fit.
    """
    return chunked_loss(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        labels,
        objective=Objective(kind, temperature, beta=beta, skew=skew),
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        student_head=Head(logit_scale, softcap),
        teacher_head=teacher_head,
        chunk_rows=chunk_rows,
        num_items=num_items,
        ignore_index=ignore_index,
        vocabulary=vocabulary,
    )[0]


class _DenseDivergence(torch.autograd.Function):
    """The same arithmetic on logits that are there anyway."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, divisor: Tensor, objective: Objective
    ) -> Tensor:
        compute = divisor.dtype
        values, gradient = soft_rows(
            student.to(compute, copy=True), teacher.to(compute, copy=True), objective, bounded=True
        )
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(gradient.div_(divisor).to(student.dtype))
        return values.sum() / divisor

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient.dtype), None, None, None


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    kind: str = "forward_kl",
    temperature: float = 1.0,
    num_items: Tensor | float | None = None,
    beta: float = 0.5,
    skew: float = 0.1,
    vocabulary: Vocabulary = "error",
) -> Tensor:
    """The divergence of student and teacher from their logits.

    Args:
        student_logits, teacher_logits: (..., classes); minus infinity rules a class out.
        mask: (...), True where a row counts; default: everywhere.
        num_items: divide the sum over rows by this; default: by the rows that count.

    Returns:
        A scalar in nats, times T^2; 0 with a live graph where no row counts. The gradient goes
        to `student_logits` alone.

    Raises:
        ValueError: shapes that differ (classes too, unless ``vocabulary="cut"``).
    """
    objective = Objective(kind, temperature, beta=beta, skew=skew)
    if student_logits.shape[:-1] != teacher_logits.shape[:-1]:
        raise ValueError(
            f"student and teacher logits must agree in all axes but the last; got "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    shared = shared_classes(student_logits.shape[-1], teacher_logits.shape[-1], vocabulary)
    student = student_logits[..., :shared].reshape(-1, shared)
    teacher = teacher_logits[..., :shared].detach().reshape(-1, shared).to(student.device)
    if mask is not None:
        rows = mask.reshape(-1).to(student.device).nonzero().squeeze(-1)
        student, teacher = student[rows], teacher[rows]
    compute = torch.promote_types(student.dtype, torch.float32)
    items = max(student.shape[0], 1) if num_items is None else num_items
    divisor = torch.as_tensor(items, device=student.device).to(compute)
    value: Tensor = _DenseDivergence.apply(student, teacher, divisor, objective)  # type: ignore[no-untyped-call]
    return value


def bernoulli_divergence(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None, **options: Any
) -> Tensor:
    """`divergence` of independent yes-or-no outputs (multi-label heads), mean over outputs.

    Args:
        student_logits, teacher_logits: (rows, outputs), as a sigmoid takes them.
        mask: (rows,).
        options: those of `divergence`; ``num_items`` counts rows.
    """
    outputs = student_logits.shape[-1]
    if teacher_logits.shape[-1] != outputs:
        shared_classes(outputs, teacher_logits.shape[-1], "error")
    pairs = [
        torch.stack([x, torch.zeros_like(x)], dim=-1) for x in (student_logits, teacher_logits)
    ]
    wide = None if mask is None else mask.unsqueeze(-1).expand(student_logits.shape)
    if options.get("num_items") is not None:
        options["num_items"] = options["num_items"] * outputs
    return divergence(pairs[0], pairs[1], wide, **options)


def standardized(logits: Tensor) -> Tensor:
    """Each row's logits at mean 0 and standard deviation 1: the shape alone is distilled.

    Source: Sun et al. 2024, logit standardization in knowledge distillation.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    return centred / (centred.std(-1, keepdim=True, unbiased=False) + 1e-7)


def mixture_logits(logits: list[Tensor], weights: list[float] | None = None) -> Tensor:
    """Logits of the mean of several teachers' probabilities: (..., classes).

    Probabilities are averaged, not logits, whose mean is another, sharper distribution.
    `weights` are normalised to sum to 1.
    """
    if not logits:
        raise ValueError("mixture_logits needs at least one teacher's logits")
    if len(logits) == 1:
        return logits[0]
    shares = weights or [1.0] * len(logits)
    if len(shares) != len(logits) or min(shares) < 0 or not sum(shares) > 0:
        raise ValueError(f"{len(logits)} teachers need as many weights >= 0; got {shares}")
    total = sum(shares)
    terms = [
        torch.log_softmax(x.float(), dim=-1) + math.log(share / total)
        for x, share in zip(logits, shares, strict=True)
        if share > 0
    ]
    return torch.logsumexp(torch.stack(terms), dim=0)


def shared_classes(student: int, teacher: int, vocabulary: str) -> int:
    """How many classes the two have in common; raises where they differ and may not be cut."""
    if vocabulary not in get_args(Vocabulary):
        raise ValueError(f"vocabulary must be 'error' or 'cut'; got {vocabulary!r}")
    if student != teacher and vocabulary == "error":
        raise ValueError(
            f"the student has {student} classes and the teacher {teacher}. If the first "
            f"{min(student, teacher)} mean the same (padded vocabularies), pass vocabulary='cut'"
        )
    return min(student, teacher)


def rows_of_a_chunk(vocabulary: int, device: torch.device) -> int:
    """How many rows of logits are held at once, by the size of the vocabulary."""
    elements = CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS_ELSEWHERE)
    return max(1, elements // max(1, vocabulary))


def _check_shapes(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
) -> None:
    for who, hidden, weight in (
        ("student", student_hidden, student_weight),
        ("teacher", teacher_hidden, teacher_weight),
    ):
        if weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"{who}_weight must be (vocabulary, {hidden.shape[-1]}) for hidden states of that "
                f"width; got {tuple(weight.shape)}"
            )
        if hidden.shape[:-1] != labels.shape:
            raise ValueError(
                f"labels {tuple(labels.shape)} must be aligned with {who}_hidden's rows "
                f"{tuple(hidden.shape[:-1])}"
            )
