"""Are gradients cleared between optimizer steps?

A gradient that is not cleared is added to the next one: the steps follow the sum of all batches
so far, its norm grows with the steps, and the run looks like one with far too high a rate. The
proof needs no statistics: before the first backward pass of a step there must be nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from hf_recipe.baselines.step_gradient import carried_over
from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.subject import Subject

LOOKED_AT = 3  # tensors: what clears gradients clears them all


@dataclass(frozen=True)
class GradientLeft(Measurement):
    """What stood in the gradients before a step's first backward pass.

    Attributes:
        step: the step that was about to be taken.
        left: parameters, of those looked at, that still held a gradient other than zero.
        names: theirs.
    """

    step: int
    left: int
    names: tuple[str, ...]


def gradients_left(model: nn.Module, step: int) -> GradientLeft:
    """Look at the first three parameters that hold a gradient at all."""
    held: list[tuple[str, torch.Tensor]] = []
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            held.append((name, parameter.grad))
            if len(held) == LOOKED_AT:
                break
    left = tuple(name for name, grad in held if bool(grad.detach().ne(0).any()))
    return GradientLeft(step=step, left=len(left), names=left)


def take_gradient_left(subject: Subject) -> Iterator[GradientLeft]:
    """Before the first backward pass of a step after the first; unguarded."""
    if not subject.step:
        raise Skip("no step was taken yet")
    yield gradients_left(subject.model, subject.step + 1)


def not_cleared(measured: GradientLeft) -> Iterator[Fault]:
    """Anything that is left of the step before."""
    if not measured.left:
        return
    yield Fault(
        f"step {measured.step} begins with the gradient of the steps before still there, in "
        f"{', '.join(measured.names)}: gradients add up from step to step",
        evidence={
            "seen": f"{measured.left} gradients left",
            "expected": "none or zero",
            "step": measured.step,
        },
    )


MEASURE_LEFT = Probe(
    name="look for gradients left over",
    moment="run",
    measures=(GradientLeft,),
    take=take_gradient_left,
    needs=("trainer", "unsharded"),
)

GRADIENT_ACCUMULATES = Check(
    name="gradient-accumulates",
    stage="complexify",
    severity="error",
    moments=("run",),
    why="Gradients that are not cleared add up: each step follows every batch since the first.",
    fix="model.zero_grad()  # after each optimizer.step(); the Trainer does, if it is let",
    source="Karpathy, 'most common neural net mistakes' (2018): forgot to zero_grad",
    unsure="A training_step of one's own that clears them itself, after this look.",
    judges=(not_cleared, carried_over),
    explains=(
        "loss-diverged",
        "loss-spike",
        "exploding-gradient",
        "update-too-large",
        "clipping-dominates",
        "loss-not-decreasing",
    ),
)

__all__ = ["GRADIENT_ACCUMULATES", "GradientLeft", "gradients_left"]
