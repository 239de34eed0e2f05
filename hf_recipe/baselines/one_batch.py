"""The recipe's line "overfit one batch".

"Overfit a single batch of only a few examples ... verify that we can reach the lowest achievable
loss (e.g. zero)" (Karpathy 2019). What does not memorise a handful of rows has a bug: a detached
loss, a frozen head, labels that do not go with their inputs. The lowest achievable loss is not
always zero: label smoothing has an entropy, and so have equal inputs under different labels. That
floor is computed, and the loss has to come down to it.

One setting memorised nine tiny models of nine kinds: SGD with momentum 0.9, clipped at norm 1,
rate 0.03, dropout off. Where it does not, a ladder of rates is tried. Everything is put back.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_recipe.baselines.loss_floor import floor_of
from hf_recipe.core.check import Check, Measurement, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.batches import Batch
from hf_recipe.instruments.distributed import from_rank_0
from hf_recipe.instruments.quiet import quiet
from hf_recipe.instruments.row_losses import logits_of
from hf_recipe.instruments.subject import Subject

RATE, MOMENTUM, CLIP, WARMUP = 3e-2, 0.9, 1.0, 5
LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
LADDER_STEPS = 15
STILL_FALLING, MOST_ATTEMPTS = 0.8, 3  # of the loss a third of an attempt before
NORMS = (nn.modules.batchnorm._BatchNorm,)


@dataclass(frozen=True)
class OneBatch(Measurement):
    """How one fixed batch was learned.

    Attributes:
        rows: in the batch.
        start, end: loss before and after (nats or squared units), in the mode it was trained in.
        floor: the lowest loss these labels allow; conflicts are shares of rows in it.
        scale: loss of the best constant answer minus the floor: what there was to learn.
        steps, rate: how long, and at which rate.
        constant: loss of the best constant answer.
        accuracy: share of right classes outside of conflicts; None for other tasks.
        conflicts: rows whose input stands in the batch under another label too.
        gradient: norm of the first gradient; NaN where there was none.
        spread: largest difference between two rows' outputs at the end.
        repeatable: whether the same batch and weights gave the same loss twice.
        trainable: share of the parameters that train.
        losses: the course of the loss.
    """

    rows: int
    start: float
    end: float
    floor: float
    scale: float
    steps: int
    rate: float
    constant: float
    gradient: float
    spread: float
    repeatable: bool = True
    trainable: float = 1.0
    accuracy: float | None = None
    conflicts: int = 0
    losses: tuple[float, ...] = ()

    @property
    def reached(self) -> bool:
        """Whether the loss came down to its floor: within 1 % of what there was to learn."""
        return at_floor(self, tolerance=TOLERANCE)


TOLERANCE = 0.01


def at_floor(batch: OneBatch, *, tolerance: float) -> bool:
    """Whether the loss ended within `tolerance` of what there was to learn."""
    return batch.end - batch.floor <= tolerance * batch.scale + 1e-3


def overfit_one_batch(
    subject: Subject, *, rows: int | None = None, max_steps: int = 150
) -> OneBatch:
    """Train on one fixed batch until its floor, then put everything back, bit for bit.

    All processes call it on the same rows. Where parameters are spread over them (FSDP2), each
    keeps a copy of its own part, and they go by the losses of the first.

    Args:
        subject: what to train; its optimizer is not touched.
        rows: in the batch; default: the per-device batch size, at most 16.
        max_steps: per attempt; a second attempt follows a ladder of rates.

    Raises:
        Skip: the batch holds no label, or parts of the model are elsewhere (FSDP1, DeepSpeed).
    """
    model = subject.model
    if any(not p.numel() or hasattr(p, "ds_id") for p in model.parameters()):
        raise Skip("parts of the parameters are held elsewhere: train one batch before train()")
    _reshard(model)
    with quiet(model, trainer=subject.trainer), _kept_weights(model):
        size = rows or min(16, int(getattr(subject.args, "per_device_train_batch_size", 8)))
        batch = subject.batch("train", size=size)
        if batch.labels is None:
            raise Skip("the batch has no labels under a known name")
        _without_noise(model)
        return _learn(subject, batch, max_steps)


# ------------------------------------------------------------------ training


def _learn(subject: Subject, batch: Batch, max_steps: int) -> OneBatch:
    model = subject.model
    trainable = [p for p in model.parameters() if p.requires_grad]
    agree = from_rank_0 if _is_sharded(model) else _alone
    with torch.no_grad():
        loss, outputs = subject.compute_loss(batch.inputs, outputs=True)
        again = agree(float(subject.compute_loss(batch.inputs)))
        start, logits = agree(float(loss)), logits_of(outputs)
        floor, constant, conflicts = floor_of(subject, batch, logits)
    scale = max(constant - floor, 1e-6)
    goal = floor + TOLERANCE * scale / 2
    _reshard(model)
    weights = [p.detach().clone() for p in trainable]
    gradient = _first_gradient(subject, batch, trainable)
    losses: list[float] = [start]
    rate = RATE
    if trainable and math.isfinite(gradient) and gradient > 0:
        losses = _descend(subject, batch, trainable, rate, max_steps, goal)
        if not losses[-1] <= floor + TOLERANCE * scale:
            _put_back(model, trainable, weights)
            rate = _best_rate(subject, batch, trainable, weights)
            losses = _descend(subject, batch, trainable, rate, max_steps, goal)
        # A mean over many small answers falls slowly: what still falls has not failed.
        while goal < losses[-1] <= STILL_FALLING * losses[-max_steps // 3] and len(losses) <= (
            MOST_ATTEMPTS * max_steps
        ):
            losses += _descend(subject, batch, trainable, rate, max_steps, goal)[1:]
    with torch.no_grad():
        loss, outputs = subject.compute_loss(batch.inputs, outputs=True)
        logits = logits_of(outputs)
    total = sum(p.numel() for p in model.parameters())
    return OneBatch(
        rows=len(batch),
        start=start,
        end=agree(float(loss)),
        floor=floor,
        scale=scale,
        steps=len(losses) - 1,
        rate=rate,
        constant=constant,
        gradient=gradient,
        spread=_spread(logits),
        repeatable=abs(again - start) <= 1e-4 * max(1.0, abs(start)),
        trainable=sum(p.numel() for p in trainable) / total if total else 0.0,
        accuracy=_accuracy(logits, batch.labels),
        conflicts=conflicts,
        losses=tuple(losses),
    )


def _is_sharded(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


def _reshard(model: nn.Module) -> None:
    """Let go of gathered parameters: a forward leaves some, and later ones would read them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _alone(value: float) -> float:
    return value


def _descend(
    subject: Subject,
    batch: Batch,
    parameters: Sequence[nn.Parameter],
    rate: float,
    steps: int,
    goal: float,
) -> list[float]:
    """Losses of up to `steps` steps; ends at `goal`; halves the rate where the loss blows up."""
    optimizer = torch.optim.SGD(parameters, lr=rate, momentum=MOMENTUM)
    agree = from_rank_0 if _is_sharded(subject.model) else _alone
    losses: list[float] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / WARMUP)
        optimizer.zero_grad(set_to_none=True)
        loss = subject.compute_loss(batch.inputs)
        losses.append(agree(float(loss.detach())))
        if losses[-1] <= goal:
            break
        if not math.isfinite(losses[-1]):
            break
        if losses[-1] > 3 * losses[0] + 1:
            rate /= 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
    with torch.no_grad():
        losses.append(agree(float(subject.compute_loss(batch.inputs))))
    for parameter in parameters:
        parameter.grad = None
    return losses


def _best_rate(
    subject: Subject,
    batch: Batch,
    parameters: Sequence[nn.Parameter],
    weights: Sequence[torch.Tensor],
) -> float:
    found: list[tuple[float, float]] = []
    for rate in LADDER:
        losses = _descend(subject, batch, parameters, rate, LADDER_STEPS, -math.inf)
        _put_back(subject.model, parameters, weights)
        if math.isfinite(losses[-1]):
            found.append((losses[-1], rate))
    return min(found)[1] if found else LADDER[0]


def _first_gradient(subject: Subject, batch: Batch, parameters: Sequence[nn.Parameter]) -> float:
    loss = subject.compute_loss(batch.inputs)
    if not loss.requires_grad or not parameters:
        return math.nan
    loss.backward()  # and not autograd.grad: sharded parameters are told by their hooks
    gradients = [p.grad for p in parameters if p.grad is not None]
    for parameter in parameters:
        parameter.grad = None
    if not gradients:
        return 0.0
    norm = torch.nn.utils.get_total_norm(gradients)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _without_noise(model: nn.Module) -> None:
    """Dropout and its kin off; BatchNorm as in training, recurrent layers as cuDNN needs them."""
    model.eval()
    for module in model.modules():
        if isinstance(module, NORMS):
            module.train()


@contextlib.contextmanager
def _kept_weights(model: nn.Module) -> Iterator[None]:
    parameters = list(model.parameters())
    weights = [p.detach().clone() for p in parameters]
    try:
        yield
    finally:
        _put_back(model, parameters, weights)


def _put_back(
    model: nn.Module, parameters: Sequence[nn.Parameter], weights: Sequence[torch.Tensor]
) -> None:
    _reshard(model)
    with torch.no_grad():
        for parameter, value in zip(parameters, weights, strict=True):
            parameter.copy_(value)


# ------------------------------------------------------------------ outcomes


def _accuracy(logits: torch.Tensor | None, labels: torch.Tensor) -> float | None:
    if logits is None or labels.is_floating_point() or labels.ndim != 1 or logits.ndim != 2:
        return None
    if logits.shape[1] < 2:
        return None
    return float((logits.argmax(-1) == labels).float().mean())


def _spread(logits: torch.Tensor | None) -> float:
    if logits is None or logits.ndim < 2 or len(logits) < 2:
        return math.nan
    flat = logits.detach().float().reshape(len(logits), -1)
    return float((flat - flat[:1]).abs().max())


# ------------------------------------------------------------------ judging


def likeliest_cause(batch: OneBatch) -> tuple[str, str]:
    """(what most likely keeps the batch from being learned, the line that mends it)."""
    if batch.trainable == 0:
        return "no parameter trains", "for p in model.parameters(): p.requires_grad_(True)"
    if not math.isfinite(batch.start):
        return "the loss is not finite before the first step", "check the inputs for NaN"
    if math.isnan(batch.gradient):
        return (
            "the loss has no gradient: it is detached from the parameters",
            "return the loss without .detach(), .item() or torch.no_grad()",
        )
    if batch.gradient == 0:
        return "the gradient is exactly zero", "look for an argmax, a clamp or a dead activation"
    if not batch.repeatable:
        return (
            "the same batch and weights give two different losses: something is drawn anew",
            "draw labels, masks and noise in the collator or behind `self.training`",
        )
    if batch.spread <= 1e-4:
        return (
            "all rows get the same output: the input does not reach it",
            "look at what forward does with its inputs (masks, detached or unused features)",
        )
    if abs(batch.end - batch.constant) <= 0.1 * batch.scale:
        return (
            "it stops at the best constant answer: the labels' frequencies were learned, no more",
            "check that inputs and labels are in the same order, and what is between them trains",
        )
    if batch.trainable < 0.05:
        return (
            f"{batch.trainable:.1%} of the parameters train: too few to memorise the batch",
            "unfreeze more, or raise the adapters' rank",
        )
    if batch.end > batch.start:
        return "the loss rises along its own gradient", "check the loss's sign"
    return (
        "part of the batch is learned: the head or the loss cannot express the rest",
        "look at the rows with the highest loss, and at what stands between logits and loss",
    )


def judge_one_batch(
    batch: OneBatch,
    *,
    tolerance: Annotated[float, "of what there was to learn; 9 of 9 healthy models pass"] = 0.01,
) -> Iterator[Fault]:
    """The loss did not come down to its floor."""
    if at_floor(batch, tolerance=tolerance):
        return
    cause, fix = likeliest_cause(batch)
    yield Fault(
        f"{batch.rows} rows: loss {batch.start:.4f} -> {batch.end:.4f} after {batch.steps} steps, "
        f"floor {batch.floor:.4f}; {cause}",
        evidence={
            "seen": f"loss {batch.end:.4f} after {batch.steps} steps at rate {batch.rate:g}",
            "expected": f"the floor, {batch.floor:.4f} (+ {tolerance * batch.scale:.4f})",
            "start": batch.start,
            "end": batch.end,
            "floor": batch.floor,
            "conflicts": batch.conflicts,
            "gradient": batch.gradient,
        },
        fix=fix,
    )


one_batch_not_overfit = Check(
    name="one-batch-not-overfit",
    stage="baselines",
    severity="warning",
    moments=("probe",),
    why="What cannot memorise a handful of rows has a bug that more data will only hide.",
    fix="recipe.overfit_one_batch()  # then follow the cause that it names",
    source="Karpathy, A Recipe for Training Neural Networks, 2019",
    unsure=(
        "A class-weighted or otherwise home-made loss may have a floor of its own; "
        "a handful of trained adapters may be too few to memorise a batch."
    ),
    judges=(judge_one_batch,),
    call="recipe.overfit_one_batch()",
)
