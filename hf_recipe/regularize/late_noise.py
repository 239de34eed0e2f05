"""Does the metric still jump from evaluation to evaluation, late in training?

Which checkpoint or which setting is "best" is then decided by when one looked. The playbook names
the remedies: let the rate decay, average weights, or enlarge the batch. The rows of an evaluation
set are the same each time, so what is seen here is the weights' own moving about.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Annotated

from hf_recipe.core.check import Check, Measurement, Monitor, State
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.window import Window
from hf_recipe.regularize.overfitting import DeclaredMetric

KEPT = 400  # evaluations of a set
FEWEST = 8


@dataclass(frozen=True)
class LateNoise(Measurement):
    """The later half of a metric's evaluations.

    Attributes:
        metric: its name in the log; split: the evaluation set.
        evaluations: in the later half of the run.
        level: their mean.
        scatter: standard deviation of one evaluation around its neighbours' course, from the
            median, so that a single jump is none.
        gain: how far the metric's course (Theil and Sen's line) moves over that half.
        apart: how far the best of them is from the second best.
        rate: last learning rate over the run's peak.
    """

    metric: str
    split: str
    evaluations: int
    level: float
    scatter: float
    gain: float
    apart: float
    rate: float


def fold(
    state: State, window: Window, seen: Mapping[str, Measurement]
) -> tuple[State, LateNoise | None]:
    """Keep each set's metric; measure at the end."""
    state = dict(state) or {"sets": {}, "peak": 0.0, "rate": 0.0}
    if window.rates:
        state["peak"] = max(state["peak"], *window.rates)
        state["rate"] = window.rates[-1]
    if window.evaluation is not None:
        declared = seen.get(DeclaredMetric.kind())
        name = declared.name if isinstance(declared, DeclaredMetric) else "eval_loss"
        metrics, split = window.evaluation.metrics, window.evaluation.split
        own = name.replace("eval_", f"eval_{split}_", 1)
        value = metrics.get(own, metrics.get(name, math.nan))
        if math.isfinite(value):
            known = [*state["sets"].get(split, []), [window.evaluation.step, value, name]]
            state["sets"] = {**state["sets"], split: known[-KEPT:]}
        return state, None
    if not window.ended:
        return state, None
    for split, values in state["sets"].items():
        half = [v for v in values if v[0] > values[-1][0] / 2]
        if len(half) >= FEWEST and state["peak"] > 0:
            return state, _measure(split, half, state["rate"] / state["peak"])
    return state, None


def _measure(split: str, half: list[list[float]], rate: float) -> LateNoise:
    values = [float(v[1]) for v in half]
    n = len(values)
    level = sum(values) / n
    slope = median([(values[j] - values[i]) / (j - i) for j in range(n) for i in range(j)])
    bends = [abs(values[i - 1] - 2 * values[i] + values[i + 1]) for i in range(1, n - 1)]
    ordered = sorted(values)
    return LateNoise(
        metric=str(half[0][2]),
        split=split,
        evaluations=n,
        level=level,
        scatter=median(bends) / 0.6745 / math.sqrt(6),
        gain=abs(slope) * (n - 1),
        apart=min(ordered[1] - ordered[0], ordered[-1] - ordered[-2]),
        rate=rate,
    )


def noisy(
    noise: LateNoise,
    *,
    share: Annotated[float, "of the metric; most single changes gain less than 2 %"] = 0.02,
) -> Iterator[Fault]:
    """Evaluations jump by more than the metric gained in the whole later half."""
    if not noise.scatter > max(share * abs(noise.level), noise.gain):
        return
    yield Fault(
        f"in the later half of the run {noise.metric} jumps by {noise.scatter:.3g} from one of "
        f"{noise.evaluations} evaluations to the next ({noise.scatter / abs(noise.level):.0%} of "
        f"it), and its course moved by {noise.gain:.3g} alone: differences below "
        f"{2.8 * noise.scatter:.2g} between two checkpoints, or two runs, are when one looked",
        subject=noise.metric,
        evidence={
            "seen": f"scatter {noise.scatter:.3g}",
            "expected": f"under {share:.0%} of {abs(noise.level):.3g}",
            "gain": noise.gain,
            "rate": noise.rate,
        },
        fix='TrainingArguments(..., lr_scheduler_type="linear")  # or average the last weights'
        if noise.rate > 0.1
        else "TrainingArguments(..., gradient_accumulation_steps=4)  # or average the last weights",
    )


LATE_NOISE = Monitor("follow the metric's scatter", "eval", (LateNoise,), fold, patient=True)

LATE_METRIC_NOISE = Check(
    name="late-metric-noise",
    stage="regularize",
    severity="note",
    moments=("eval",),
    why="Where neighbouring checkpoints differ more than the settings compared, the one that is "
    "chosen was lucky.",
    fix='TrainingArguments(..., lr_scheduler_type="linear")',
    source="Godbole et al., Deep Learning Tuning Playbook (2023), training curves",
    judges=(noisy,),
    unsure="Fewer than eight evaluations in the later half are not judged.",
)
