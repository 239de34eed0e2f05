"""A study: its trials as arrays, in the units of its search space.

Whatever searched (quasi-random points, Optuna, a W&B sweep), a study is a list of trials. Here
they are checked, flattened and put on the scale that they were drawn on: every number becomes its
quantile in the space, so that one per cent of a logarithmic range is one per cent. Scores are
turned so that less is better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_recipe.instruments.numbers import number_of, numbers_of
from hf_recipe.tune.space import Parameter, parameters_of

Array = np.ndarray[Any, np.dtype[np.float64]]

COMPLETE = ("complete", "completed", "finished", "success")
FAILED = ("failed", "fail", "crashed", "diverged", "infeasible")
RUNNING = ("running", "waiting", "pending", "queued")
# Whoever was stopped, by hand or as hopeless, has not said whether it could have come to its end.
STOPPED = ("pruned", "killed", "stopped", "preempting", "preempted")


@dataclass(frozen=True)
class Trial:
    """One trial.

    Attributes:
        number: as its search counts; else its place among all.
        params: values by dotted parameter name.
        score: the metric, less is better; NaN: the trial failed or diverged.
        failed: it gave no finite value.
        seed: of the run; None: not told.
        curve: the metric over the run, less is better.
    """

    number: int
    params: dict[str, Any]
    score: float
    failed: bool
    seed: int | None
    curve: tuple[float, ...]


@dataclass(frozen=True)
class Study:
    """Trials with their space.

    Attributes:
        metric: name of what was measured.
        sign: 1 where less is better, -1 where more is.
        trials: the finished ones, in order.
        parameters: those that vary in the space.
        places: (trials, parameters) quantile of each value in the space; NaN where the trial
            lacks it. Those of values without an order are NaN.
        open: trials that are at work, or were stopped before their end.
    """

    metric: str
    sign: float
    trials: tuple[Trial, ...]
    parameters: tuple[Parameter, ...]
    places: Array
    open: int = 0

    @property
    def scores(self) -> Array:
        return np.array([trial.score for trial in self.trials])

    @property
    def done(self) -> np.ndarray[Any, np.dtype[np.intp]]:
        """Row numbers of the trials with a finite score."""
        return np.flatnonzero(np.isfinite(self.scores))

    def value(self, score: float) -> float:
        """A score in the metric's own direction."""
        return float(self.sign * score)


def name_of(parameter: Parameter) -> str:
    """The parameter's dotted name."""
    return ".".join(parameter.path)


def read_study(
    trials: Sequence[Mapping[str, Any]],
    space: Mapping[str, Any],
    metric: str,
    greater_is_better: bool,
) -> Study:
    """Check and flatten trials; those without an end are left out.

    Raises:
        ValueError: no trials, a trial without params or with an unknown state, a space that makes
            no sense.
    """
    sign = -1.0 if greater_is_better else 1.0
    parameters = tuple(p for p in parameters_of(space) if p.varies)
    read = [_trial(i, trial, sign) for i, trial in enumerate(trials)]
    if not read:
        raise ValueError("trials is empty: there is no study to look at")
    kept = tuple(trial for trial in read if trial is not None)
    places = np.full((len(kept), len(parameters)), np.nan)
    for j, parameter in enumerate(parameters):
        name = name_of(parameter)
        for i, trial in enumerate(kept):
            if name in trial.params:
                places[i, j] = place(parameter, trial.params[name])
    return Study(metric, sign, kept, parameters, places, len(read) - len(kept))


def _trial(number: int, trial: Mapping[str, Any], sign: float) -> Trial | None:
    if not isinstance(trial, Mapping) or not isinstance(trial.get("params"), Mapping):
        raise ValueError(f"trial {number}: expected a mapping with 'params'; got {trial!r:.80}")
    state = str(trial.get("state", "complete")).lower()
    if state in (*RUNNING, *STOPPED):
        return None
    if state not in (*COMPLETE, *FAILED):
        raise ValueError(f"trial {number}: state must be 'complete' or 'failed'; got {state!r}")
    value, curve, seed = (trial.get(key) for key in ("value", "curve", "seed"))
    if isinstance(value, (bool, str)):
        raise ValueError(f"trial {number}: value must be a number or None; got {value!r}")
    score = math.nan if value is None else sign * number_of(value, f"trial {number}: value")
    good = state in COMPLETE and math.isfinite(score)
    points = numbers_of(() if curve is None else curve, f"trial {number}: curve", axes=1)
    return Trial(
        number=int(trial.get("number", number)),
        params=dict(flat(trial["params"])),
        score=score if good else math.nan,
        failed=not good,
        seed=None if seed is None else int(number_of(seed, f"trial {number}: seed")),
        curve=tuple((sign * points).tolist()),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating))


def flat(params: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted name, value) of everything in nested params."""
    found: list[tuple[str, Any]] = []
    for key, value in params.items():
        if isinstance(value, Mapping):
            found += flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def levels(parameter: Parameter) -> tuple[Any, ...]:
    """The values of a categorical parameter, in the space's order; () for a stretch of numbers."""
    if parameter.distribution != "categorical":
        return ()
    seen: list[Any] = []
    for u in np.linspace(0, 1, 513)[:-1]:
        value = parameter.at(float(u))
        if not any(value is s or value == s for s in seen):
            seen.append(value)
    return tuple(seen)


def place(parameter: Parameter, value: Any) -> float:
    """The quantile at which `value` lies in the parameter's range; NaN without an order."""
    if parameter.distribution == "categorical":
        known = levels(parameter)
        if not all(_is_number(v) and not isinstance(v, bool) for v in known):
            return math.nan
        order = sorted(known)
        return (order.index(value) + 0.5) / len(order) if value in order else math.nan
    if not _is_number(value) or not math.isfinite(float(value)):
        return math.nan
    low, high = 0.0, 1.0 - 1e-9
    falling = parameter.at(high) < parameter.at(low)
    first, last = low, high
    for _ in range(45):  # quantile functions are monotone: bisection serves every distribution
        middle = (low + high) / 2
        if (parameter.at(middle) < value) != falling:
            low = middle
        else:
            high = middle
    below, above = parameter.at(first), parameter.at(last)
    if value in (below, above) and parameter.distribution == "int_uniform" and above > below:
        return float((float(value) - below + 0.5) / (above - below + 1))
    u = (low + high) / 2
    return float(1 - u if falling else u)


def same_settings(trials: Sequence[Trial]) -> list[list[int]]:
    """Row numbers of trials with equal parameters, in order of appearance."""
    groups: dict[str, list[int]] = {}
    for i, trial in enumerate(trials):
        groups.setdefault(repr(sorted(trial.params.items(), key=lambda p: p[0])), []).append(i)
    return list(groups.values())


def expected_best(scores: Array, draws: int) -> float:
    """Expected best (lowest) of `draws` trials drawn without replacement: unbiased up to all.

    The U-statistic; its biased relative is the V-statistic of Dodge et al. (2019).
    """
    ordered = np.sort(scores[np.isfinite(scores)])
    n = len(ordered)
    if not 1 <= draws <= n:
        raise ValueError(f"draws must lie between 1 and the {n} finite scores; got {draws}")
    # P(the i-th best is the best of the draw) = C(n - i - 1, draws - 1) / C(n, draws)
    weights = np.zeros(n)
    weights[0] = draws / n
    for i in range(1, n - draws + 1):
        weights[i] = weights[i - 1] * (n - i - draws + 1) / (n - i)
    return float(weights @ ordered)
