"""Can the head reach the regression target?

A freshly drawn head emits numbers around zero with a spread of about one. A target of mean 150 or
of spread 0.0005 is out of its reach: the loss then measures the unit, gradients are huge or next
to nothing, and every other reading (initial loss, gradient norms, the size of an update) is about
the unit too. A head that already emits such numbers (a trained one) is no fault.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch

from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.data.labels import head_outputs
from hf_recipe.instruments.heads import REGRESSION, Head, read_head
from hf_recipe.instruments.redraw import Watch
from hf_recipe.instruments.subject import Subject

ROWS = 64
FEWEST = 4


@dataclass(frozen=True)
class TargetScale(Measurement):
    """Regression targets of one batch against what the head emits before step 1.

    Attributes:
        rows, outputs: how many were looked at.
        means, deviations: of the targets, by output, in their unit.
        emitted_means, emitted_deviations: of the head's outputs.
        plain: whether the loss is a plain distance between the two (squared, absolute, Huber):
            otherwise the model scales its targets itself.
    """

    rows: int
    outputs: int
    means: tuple[float, ...]
    deviations: tuple[float, ...]
    emitted_means: tuple[float, ...]
    emitted_deviations: tuple[float, ...]
    plain: bool = True


def take_target_scale(subject: Subject) -> Iterator[TargetScale]:
    """Run one batch and compare targets with outputs."""
    config = subject.config
    declared = getattr(config, "problem_type", None)
    outputs = head_outputs(subject.model)
    if declared not in (None, REGRESSION) or (declared is None and (outputs or 1) > 1):
        raise Skip("the head is no regression")
    batch = subject.batch("train", size=ROWS)
    labels = batch.labels
    if not isinstance(labels, torch.Tensor) or not (
        labels.is_floating_point() or declared == REGRESSION or outputs == 1
    ):
        raise Skip("the labels are no quantities")
    subject.model.eval()
    watch = Watch(subject.model)
    with torch.no_grad(), watch.watching(layers=False):
        observed = float(subject.compute_loss(batch.inputs))
    head = read_head(subject.model, batch.inputs, watch.outputs, observed=observed)
    if head.problem_type != REGRESSION:
        raise Skip("the head is no regression")
    if len(head.labels) < FEWEST:
        raise Skip(f"{len(head.labels)} targets say nothing of their spread")
    yield target_scale(head, observed)


def target_scale(head: Head, observed: float) -> TargetScale:
    """The measurement from a head's rows and the loss that was observed on them."""
    y, z = head.labels.double(), head.logits.double()
    return TargetScale(
        rows=len(y),
        outputs=y.shape[-1],
        means=tuple(y.mean(0).tolist()),
        deviations=tuple(y.std(0, correction=0).tolist()),
        emitted_means=tuple(z.mean(0).tolist()),
        emitted_deviations=tuple(z.std(0, correction=0).tolist()),
        plain=is_plain(y, z, observed),
    )


def is_plain(y: torch.Tensor, z: torch.Tensor, observed: float) -> bool:
    """Whether `observed` is a distance between targets and outputs as they stand, give or take
    a factor of three (weights, one half, a sum over a few outputs).
    """
    gap = (z - y).abs()
    huber = torch.where(gap < 1, 0.5 * gap.square(), gap - 0.5)
    known = [gap.square().mean(), gap.mean(), gap.square().mean().sqrt(), huber.mean()]
    known += [float(y.shape[-1]) * known[0], float(y.shape[-1]) * known[1]]
    return any(1 / 3 <= observed / max(float(d), 1e-300) <= 3 for d in known)


def unscaled_target(
    seen: TargetScale,
    *,
    far: Annotated[
        float, "times what a fresh head emits; at 10 its loss is 100 times that of a scaled one"
    ] = 10.0,
    small: Annotated[
        float, "spread of a target that a fresh head's own noise hides; 1 % of its unit; judged"
    ] = 0.01,
) -> Iterator[Fault]:
    """Targets out of the head's reach, the furthest output first."""
    if not seen.plain:
        return
    worst, told = 0.0, None
    for mean, deviation, center, spread in zip(
        seen.means, seen.deviations, seen.emitted_means, seen.emitted_deviations, strict=True
    ):
        reach = max(spread, 1.0) if math.isfinite(spread) else 1.0
        offset, off = abs(mean - center), math.hypot(mean - center, spread)
        ratios = [offset / (far * reach), deviation / (far * reach)]
        if 0 < deviation < small:
            ratios.append(off / (far * deviation))
        # A trained head's offset is a part of the spread that it knows.
        known = spread > deviation / far and offset <= deviation
        if max(ratios) > 1 and not known and max(ratios) > worst:
            worst, told = max(ratios), (mean, deviation, center, spread)
    if told is None:
        return
    mean, deviation, center, spread = told
    which = "the target has" if seen.outputs == 1 else f"one of {seen.outputs} targets has"
    yield Fault(
        message=f"{which} mean {mean:.4g} and standard deviation {deviation:.3g}; the head starts "
        f"at {center:.3g} with a spread of {spread:.2g} ({seen.rows} rows)",
        subject="labels",
        evidence={
            "seen": f"mean {mean:.4g}, deviation {deviation:.3g}",
            "expected": "mean about 0, deviation about 1",
            "mean": mean,
            "deviation": deviation,
            "emitted_mean": center,
            "emitted_deviation": spread,
        },
    )


TARGET_SCALE = Probe("measure target scale", "probe", (TargetScale,), take_target_scale)

UNSCALED_TARGET = Check(
    name="unscaled-target",
    stage="data",
    severity="warning",
    moments=("probe",),
    why="A fresh head emits about 0 +- 1. A target far from that makes loss, gradients and rates "
    "a matter of its unit, and the first epochs a search for it.",
    fix="y = (y - train_mean) / train_std  # and scale predictions back; or hf_recipe."
    "set_output_bias for the mean",
    source="LeCun et al. 1998, Efficient BackProp; Karpathy 2019 (init well)",
    judges=(unscaled_target,),
    unsure="Losses of the user's own that scale by themselves within a factor of three of a plain "
    "distance; optimizers tuned to the unit.",
    explains=(
        "initial-loss-unexpected",
        "output-bias-unset",
        "hockey-stick",
        "exploding-gradient",
        "vanishing-gradient",
        "loss-not-decreasing",
        "loss-spike",
        "loss-diverged",
        "clipping-dominates",
        "update-too-small",
        "update-too-large",
        "input-ignored",
        "one-batch-not-overfit",
        "dead-unit",
        "overfitting",
    ),
)
