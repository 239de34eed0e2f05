"""Does the training loss fall at all?

Told at the end, of weights that began with no knowledge (a loss at or above the input-blind level
before step 1), once as much learning rate was spent as 32 steps at its peak give, and only where
a fall of three hundredths would have stood out of the noise. A trained model that has nothing
left to fall, a warm-up that has not ended, and a loss too noisy to tell give no verdict.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Annotated, Any

from hf_recipe.baselines.initial_loss import InitialLoss
from hf_recipe.core.check import Check, Measurement, Monitor
from hf_recipe.core.exhibit import Series
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.window import Window

POINTS = 256


@dataclass(frozen=True)
class LossFall(Measurement):
    """The loss of the first half of the run against that of the second.

    Attributes:
        steps: optimizer steps.
        before: loss before step 1.
        prior: the loss of the best answer that ignores its input.
        first, last: mean losses of the two halves (by learning rate spent).
        error: standard error of their difference.
        spent: learning rate spent, in steps at the run's own peak.
        task: how the head was read.
    """

    steps: int
    before: float
    prior: float
    first: float
    last: float
    error: float
    spent: float
    task: str


@dataclass(frozen=True)
class LossRange(Measurement):
    """Between which values the losses of all steps lay.

    Attributes:
        steps: with a finite loss and a rate above zero.
        lowest, highest: of their losses.
    """

    steps: int
    lowest: float
    highest: float


def follow_range(
    state: dict[str, Any], window: Window, seen: Mapping[str, Measurement]
) -> tuple[dict[str, Any], LossRange | None]:
    """Keep the lowest and the highest loss; measures once after 48 steps, and at the end."""
    state = {"steps": 0, "lowest": math.inf, "highest": -math.inf, "told": False, **state}
    losses = [step.loss for step in window.finite if step.learning_rate > 0]
    if losses:
        state["steps"] += len(losses)
        state["lowest"] = min(state["lowest"], *losses)
        state["highest"] = max(state["highest"], *losses)
    due = state["steps"] >= 48 and not state["told"]
    if not state["steps"] or not (due or window.ended):
        return state, None
    state["told"] = True
    return state, LossRange(state["steps"], state["lowest"], state["highest"])


def follow_fall(
    state: dict[str, Any], window: Window, seen: Mapping[str, Measurement]
) -> tuple[dict[str, Any], LossFall | None]:
    """Keep at most 256 points of loss by learning rate spent; measures at the end."""
    state = {"series": None, "spent": 0.0, "peak": 0.0, "steps": 0, **state}
    series = Series.from_state(state["series"], POINTS) if state["series"] else Series(POINTS)
    spent, places = state["spent"], []
    for step in window.steps:
        if math.isfinite(step.learning_rate):
            spent += step.learning_rate
        if math.isfinite(step.loss):
            places.append(spent)
    series.extend(places, window.losses)
    state |= {
        "series": series.state(),
        "spent": spent,
        "peak": max([state["peak"], *window.rates]),
        "steps": state["steps"] + len(window.steps),
    }
    start = seen.get(InitialLoss.kind())
    if not window.ended or len(series.y) < 16 or not isinstance(start, InitialLoss):
        return state, None
    middle = state["spent"] / 2
    first = [y for x, y in zip(series.x, series.y, strict=True) if x <= middle]
    last = [y for x, y in zip(series.x, series.y, strict=True) if x > middle]
    if len(first) < 8 or len(last) < 8:
        half = len(series.y) // 2
        first, last = series.y[:half], series.y[half:]
    mean_first, error_first = _mean(first)
    mean_last, error_last = _mean(last)
    peak = state["peak"]
    return state, LossFall(
        steps=state["steps"],
        before=start.observed,
        prior=start.prior,
        first=mean_first,
        last=mean_last,
        error=math.hypot(error_first, error_last),
        spent=state["spent"] / peak if peak > 0 else float(state["steps"]),
        task=start.task,
    )


def _mean(values: list[float]) -> tuple[float, float]:
    """Mean and standard error; a spike counts as ten deviations."""
    middle = median(values)
    far = 10 * 1.4826 * median(abs(x - middle) for x in values)
    if far > 0:
        values = [min(max(x, middle - far), middle + far) for x in values]
    mean = sum(values) / len(values)
    variance = sum((x - mean) ** 2 for x in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def no_fall(
    fall: LossFall,
    *,
    min_spent: Annotated[
        float, "steps at the peak rate; healthy tiny runs fall within ten of them"
    ] = 32.0,
    visible: Annotated[
        float, "share of the first half's loss; labels of which 40 % are wrong leave 0.03"
    ] = 0.03,
    ignorant: Annotated[
        float, "share of the input-blind loss that a model without knowledge begins at"
    ] = 0.9,
    unit_scale: Annotated[
        float, "variance of a target; beyond it, unscaled-target names the cause"
    ] = 1e4,
) -> Iterator[Fault]:
    """Two halves of an ignorant model's run, alike within a noise that hides nothing, or worse."""
    if fall.spent < min_spent or not fall.before >= ignorant * fall.prior:
        return
    if fall.task == "regression" and not 1 / unit_scale <= fall.prior <= unit_scale:
        return
    fell = fall.first - fall.last
    worse = fall.last - fall.before
    above = worse > max(visible * abs(fall.before), 3 * fall.error) and fall.first > fall.before
    could_be = fell + 2 * fall.error
    if not above and (fell > 2 * fall.error or not could_be <= visible * abs(fall.first)):
        return
    if fall.last < fall.before - max(visible * abs(fall.before), 3 * fall.error):
        return  # it fell before the halves could tell
    where = " below where it began" if above else ""
    yield Fault(
        f"the training loss did not fall{where}: {fall.before:.4g} before step 1, "
        f"{fall.first:.4g} in the first half and {fall.last:.4g} in the second half of "
        f"{fall.steps} steps "
        f"(+- {fall.error:.2g}; ignoring the input gives {fall.prior:.4g})",
        evidence={
            "seen": f"fell by {fell:.2g}",
            "expected": f"> {2 * fall.error:.2g}",
            "first": fall.first,
            "last": fall.last,
            "error": fall.error,
            "spent": fall.spent,
        },
    )


def one_number(
    course: LossRange,
    *,
    enough: Annotated[int, "steps; a few batches may agree by chance in half precision"] = 24,
    apart: Annotated[float, "relative; float32 tells 1e-7 apart, bfloat16 losses 4e-3"] = 1e-6,
) -> Iterator[Fault]:
    """The very same loss in every step, whatever the rows: no input and no weight reaches it."""
    size = max(abs(course.lowest), abs(course.highest))
    if course.steps < enough or not size or course.highest - course.lowest > apart * size:
        return
    yield Fault(
        f"the training loss is {course.highest:.6g} in every one of {course.steps} steps: neither "
        "rows nor weights change it",
        evidence={"seen": f"{course.highest:.6g} throughout", "expected": "another in each batch"},
        fix="two models that are to be compared must be two: copy.deepcopy(model) for a reference",
    )


FOLLOW_RANGE = Monitor(
    name="follow the loss's range",
    moment="run",
    measures=(LossRange,),
    fold=follow_range,
    patient=True,
)

FOLLOW_FALL = Monitor(
    name="follow the loss's fall",
    moment="run",
    measures=(LossFall,),
    fold=follow_fall,
    patient=True,
)

LOSS_NOT_DECREASING = Check(
    name="loss-not-decreasing",
    stage="baselines",
    severity="warning",
    moments=("run",),
    why="A loss that stays where it began has learned nothing: the rate, the loss or the wiring.",
    fix="TrainingArguments(..., learning_rate=10 * args.learning_rate)  # if one batch can be fit",
    source="Karpathy, A Recipe for Training Neural Networks (2019), 'overfit one batch'",
    unsure="Delayed generalisation begins with a plateau; labels that are pure noise never fall.",
    judges=(no_fall, one_number),
)

__all__ = ["LOSS_NOT_DECREASING", "LossFall"]
