"""Overfitting: validation turns while training falls.

The recipe: first overfit, then "give up some training loss to improve the validation loss". So it
matters when validation turned, by how much, and on what. The turn is judged on the metric that
the run declares (a loss may rise, from overconfidence, while accuracy still improves), against
the paired standard error of the rows where their losses are known, and only while the training
loss keeps falling: a model that has interpolated its training set and generalises is silent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from hf_recipe.core.check import Check, Measurement, Monitor, Probe, State
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.window import Evaluation, Window
from hf_recipe.regularize import circumstances
from hf_recipe.regularize.circumstances import Circumstances
from hf_recipe.regularize.metric_names import chosen_metric
from hf_recipe.regularize.selection import stoppers


@dataclass(frozen=True)
class DeclaredMetric(Measurement):
    """The metric by which this run chooses: its name in the logs, and whether more is better.

    ``guarded``: the run stops early and ends with its best weights.
    """

    name: str
    greater_is_better: bool
    guarded: bool = False


@dataclass(frozen=True)
class Turn(Measurement):
    """How far an evaluation set lies behind its best, and what training did meanwhile.

    Attributes:
        metric, greater_is_better: what is compared.
        best_step, step: optimizer steps done at the best evaluation, and at the latest one.
        best, latest: the metric's value there; ``latest`` is the median of the last three.
        worse: how much worse ``latest`` is, in the metric's unit; positive is worse.
        scatter: standard deviation of one evaluation around the metric's own course.
        paired_error: standard error of the difference over rows, where the metric is the loss and
            the rows' losses are known; otherwise 0.
        since: evaluations after the best one.
        train_before, train_after: mean training loss around the best evaluation, and now.
        train_error: standard error of their difference.
        advice: remedies in the recipe's order, with what this run says about each.
        guarded: whether the run stops early by itself and ends with its best weights.
    """

    metric: str
    greater_is_better: bool
    best_step: int
    step: int
    best: float
    latest: float
    worse: float
    scatter: float
    paired_error: float
    since: int
    train_before: float
    train_after: float
    train_error: float
    advice: tuple[str, ...] = ()
    guarded: bool = False


def take(subject: Any) -> Iterator[DeclaredMetric | Circumstances]:
    """Read the declared metric off the arguments; without one, it is the evaluation loss."""
    yield from circumstances.take(subject)
    args = subject.args
    greater = bool(args.greater_is_better) if args.metric_for_best_model else False
    guarded = bool(args.load_best_model_at_end) and bool(stoppers(subject.trainer))
    yield DeclaredMetric(chosen_metric(None, args), greater, guarded)


def _mean(values: list[float]) -> tuple[float, float]:
    """Mean and its variance, of the finite values."""
    finite = [v for v in values if math.isfinite(v)]
    if len(finite) < 2:
        return (finite[0] if finite else math.nan), math.nan
    mean = sum(finite) / len(finite)
    return mean, sum((v - mean) ** 2 for v in finite) / (len(finite) - 1) / len(finite)


def fold(
    state: State, window: Window, seen: Mapping[str, Measurement]
) -> tuple[State, Turn | None]:
    """Keep the best evaluation of each split, with its rows and the training loss around it."""
    state = dict(state) or {"train": [], "splits": {}}
    state["train"] = [*state["train"], *(s.loss for s in window.steps)][-100:]
    if window.evaluation is None:
        return state, None
    declared = seen.get(DeclaredMetric.kind())
    if not isinstance(declared, DeclaredMetric):
        declared = DeclaredMetric("eval_loss", False)
    value = _value(window.evaluation, declared.name)
    if value is None or not math.isfinite(value):
        return state, None
    evaluation = window.evaluation
    signed = -value if declared.greater_is_better else value
    split = dict(state["splits"].get(evaluation.split) or {"values": [], "since": 0, "best": None})
    split["values"] = [*split["values"], signed][-200:]
    around = [v for v in state["train"] if math.isfinite(v)][-20:]
    rows = list(evaluation.row_losses) if declared.name.endswith("loss") else []
    best = split["best"]
    state["splits"] = {**state["splits"], evaluation.split: split}
    if best is None or signed < best["signed"]:
        best = {"signed": signed, "step": evaluation.step, "rows": rows, "train": around}
        split["best"], split["since"] = best, 0
    else:
        split["since"] += 1
    recent = sorted(split["values"][-min(3, split["since"] + 1) :])
    latest = recent[len(recent) // 2]
    before, after = _mean(best["train"]), _mean(around)
    sign = -1.0 if declared.greater_is_better else 1.0
    return state, Turn(
        metric=declared.name,
        greater_is_better=declared.greater_is_better,
        best_step=int(best["step"]),
        step=evaluation.step,
        best=sign * best["signed"],
        latest=sign * latest,
        worse=max(0.0, latest - best["signed"]),
        scatter=_scatter(split["values"]),
        paired_error=_paired(best["rows"], rows),
        since=split["since"],
        train_before=before[0],
        train_after=after[0],
        train_error=math.sqrt(before[1] + after[1]),
        advice=circumstances.advice(seen, int(best["step"])),
        guarded=declared.guarded,
    )


def _value(evaluation: Evaluation, name: str) -> float | None:
    """The metric's value: under its own name, or with the evaluation set's name in it."""
    bare = name.removeprefix("eval_")
    for key in (f"eval_{evaluation.split}_{bare}", name):
        if key in evaluation.metrics:
            return float(evaluation.metrics[key])
    return None


def _scatter(values: list[float]) -> float:
    """Standard deviation of one value around the course of its neighbours."""
    bends = [
        (a - 2 * b + c) ** 2 / 6
        for a, b, c in zip(values[:-2], values[1:-1], values[2:], strict=True)
    ][-20:]
    return math.sqrt(sorted(bends)[len(bends) // 2] / 0.455) if bends else 0.0  # chi-square median


def _paired(best: list[float], rows: list[float]) -> float:
    """Standard error of the mean difference of the same rows."""
    if not rows or len(rows) != len(best):
        return 0.0
    variance = _mean([a - b for a, b in zip(rows, best, strict=True)])[1]
    return math.sqrt(variance) if math.isfinite(variance) else 0.0


def overfitting(
    turn: Turn,
    *,
    z: Annotated[float, "scatters: the best of 30 evaluations alone lies 2 under the course"] = 5,
    z_rows: Annotated[float, "paired standard errors: 1 % by chance, two-sided"] = 2.6,
    relative: Annotated[
        float, "2 % of the best value: a smaller turn costs less than it says"
    ] = 0.02,
) -> Iterator[Fault]:
    """Validation is worse than it was, beyond noise, and training is better."""
    if turn.since < 3:
        return
    noise = max(z * turn.scatter, z_rows * turn.paired_error)
    if not (noise >= 0 and turn.worse > max(noise, relative * abs(turn.best))):
        return
    allowed = max(noise, relative * abs(turn.best))
    if not turn.train_before - turn.train_after > 2 * turn.train_error:
        return
    error = max(turn.scatter, turn.paired_error)
    yield Fault(
        message=f"{turn.metric} was best at step {turn.best_step:,} ({turn.best:.4g}) and is "
        f"{turn.worse:.2g} +- {error:.1g} worse at step {turn.step:,}, while "
        f"the training loss fell from {turn.train_before:.3g} to {turn.train_after:.3g}; "
        + ("early stopping keeps the best weights; " if turn.guarded else "")
        + f"in the recipe's order: {', '.join(turn.advice)}",
        subject=turn.metric,
        severity="note" if turn.guarded else None,
        evidence={
            "seen": f"{turn.latest:.4g} after {turn.best:.4g} at step {turn.best_step:,}",
            "expected": f"less than {allowed:.2g} worse than its best",
            "best_step": turn.best_step,
            "worse": turn.worse,
            "scatter": turn.scatter,
            "paired_error": turn.paired_error,
            "train_before": turn.train_before,
            "train_after": turn.train_after,
        },
    )


OVERFITTING = Check(
    name="overfitting",
    stage="regularize",
    severity="warning",
    moments=("eval",),
    why="From the turn on, training only learns what does not carry over; the weights of the "
    "turn are the best of this run.",
    fix="load_best_model_at_end=True; then add data or augmentation before dropout or decay",
    source="Karpathy, A Recipe for Training Neural Networks (2019); Prechelt (1998)",
    judges=(overfitting,),
    unsure="Double descent and grokking: validation may come back much later.",
)
PROBE = Probe(
    name="read the declared metric",
    moment="static",
    measures=(DeclaredMetric, Circumstances),
    take=take,
    serves=("overfitting", "late-metric-noise"),
)
MONITOR = Monitor(
    name="watch validation turn", moment="eval", measures=(Turn,), fold=fold, patient=True
)
