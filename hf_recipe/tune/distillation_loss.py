"""Divergences between a student and its teacher, dense and in chunks of rows.

Distilling is matching the teacher's distribution, softened by a temperature (Hinton et al. 2015).
With p the teacher's and q the student's softmax at temperature T, one row's divergence is

    forward_kl   KL(p || q)                                      Hinton et al. 2015
    reverse_kl   KL(q || p)                                      Gu et al. 2023 (MiniLLM)
    jsd          b KL(p || m) + (1 - b) KL(q || m),  m = b p + (1 - b) q     Agarwal et al. 2023
    skewed_kl    KL(p || a p + (1 - a) q)                        Ko et al. 2024 (DistiLLM)

times T^2, without which the gradient would fall as 1/T^2.

Plain autograd keeps five to ten tensors of (rows, vocabulary) alive. Here each kind's gradient is
known in closed form, so it is computed in the forward pass, in place, one chunk of rows at a time;
rows without a label are left out before the first multiplication. What stays is the gradient of
the hidden states and of the head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Kind = Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl"]
Vocabulary = Literal["error", "cut"]
KINDS: tuple[str, ...] = get_args(Kind)

# Logits held at once, in elements: 16 MiB in float32 on a CPU, where a chunk should stay near the
# cache; 256 MiB on an accelerator, where a matrix product needs rows to be busy. Judgement.
CHUNK_ELEMENTS = {"cpu": 2**22}
CHUNK_ELEMENTS_ELSEWHERE = 2**26


@dataclass(frozen=True)
class Objective:
    """Which divergence, how soft, and how much of the hard loss goes with it.

    Attributes:
        kind: one of `KINDS`.
        temperature: T > 0, of both distributions.
        beta: the teacher's share of the mixture in "jsd", in (0, 1).
        skew: the teacher's share of the mixture in "skewed_kl", in (0, 1).
        soft, hard: weights of the divergence and of the cross-entropy with the labels.
        smoothing: label smoothing of the cross-entropy, in [0, 1).
    """

    kind: str = "forward_kl"
    temperature: float = 1.0
    beta: float = 0.5
    skew: float = 0.1
    soft: float = 1.0
    hard: float = 0.0
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {self.kind!r}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be positive; got {self.temperature}")
        for name in ("beta", "skew"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie between 0 and 1; got {getattr(self, name)}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1); got {self.smoothing}")


@dataclass(frozen=True)
class Head:
    """How hidden states become logits: ``cap * tanh(scale * (hidden @ weight.T + bias) / cap)``.

    Attributes:
        scale: what the model multiplies its head's output by (Cohere, Granite, Falcon-H1).
        softcap: what it is capped at (Gemma 2); None: not capped.
    """

    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: Any) -> Tensor:
        """The logits (rows, vocabulary) of some rows, in a buffer of their own."""
        product = hidden @ weight.T if bias is None else torch.addmm(bias, hidden, weight.T)
        product = product.to(dtype)
        if self.scale != 1.0:
            product.mul_(self.scale)
        if self.softcap is not None:
            product.div_(self.softcap).tanh_().mul_(self.softcap)
        return product

    def slope(self, logits: Tensor) -> Tensor | None:
        """How the capped logits follow the uncapped ones, elementwise; None where they are one."""
        if self.softcap is None:
            return None
        return logits.div(self.softcap).square_().neg_().add_(1.0)


def _log_softmax_(logits: Tensor) -> Tensor:
    return logits.sub_(torch.logsumexp(logits, dim=-1, keepdim=True))


def _soft_rows(
    student: Tensor, teacher: Tensor, objective: Objective, bounded: bool
) -> tuple[Tensor, Tensor]:
    """Each row's divergence times T^2, and its gradient by the student's logits.

    Both arguments (rows, classes) are overwritten. `bounded`: logits may be minus infinity
    (classes ruled out), so that 0 * log 0 must be 0.
    """
    temperature = objective.temperature
    if temperature != 1.0:
        student.div_(temperature)
        teacher.div_(temperature)
    log_q, log_p = _log_softmax_(student), _log_softmax_(teacher)
    if bounded:
        lowest = torch.finfo(log_q.dtype).min / 4
        log_q.clamp_(min=lowest)
        log_p.clamp_(min=lowest)
    rows = {
        "forward_kl": _forward_kl,
        "reverse_kl": _reverse_kl,
        "jsd": _jsd,
        "skewed_kl": _skewed_kl,
    }[objective.kind]
    values, gradient = rows(log_q, log_p, objective)
    return values.mul_(temperature**2), gradient.mul_(temperature)


def _forward_kl(log_q: Tensor, log_p: Tensor, _: Objective) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    values = log_p.sub_(log_q).mul_(p).sum(-1)
    return values, log_q.exp_().sub_(p)


def _reverse_kl(log_q: Tensor, log_p: Tensor, _: Objective) -> tuple[Tensor, Tensor]:
    ratio = log_p.neg_().add_(log_q)
    q = log_q.exp_()
    values = (q * ratio).sum(-1)
    return values, ratio.sub_(values.unsqueeze(-1)).mul_(q)


def _jsd(log_q: Tensor, log_p: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    beta = objective.beta
    log_m = _log_mixture(log_p, log_q, beta)
    p = log_p.exp()
    values = log_p.sub_(log_m).mul_(p).sum(-1).mul_(beta)
    q = torch.exp(log_q, out=p)
    ratio = log_q.sub_(log_m)
    inner = torch.mul(q, ratio, out=log_m).sum(-1)
    values.add_(inner, alpha=1 - beta)
    return values, ratio.sub_(inner.unsqueeze(-1)).mul_(q).mul_(1 - beta)


def _skewed_kl(log_q: Tensor, log_p: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    skew = objective.skew
    log_m = _log_mixture(log_p, log_q, skew)
    p = log_p.exp()
    log_ratio = log_p.sub_(log_m)
    values = p.mul_(log_ratio).sum(-1)
    q, ratio = log_q.exp_(), log_ratio.exp_()
    inner = torch.mul(q, ratio, out=log_m).sum(-1, keepdim=True)
    return values, ratio.sub_(inner).mul_(q).mul_(skew - 1)


def _log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share * p + (1 - share) * q), without underflow where both are tiny."""
    offset = math.log(share) - math.log1p(-share)
    if offset == 0.0:
        return torch.logaddexp(log_p, log_q).add_(math.log(share))
    return torch.logaddexp(log_p + offset, log_q).add_(math.log1p(-share))


def _hard_rows(logits: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Each row's cross-entropy and its gradient; `logits` is overwritten."""
    log_q = _log_softmax_(logits)
    index = labels.unsqueeze(-1)
    values = log_q.gather(-1, index).squeeze(-1).neg_()
    if smoothing:
        values.mul_(1 - smoothing).sub_(log_q.mean(-1), alpha=smoothing)
    gradient = log_q.exp_()
    if smoothing:
        gradient.sub_(smoothing / logits.shape[-1])
    return values, gradient.scatter_add_(-1, index, gradient.new_full(index.shape, smoothing - 1))


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
    task: _Task, tensors: tuple[Tensor | None, ...], divisor: Tensor
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    """The loss, its two terms, and the gradients of hidden states, weight and bias."""
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, labels = tensors
    assert hidden is not None and weight is not None and labels is not None
    assert teacher_hidden is not None and teacher_weight is not None
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
    for rows in supervised.split(task.chunk_rows):
        states = hidden[rows].to(task.operand)
        z = task.student.logits(states, own, bias, wide)
        slope = task.student.slope(z) if any(task.wants) else None
        hard = z.clone() if objective.hard else None
        t = task.teacher.logits(teacher_hidden[rows].to(task.operand), other, teacher_bias, wide)
        values, gradient = _soft_rows(z, t, objective, bounded)
        del z, t
        totals[0] += values.sum()
        if objective.soft != 1.0:
            gradient.mul_(objective.soft)
        if hard is not None:
            values, hard_gradient = _hard_rows(hard, labels[rows], objective.smoothing)
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
    chunk_rows = rows_of_a_chunk(shared, student_hidden.device) if chunk_rows is None else chunk_rows
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
        values, gradient = _soft_rows(
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
    pairs = [torch.stack([x, torch.zeros_like(x)], dim=-1) for x in (student_logits, teacher_logits)]
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


def weighted(objective: Objective, *, soft: float, hard: float, smoothing: float) -> Objective:
    """The objective with other weights of its two terms."""
    return replace(objective, soft=soft, hard=hard, smoothing=smoothing)


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
