"""Does the gradient arrive at every layer at a size that means something?

Layers are compared with each other and a run with its own beginning, never with a number in
absolute units: targets in millions have large gradients and train well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Annotated, Any

from hf_recipe.core.check import Check, Measurement, Monitor
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.layers import LayerNumbers, LayerSample, LayerSamples
from hf_recipe.instruments.window import Step, Window

ATTENDING = re.compile(
    r"(^|[._])(q|k|query|key)([._](proj|proj_weight|lin))?(\.lora_[AB]\.\w+)?\.weight$"
)


def _matrices(sample: LayerSample) -> list[LayerNumbers]:
    """Weight matrices in the model's order; those without any gradient (LoRA, experts) aside."""
    return [x for x in sample.layers if x.dims >= 2 and x.gradient > 0]


def _in_depth(sample: LayerSample) -> list[LayerNumbers]:
    """The matrices that depth alone can starve: queries and keys get next to no gradient in a
    fresh block anywhere, as long as its attention is even over all positions."""
    return [x for x in _matrices(sample) if not ATTENDING.search(x.name)]


def _run_below(gradients: list[float], limit: float) -> int:
    """How many matrices, from the input on, have a gradient below `limit`."""
    for place, value in enumerate(gradients):
        if not value < limit:
            return place
    return len(gradients)


def vanishing(
    samples: LayerSamples,
    *,
    share: Annotated[
        float, "of the largest layer's gradient; healthy transformers stay above a thousandth"
    ] = 1e-5,
    matrices: Annotated[int, "from the input on: one alone may be an odd scale"] = 2,
    needed: Annotated[int, "samples in a row"] = 2,
    zeros: Annotated[float, "share of exact zeros in float16 gradients: underflow"] = 0.9,
) -> Iterator[Fault]:
    """The first layers get next to nothing; or float16 gradients are zero nearly everywhere."""
    chosen = samples.samples[-needed:]
    if len(chosen) < needed:
        return
    found = []
    for sample in chosen:
        layers = _in_depth(sample)
        if len(layers) <= matrices:
            return
        top = max(x.gradient for x in layers)
        found.append(_run_below([x.gradient for x in layers], share * top))
    if min(found) >= matrices:
        layers = _in_depth(chosen[-1])
        top = max(x.gradient for x in layers)
        first = layers[0]
        yield Fault(
            f"the gradient of the first {found[-1]} of {len(layers)} weight matrices is below "
            f"{share:.0e} of the largest one's: {first.name} has {first.gradient / top:.1e} of it",
            evidence={
                "seen": f"{first.gradient / top:.1e}",
                "expected": f">= {share:.0e}",
                "layers": found[-1],
                "step": chosen[-1].step,
            },
        )
        return
    half = [x for s in chosen for x in s.layers if x.dtype == "float16" and x.dims >= 2]
    sampled = sum(x.sampled for x in half)
    empty = sampled - sum(x.reached for x in half)
    if sampled and empty > zeros * sampled:
        yield Fault(
            f"{empty / sampled:.0%} of the float16 gradients are exactly zero: they underflow",
            subject="float16",
            evidence={"seen": f"{empty / sampled:.0%}", "expected": f"<= {zeros:.0%}"},
            fix="model.float() and TrainingArguments(..., bf16=True)",
        )


def exploding(
    samples: LayerSamples,
    *,
    share: Annotated[
        float, "of the last matrices' gradient; healthy deep networks stay below a hundred"
    ] = 1e3,
    matrices: Annotated[int, "from the input on"] = 2,
    needed: Annotated[int, "samples in a row"] = 2,
) -> Iterator[Fault]:
    """The gradient grows by orders of magnitude on its way to the input."""
    chosen = samples.samples[-needed:]
    if len(chosen) < needed:
        return
    seen = []
    for sample in chosen:
        gradients = [x.gradient for x in _matrices(sample)]
        if len(gradients) < 2 * matrices + 2:
            return
        thirds = len(gradients) // 3
        middle = median(gradients[thirds:-thirds])
        early, late = min(gradients[:matrices]), max(gradients[-matrices:])
        seen.append(early / late if early > middle > late else 1.0)
    if min(seen) < share:
        return
    layers = _matrices(chosen[-1])
    yield Fault(
        f"the gradient grows {seen[-1]:.1e}-fold from the last weight matrices to the first "
        f"({layers[0].name})",
        evidence={
            "seen": f"{seen[-1]:.1e}",
            "expected": f"< {share:.0e}",
            "step": chosen[-1].step,
        },
    )


# ---------------------------------------------------------------- over the run


@dataclass(frozen=True)
class GradientCourse(Measurement):
    """The gradient's norm and the loss, at first and now: medians over eight steps.

    Attributes:
        step: the last one.
        early, lowest: norm over the first eight steps, and the smallest of the last eight.
        early_loss, loss: over the same steps.
    """

    step: int
    early: float
    lowest: float
    early_loss: float
    loss: float


def follow_norms(
    state: dict[str, Any], window: Window, seen: Mapping[str, Measurement]
) -> tuple[dict[str, Any], GradientCourse | None]:
    """Keep the first and the last eight steps; measures every 16 steps or so, and at the end."""
    state = {"first": [], "last": [], "told": 0, "step": 0, **state}
    known = list(filter(_has_norm, window.finite))
    missing = 8 - len(state["first"])
    state["first"] = [*state["first"], *([s.grad_norm, s.loss] for s in known[:missing])]
    state["last"] = [*state["last"], *([s.grad_norm, s.loss] for s in known[missing:][-8:])][-8:]
    state["step"] = known[-1].step if known else state["step"]
    if len(state["last"]) < 8 or (state["step"] < state["told"] + 16 and not window.ended):
        return state, None
    state["told"] = state["step"]
    first, last = state["first"], state["last"]
    return state, GradientCourse(
        step=state["step"],
        early=median(norm for norm, _ in first),
        lowest=min(norm for norm, _ in last),
        early_loss=median(loss for _, loss in first),
        loss=median(loss for _, loss in last),
    )


def _has_norm(step: Step) -> bool:
    return step.grad_norm is not None and math.isfinite(step.grad_norm)


def grown(
    course: GradientCourse,
    *,
    times: Annotated[float, "the run's own beginning, eight steps in a row"] = 1e3,
) -> Iterator[Fault]:
    """Every recent gradient is a thousand times the first ones', and the loss has not fallen."""
    if not course.lowest > times * course.early or not course.loss >= course.early_loss:
        return
    yield Fault(
        f"the gradient's norm has grown from {course.early:.3g} to {course.lowest:.3g} and more, "
        f"while the loss went from {course.early_loss:.4g} to {course.loss:.4g}",
        subject="run",
        evidence={
            "seen": f"{course.lowest / course.early:.1e} times",
            "expected": f"< {times:.0e} times",
            "step": course.step,
        },
        fix="TrainingArguments(..., max_grad_norm=1.0, learning_rate=args.learning_rate / 10)",
    )


FOLLOW_NORMS = Monitor(
    name="follow the gradient's norm", moment="run", measures=(GradientCourse,), fold=follow_norms
)

VANISHING_GRADIENT = Check(
    name="vanishing-gradient",
    stage="complexify",
    severity="warning",
    moments=("run",),
    why="Layers that get a millionth of the gradient stay as they were drawn; the rest makes do.",
    fix="x = x + block(norm(x))  # residual connections, normalisation, ReLU or GELU for sigmoid",
    source="Glorot and Bengio, Understanding the difficulty of training deep networks (2010)",
    unsure="Adam rescales small gradients, and may train such layers on their noise.",
    judges=(vanishing,),
    explains=("loss-not-decreasing",),
)

EXPLODING_GRADIENT = Check(
    name="exploding-gradient",
    stage="complexify",
    severity="warning",
    moments=("run",),
    why="Where it grows with depth, no rate suits both the first layers and the last.",
    fix="nn.init.kaiming_normal_(layer.weight)  # and normalisation between the layers",
    source="Pascanu et al., On the difficulty of training recurrent networks (2013)",
    unsure="A head that has converged gets little gradient of its own.",
    judges=(exploding, grown),
    explains=("loss-diverged", "loss-spike"),
)

__all__ = ["EXPLODING_GRADIENT", "VANISHING_GRADIENT"]
