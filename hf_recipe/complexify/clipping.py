"""What is left of the gradient after clipping?

Under Adam the scale of the gradient cancels, and clipping most steps at 1.0 is usual; under SGD
clipping every step makes the norm constant, and the learning rate no longer means what it says:
at the Trainer's default of 1.0 by a factor of a few, which a decaying rate allows for, and is told
as a note. A threshold far below what the optimizer can resolve leaves no update at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Annotated, Any

from hf_recipe.core.check import Check, Measurement, Monitor
from hf_recipe.core.exhibit import Series
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.window import Window

POINTS = 128


@dataclass(frozen=True)
class Clipping(Measurement):
    """How the gradient norms of a run compare with the threshold.

    Attributes:
        steps, clipped: steps with a finite norm, and those above the threshold.
        threshold: ``max_grad_norm``.
        typical, ninetieth: median and 90th percentile of the norms before clipping.
        parameters: trainable numbers.
        scale_free: whether the optimizer divides the gradient by its own size (Adam and kin).
        epsilon: what the optimizer adds to that size; 0 where it has none.
    """

    steps: int
    clipped: int
    threshold: float
    typical: float
    ninetieth: float
    parameters: int
    scale_free: bool
    epsilon: float


def follow_clipping(
    state: dict[str, Any], window: Window, seen: Mapping[str, Measurement]
) -> tuple[dict[str, Any], Clipping | None]:
    """Count clipped steps; measures once after 48 steps and at the end."""
    state = {"steps": 0, "clipped": 0, "series": None, "told": False, **state}
    plan = window.plan
    if plan is None or not plan.max_grad_norm or plan.max_grad_norm <= 0:
        return state, None
    series = Series.from_state(state["series"], POINTS) if state["series"] else Series(POINTS)
    norms = [
        s.grad_norm for s in window.steps if s.grad_norm is not None and math.isfinite(s.grad_norm)
    ]
    places = range(state["steps"], state["steps"] + len(norms))
    state["steps"] += len(norms)
    state["clipped"] += sum(norm > plan.max_grad_norm for norm in norms)
    series.extend(places, norms)
    state["series"] = series.state()
    if len(series.y) < 8 or not (window.ended or (state["steps"] >= 48 and not state["told"])):
        return state, None
    state["told"] = True
    return state, Clipping(
        steps=state["steps"],
        clipped=state["clipped"],
        threshold=plan.max_grad_norm,
        typical=median(series.y),
        ninetieth=quantiles(series.y, n=10)[-1],
        parameters=plan.parameters,
        scale_free=plan.scale_free,
        epsilon=plan.epsilon,
    )


def cut_away(
    clipping: Clipping,
    *,
    most: Annotated[float, "share of steps; a threshold for outliers cuts a few"] = 0.9,
    kept: Annotated[float, "share of the gradient that is left: cut to almost nothing"] = 0.01,
    kept_sgd: Annotated[
        float, "the same where the rate alone scales the step: a rate ten times smaller; judged"
    ] = 0.1,
    usual: Annotated[float, "the lowest threshold in use; huge units alone do not lower it"] = 0.1,
    resolved: Annotated[
        float, "times the optimizer's epsilon; below it the update shrinks with the gradient"
    ] = 10.0,
    few: Annotated[int, "steps, before which a share says little"] = 16,
) -> Iterator[Fault]:
    """Gradients cut to almost nothing, or cut at nearly every step."""
    if clipping.steps < few or clipping.clipped < most * clipping.steps:
        return
    left = clipping.threshold / clipping.typical
    count = math.sqrt(max(clipping.parameters, 1))
    each, before = min(clipping.threshold, clipping.typical) / count, clipping.typical / count
    # what epsilon rules without any clipping is not the threshold's doing
    lost = clipping.scale_free and each < resolved * clipping.epsilon <= before
    severity: Any = "note"
    slight = left < kept and clipping.threshold < usual if clipping.scale_free else left < kept_sgd
    if lost or slight:
        severity = "warning"
    more = ""
    if lost:
        more = f"; {each:.1g} a number is left, and the optimizer adds eps={clipping.epsilon:.1g}"
    yield Fault(
        f"{clipping.clipped} of {clipping.steps} gradients are clipped at {clipping.threshold:.3g}"
        f": {left:.2%} of a typical one ({clipping.typical:.3g}) is left{more}",
        severity=severity,
        evidence={
            "seen": f"{clipping.clipped / clipping.steps:.0%} clipped",
            "expected": f"<= {most:.0%}",
            "typical": clipping.typical,
            "left": left,
        },
        fix=f"TrainingArguments(..., max_grad_norm={clipping.ninetieth:.2g})"
        "  # the norms' 90th percentile",
    )


FOLLOW_CLIPPING = Monitor(
    name="follow clipping",
    moment="run",
    measures=(Clipping,),
    fold=follow_clipping,
    patient=True,
)

CLIPPING_DOMINATES = Check(
    name="clipping-dominates",
    stage="complexify",
    severity="warning",
    moments=("run",),
    why="Where every step is clipped, the threshold and not the learning rate sets the step.",
    fix="TrainingArguments(..., max_grad_norm=1.0)",
    source="Pascanu et al., On the difficulty of training RNNs (2013); Zhang et al. (2020)",
    unsure="Normalised gradient descent under SGD may be meant: a note, unless under a tenth of "
    "the gradient is left. Under Adam most fine-tunes clip.",
    judges=(cut_away,),
    explains=("loss-not-decreasing", "update-too-small"),
)

__all__ = ["CLIPPING_DOMINATES", "Clipping"]
