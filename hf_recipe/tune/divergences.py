"""Divergences of rows of logits, with their gradients in closed form.

With p the teacher's and q the student's softmax at temperature T, one row's divergence is

    forward_kl   KL(p || q)                                      Hinton et al. 2015
    reverse_kl   KL(q || p)                                      Gu et al. 2023 (MiniLLM)
    jsd          b KL(p || m) + (1 - b) KL(q || m),  m = b p + (1 - b) q     Agarwal et al. 2023
    skewed_kl    KL(p || a p + (1 - a) q)                        Ko et al. 2024 (DistiLLM)

times T^2, without which the gradient would fall as 1/T^2. Everything here works in place: the
gradient ends up where the student's logits were.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl"]
Vocabulary = Literal["error", "cut"]
KINDS: tuple[str, ...] = get_args(Kind)

# Inside a chunk, what is softened at once: on a CPU a few MiB, so that temporaries stay in cache.
BLOCK_ELEMENTS = {"cpu": 2**19}


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

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"logit_scale must be finite; got {self.scale}")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be positive, or None; got {self.softcap}")

    def logits(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: Any,
        out: Tensor | None = None,
    ) -> Tensor:
        """The logits (..., vocabulary) of hidden states (..., width), in memory of their own.

        With `out`, (rows, vocabulary) of the weight's dtype, they lie there; `hidden` has rows.
        """
        if out is None:
            product = F.linear(hidden, weight, bias).to(dtype)
        elif bias is None:
            product = torch.mm(hidden, weight.T, out=out)
        else:
            product = torch.addmm(bias, hidden, weight.T, out=out)
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


def _relative_log_softmax_(logits: Tensor) -> Tensor:
    """log(classes * softmax): over a large vocabulary these are small, and keep more digits."""
    logits.sub_(logits.amax(-1, keepdim=True))
    return logits.sub_(logits.exp().mean(-1, keepdim=True).log_())


def soft_rows(
    student: Tensor, teacher: Tensor, objective: Objective, bounded: bool
) -> tuple[Tensor, Tensor]:
    """Each row's divergence times T^2, and its gradient by the student's logits, in their place.

    Both arguments (rows, classes) are overwritten. `bounded`: logits may be minus infinity
    (classes ruled out), so that 0 * log 0 must be 0.
    """
    block = BLOCK_ELEMENTS.get(student.device.type, student.numel())
    rows = max(1, block // max(1, student.shape[-1]))
    values = []
    for z, t in zip(torch.split(student, rows), torch.split(teacher, rows), strict=True):
        value, gradient = _soft_block(z, t, objective, bounded)
        values.append(value)
        if gradient.data_ptr() != z.data_ptr():
            z.copy_(gradient)
    return torch.cat(values), student


def _soft_block(
    student: Tensor, teacher: Tensor, objective: Objective, bounded: bool
) -> tuple[Tensor, Tensor]:
    """As `soft_rows`, for a few rows; the gradient lies in either argument's memory."""
    temperature = objective.temperature
    if temperature != 1.0:
        student.div_(temperature)
        teacher.div_(temperature)
    log_q, log_p = _relative_log_softmax_(student), _relative_log_softmax_(teacher)
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
    classes = student.shape[-1]
    return values.mul_(temperature**2 / classes), gradient.mul_(temperature / classes)


# In the four below p and q are the probabilities times the number of classes, of mean 1.
# Each value takes the mass of both distributions along, as Bregman's form of the divergence,
# sum p log(p / q) - p + q, does. Exactly, both masses are the same and this adds nothing; but the
# logarithm of a sum is off by its rounding, which would go into a small divergence whole: so it
# cancels.


def _forward_kl(log_q: Tensor, log_p: Tensor, _: Objective) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    values = log_p.sub_(log_q).mul_(p).sum(-1)
    gradient = log_q.exp_().sub_(p)
    return values.add_(gradient.sum(-1)), gradient


def _reverse_kl(log_q: Tensor, log_p: Tensor, _: Objective) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    ratio = log_p.neg_().add_(log_q)
    q = log_q.exp_()
    values = p.sub_(q).sum(-1)
    inner = torch.mul(q, ratio, out=p)
    values.add_(inner.sum(-1))
    return values, ratio.sub_(inner.mean(-1, keepdim=True)).mul_(q)


def _jsd(log_q: Tensor, log_p: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    beta = objective.beta
    log_m = _log_mixture(log_p, log_q, beta)
    p = log_p.exp()
    values = log_p.sub_(log_m).mul_(p).sum(-1).mul_(beta)
    q = torch.exp(log_q, out=log_p)
    ratio = log_q.sub_(log_m)
    values.add_(log_m.exp_().sub_(q).sub_(p.sub_(q), alpha=beta).sum(-1))
    inner = torch.mul(q, ratio, out=p)
    values.add_(inner.sum(-1), alpha=1 - beta)
    return values, ratio.sub_(inner.mean(-1, keepdim=True)).mul_(q).mul_(1 - beta)


def _skewed_kl(log_q: Tensor, log_p: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    skew = objective.skew
    log_m = _log_mixture(log_p, log_q, skew)
    p = log_p.exp()
    log_ratio = log_p.sub_(log_m)
    values = log_m.exp_().sub_(p).sum(-1)
    values.add_(p.mul_(log_ratio).sum(-1))
    q, ratio = log_q.exp_(), log_ratio.exp_()
    inner = torch.mul(q, ratio, out=log_m).mean(-1, keepdim=True)
    return values, ratio.sub_(inner).mul_(q).mul_(skew - 1)


def _log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share * p + (1 - share) * q), without underflow where both are tiny."""
    offset = math.log(share) - math.log1p(-share)
    if offset == 0.0:
        return torch.logaddexp(log_p, log_q).add_(math.log(share))
    return torch.logaddexp(log_p + offset, log_q).add_(math.log1p(-share))


def hard_rows(logits: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
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
