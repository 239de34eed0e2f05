"""The loss of distillation, dense and in chunks of rows.

Distilling is matching the teacher's distribution, softened by a temperature (Hinton et al. 2015);
`divergences` has the four ways to measure the distance.

Plain autograd keeps five to ten tensors of (rows, vocabulary) alive. Here each kind's gradient is
known in closed form, so it is computed in the forward pass, in place, one chunk of rows at a time;
rows without a label are left out before the first multiplication. What stays is the gradient of
the hidden states and of the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_recipe.tune.divergences import (
    KINDS,
    Head,
    Objective,
    Vocabulary,
    bernoulli_divergence,
    divergence,
    hard_rows,
    mixture_logits,
    shared_classes,
    soft_rows,
    standardized,
)

__all__ = [
    "KINDS",
    "Head",
    "Objective",
    "bernoulli_divergence",
    "chunked_divergence",
    "chunked_loss",
    "divergence",
    "mixture_logits",
    "standardized",
]

# Logits held at once, in elements: 12 MiB in float32 on a CPU, where a chunk should stay near the
# cache; 256 MiB on an accelerator, where a matrix product needs rows to be busy. Judgement.
CHUNK_ELEMENTS = {"cpu": 3 * 2**20}
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
    # Two buffers for all chunks: what is asked for and freed by turns leaves holes in the heap.
    shape = (2, min(task.chunk_rows, len(supervised)), weight.shape[0])
    buffers = weight.new_empty(shape) if weight.dtype == task.operand == wide else None
    for rows in torch.split(supervised, task.chunk_rows):
        states = hidden[rows].to(task.operand)
        mine, theirs = (None, None) if buffers is None else buffers[:, : len(rows)]
        z = task.student.logits(states, own, bias, wide, mine)
        slope = task.student.slope(z) if any(task.wants) else None
        hard = z.clone() if objective.hard else None
        taught = teacher_hidden[rows].to(task.operand)
        t = task.teacher.logits(taught, other, teacher_bias, wide, theirs)
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
    student_hidden, student_weight, teacher_hidden, teacher_weight, labels = (
        torch.as_tensor(given)
        for given in (student_hidden, student_weight, teacher_hidden, teacher_weight, labels)
    )
    student_bias, teacher_bias = (
        None if bias is None else torch.as_tensor(bias) for bias in (student_bias, teacher_bias)
    )
    _check_shapes(student_hidden, student_weight, teacher_hidden, teacher_weight, labels)
    _check_bias("student", student_bias, student_weight)
    _check_bias("teacher", teacher_bias, teacher_weight)
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


def rows_of_a_chunk(vocabulary: int, device: torch.device) -> int:
    """How many rows of logits are held at once, by the size of the vocabulary."""
    elements = CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS_ELSEWHERE)
    return max(1, elements // max(1, vocabulary))


def _check_bias(who: str, bias: Tensor | None, weight: Tensor) -> None:
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{who}_bias must be ({weight.shape[0]},), one entry for each row of {who}_weight; "
            f"got {tuple(bias.shape)}"
        )


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
        if weight.ndim != 2 or not hidden.ndim or hidden.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"{who}_weight must be (vocabulary, width) for hidden states (..., width); got "
                f"{tuple(weight.shape)} and {tuple(hidden.shape)}"
            )
        if hidden.shape[:-1] != labels.shape:
            raise ValueError(
                f"labels {tuple(labels.shape)} must be aligned with {who}_hidden's rows "
                f"{tuple(hidden.shape[:-1])}"
            )
