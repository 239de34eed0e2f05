"""What would more steps, fewer, or another decay have given this run? Fitted to its own curve.

The recipe: networks keep training for unintuitively long, and the decay belongs to the data set.
At the end (and at half of a long run) the loss law is fitted to what was seen, and asked for the
final loss under other schedules. Each answer is a difference to the run as it was, with its own
interval: what the two share does not widen it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_recipe.complexify.annealing import Features
from hf_recipe.complexify.loss_law import LossLaw, fit
from hf_recipe.core.check import Measurement, State
from hf_recipe.instruments.mixture import quantiles
from hf_recipe.instruments.window import Window

Array = np.ndarray[Any, np.dtype[np.float64]]

POINTS = 1024  # of the loss's course that are kept; then neighbours are averaged
LONGER, SHORTER = "half as many steps again", "six tenths of the steps"
FEWEST_STEPS = 150  # of a run that is judged: a law has three coefficients and a delay
LONG = 1000  # planned steps of a run that is looked at half-way too
DRAWN = 96
LEVEL = 0.8


@dataclass(frozen=True)
class Option:
    """The run under another schedule.

    Attributes:
        name: what is changed.
        steps: optimizer steps.
        loss: predicted final training loss.
        gain, low, high: how much lower that is than the run's own, with its 80 % interval.
        x, y: the predicted curve.
    """

    name: str
    steps: int
    loss: float
    gain: float
    low: float
    high: float
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Outlook(Measurement):
    """Where the loss was going when the run ended.

    Attributes:
        ended: whether the run is over (False: looked at half-way).
        steps: optimizer steps done.
        epochs: passes over the data; 0: not known.
        final, error: mean training loss of the last twentieth of the steps; its standard error.
        settled: share of the run at which the loss first is within one standard error of its end.
        rate_then: the rate there, as a share of the peak.
        undecided: a plateau and a decay do not stand apart in this run, so that the law guesses.
        evaluations: evaluations of the first set.
        falls: fall of the evaluation loss over the last third of them, in units of the scatter
            between neighbours; 0 where there are under six.
        options: predicted outcomes under other schedules.
    """

    ended: bool
    steps: int
    epochs: float
    final: float
    error: float
    settled: float
    rate_then: float
    undecided: bool
    evaluations: int
    falls: float
    options: tuple[Option, ...]

    def option(self, name: str) -> Option | None:
        """The option of this name."""
        return next((option for option in self.options if option.name == name), None)


# -------------------------------------------------------------------- schedules, stretched


def stretched(rates: Array, steps: int) -> Array:
    """The same schedule over another number of steps."""
    old = (np.arange(len(rates)) + 0.5) / len(rates)
    return np.asarray(np.interp((np.arange(steps) + 0.5) / steps, old, rates))


def warmed(rates: Array, shape: Callable[[Array], Array]) -> Array:
    """This run's warm-up, then its peak times `shape` of the share of the rest that is done."""
    top = int((rates >= 0.99 * rates.max()).argmax())
    left = (np.arange(len(rates) - top) + 0.5) / max(len(rates) - top, 1)
    return np.concatenate([rates[:top], rates.max() * shape(left)])


def plateau(share: float) -> Callable[[Array], Array]:
    """One, then a straight line to zero over the last `share`."""
    return lambda t: np.minimum(1.0, (1.0 - t) / share)


def schedules(rates: Array) -> dict[str, Array]:
    """What is asked of the law, by name."""
    steps = len(rates)
    return {
        LONGER: stretched(rates, round(1.5 * steps)),
        SHORTER: stretched(rates, max(1, round(0.6 * steps))),
        "linear to zero": warmed(rates, lambda t: 1.0 - t),
        "cosine to zero": warmed(rates, lambda t: (1 + np.cos(np.pi * t)) / 2),
        "a plateau, and the last fifth linear to zero": warmed(rates, plateau(0.2)),
        "a constant rate": warmed(rates, lambda t: np.ones(len(t))),
    }


def compare(law: LossLaw, rates: Array, other: Array) -> tuple[float, float, float, float]:
    """(final loss under `other`, how much lower than under `rates`, its 80 % interval)."""
    delays = list(dict.fromkeys(member.delay for member in law.members))
    a, b = (Features.of(r, law.reference, delays).end() for r in (rates, other))
    gains, widths, weights, loss = [], [], [], 0.0
    for member in law.members:
        x, y = (f.design(member.delay, member.exponent, law.scale)[-1] for f in (a, b))
        apart = x - y
        gain = float(apart @ member.coefficients)
        parts = apart * member.coefficients
        variance = float(apart @ member.covariance @ apart)
        variance += law.misfit**2 * float(parts @ parts)
        gains.append(gain)
        widths.append(max(math.sqrt(max(variance, 0.0)), 1e-12))
        weights.append(member.weight)
        loss += member.weight * float(y @ member.coefficients)
    centres, shares = np.array(gains), np.array(weights)
    low, high = quantiles(centres, np.array(widths), shares, LEVEL)
    return loss, float(shares @ centres / shares.sum()), low, high


# -------------------------------------------------------------------- the monitor

_START: dict[str, Any] = {
    "points": [],  # [last step, steps, mean loss, mean rate]
    "every": 1,
    "open": [],
    "evaluations": {},
    "half": False,
}


def fold(
    state: State, window: Window, seen: Mapping[str, Measurement]
) -> tuple[State, Outlook | None]:
    """Follow the course; look ahead at half of a long run, and at the end."""
    if not state:
        state = {k: (type(v)(v) if isinstance(v, (list, dict)) else v) for k, v in _START.items()}
    for step in window.finite:
        if math.isfinite(step.learning_rate):
            _keep(state, step.step, step.loss, step.learning_rate)
    if window.evaluation is not None:
        _keep_evaluation(state, window)
        return state, None
    points, plan = state["points"], window.plan
    if not points or points[-1][0] < FEWEST_STEPS:
        return state, None
    half = plan is not None and LONG <= plan.total_steps <= 2 * points[-1][0] and not state["half"]
    if not (window.ended or half):
        return state, None
    state["half"] = True
    epochs = points[-1][0] / plan.steps_per_epoch if plan and plan.steps_per_epoch else 0.0
    first: list[float] = next(iter(state["evaluations"].values()), [])
    return state, look_ahead(np.array(points, float), epochs, first, ended=window.ended)


def _keep(state: State, step: int, loss: float, rate: float) -> None:
    held = state["open"]
    held.append([step, loss, rate])
    if len(held) < state["every"]:
        return
    n = len(held)
    state["points"].append([step, n, sum(h[1] for h in held) / n, sum(h[2] for h in held) / n])
    held.clear()
    if len(state["points"]) >= POINTS:
        pairs = zip(state["points"][::2], state["points"][1::2], strict=True)
        state["points"] = [
            [
                b[0],
                a[1] + b[1],
                *((a[1] * x + b[1] * y) / (a[1] + b[1]) for x, y in zip(a[2:], b[2:], strict=True)),
            ]
            for a, b in pairs
        ]
        state["every"] *= 2


def _keep_evaluation(state: State, window: Window) -> None:
    evaluation = window.evaluation
    assert evaluation is not None
    finite = [x for x in evaluation.row_losses if math.isfinite(x)]
    names = (f"eval_{evaluation.split}_loss", "eval_loss")
    logged = next((evaluation.metrics[n] for n in names if n in evaluation.metrics), math.nan)
    loss = sum(finite) / len(finite) if finite else logged
    if math.isfinite(loss):
        kept = state["evaluations"].setdefault(evaluation.split, [])
        state["evaluations"][evaluation.split] = [*kept, loss][-200:]


def look_ahead(
    points: Array, epochs: float, evaluations: list[float], *, ended: bool
) -> Outlook | None:
    """The outlook from (last step, steps, loss, rate) of each stretch; None where no law fits."""
    ends, losses = points[:, 0], points[:, 2]
    steps = int(ends[-1])
    middles = ends - (points[:, 1] - 1) / 2
    rates = np.interp(np.arange(1, steps + 1), middles, points[:, 3])
    if not rates.max() > 0:
        return None
    try:
        law = fit([(rates.tolist(), (middles - 1).tolist(), losses.tolist())])
        asked = {name: (r, compare(law, rates, r)) for name, r in schedules(rates).items()}
    except (ValueError, np.linalg.LinAlgError):
        return None
    last = losses[ends > 0.95 * steps]
    error = float(last.std(ddof=1) / math.sqrt(len(last))) if len(last) > 1 else 0.0
    settled = _settled(losses, float(last.mean()) + error)
    return Outlook(
        ended=ended,
        steps=steps,
        epochs=epochs,
        final=float(last.mean()),
        error=error,
        settled=float(ends[settled] / steps),
        rate_then=float(points[settled, 3] / rates.max()),
        undecided=law.undecided,
        evaluations=len(evaluations),
        falls=_falls(evaluations),
        options=(
            _option("as it was", law, rates, compare(law, rates, rates)),
            *(_option(name, law, r, told) for name, (r, told) in asked.items()),
        ),
    )


def _settled(losses: Array, level: float) -> int:
    """End of the first twentieth of the run whose mean is at `level`."""
    width = max(1, len(losses) // 20)
    means = np.convolve(losses, np.ones(width) / width, mode="valid")
    return min(int((means <= level).argmax()) + width - 1, len(losses) - 1)


def _falls(evaluations: list[float]) -> float:
    if len(evaluations) < 6:
        return 0.0
    values = np.array(evaluations)
    third = max(3, len(values) // 3)
    late = values[-third:]
    scatter = float(np.abs(np.diff(values, 2)).mean()) / math.sqrt(6) / 0.8 + 1e-12
    slope = float(np.polyfit(np.arange(third), late, 1)[0])
    spread = math.sqrt(12 / (third * (third**2 - 1))) * scatter
    return -slope / spread


def _option(
    name: str, law: LossLaw, rates: Array, told: tuple[float, float, float, float]
) -> Option:
    loss, gain, low, high = told
    curve = law.predict(rates.tolist())
    at = np.unique(np.linspace(0, len(curve) - 1, DRAWN).astype(int))
    at = at[at >= len(curve) // 20]  # the law does not follow a run's first steps
    x, y = tuple((at + 1.0).tolist()), tuple(curve[at].tolist())
    return Option(name, len(rates), loss, gain, low, high, x, y)
