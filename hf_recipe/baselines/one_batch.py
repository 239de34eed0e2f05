"""The recipe's line "overfit one batch".

"Overfit a single batch of only a few examples ... verify that we can reach the lowest achievable
loss (e.g. zero)" (Karpathy 2019). What does not memorise a handful of rows has a bug: a detached
loss, a frozen head, labels that do not go with their inputs. The lowest achievable loss is not
always zero: label smoothing has an entropy, and so have equal inputs under different labels. That
floor is computed, and the loss has to come down to it.

How it is trained stands in `memorising`. Everything is put back, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch

from hf_recipe.baselines.loss_floor import floor_of
from hf_recipe.baselines.memorising import (
    FIRST,
    agreement,
    best_trial,
    centre_regression,
    descend,
    first_gradient,
    kept_weights,
    put_back,
    reshard,
    without_noise,
)
from hf_recipe.core.check import Check, Measurement, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.batches import Batch
from hf_recipe.instruments.quiet import quiet
from hf_recipe.instruments.row_losses import logits_of
from hf_recipe.instruments.subject import Subject

STILL_FALLING, MOST_ATTEMPTS = 0.8, 3  # of the loss a third of an attempt before


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
        optimizer: what it was learned with.
        negative: whether the loss starts below zero, though its labels are classes.
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
    optimizer: str = "SGD"
    negative: bool = False
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
    return not batch.negative and batch.end - batch.floor <= tolerance * batch.scale + 1e-3


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
    reshard(model)
    with quiet(model, trainer=subject.trainer), kept_weights(model):
        size = rows or min(16, int(getattr(subject.args, "per_device_train_batch_size", 8)))
        batch = subject.batch("train", size=size)
        if batch.labels is None:
            raise Skip("the batch has no labels under a known name")
        without_noise(model)
        return _learn(subject, batch, max_steps)


# ------------------------------------------------------------------ training


def _learn(subject: Subject, batch: Batch, max_steps: int) -> OneBatch:
    model = subject.model
    agree = agreement(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        loss, outputs = subject.compute_loss(batch.inputs, outputs=True)
        again = agree(float(subject.compute_loss(batch.inputs)))
        start, logits = agree(float(loss)), logits_of(outputs)
        floor, constant, conflicts = floor_of(subject, batch, logits)
        centre_regression(subject, batch)
    scale = max(constant - floor, 1e-6)
    goal = floor + TOLERANCE * scale / 2
    reshard(model)
    weights = [p.detach().clone() for p in trainable]
    gradient = first_gradient(subject, batch, trainable)
    losses: list[float] = [start]
    trial = FIRST
    if trainable and math.isfinite(gradient) and gradient > 0:
        losses = descend(subject, batch, trainable, trial, max_steps, goal)
        if not losses[-1] <= floor + TOLERANCE * scale:
            put_back(model, trainable, weights)
            trial = best_trial(subject, batch, trainable, weights)
            losses = descend(subject, batch, trainable, trial, max_steps, goal)
        # A mean over many small answers falls slowly: what still falls has not failed.
        while goal < losses[-1] <= STILL_FALLING * losses[-max_steps // 3] and len(losses) <= (
            MOST_ATTEMPTS * max_steps
        ):
            losses += descend(subject, batch, trainable, trial, max_steps, goal)[1:]
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
        rate=trial.rate,
        optimizer=trial.optimizer,
        constant=constant,
        gradient=gradient,
        spread=_spread(logits),
        repeatable=abs(again - start) <= 1e-4 * max(1.0, abs(start)),
        trainable=sum(p.numel() for p in trainable) / total if total else 0.0,
        negative=start < -1e-3 and _is_of_classes(batch, logits),
        accuracy=_accuracy(logits, batch.labels),
        conflicts=conflicts,
        losses=tuple(losses),
    )


# ------------------------------------------------------------------ outcomes


def _is_of_classes(batch: Batch, logits: torch.Tensor | None) -> bool:
    floats = bool(batch.labels.is_floating_point())
    return not floats and logits is not None and logits.ndim > 1 and logits.shape[-1] > 1


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
    if batch.negative:
        return "the loss of classes is negative: its sign is turned", "return loss, not -loss"
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
            "seen": f"loss {batch.end:.4f} after {batch.steps} steps of {batch.optimizer} at rate "
            f"{batch.rate:g}",
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
