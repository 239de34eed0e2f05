"""Would more data help? "The best and preferred way by far to regularize is more real data".

Models trained on nested subsets say what the loss does as the data grow; `learning_curve.fit` says
where that leads. Every size gets as many steps as it needs (the caller stops early), for a fixed
number of epochs undertrains the small ones and makes the curve look steep.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np

from hf_recipe.core.check import Check, Measurement
from hf_recipe.core.exhibit import Answer, Curve, Line, Mark
from hf_recipe.core.finding import Fault
from hf_recipe.regularize.learning_curve import fit

Verdict = Literal["data", "bigger model or longer", "labels or features", "undecided"]
LEAST_ROWS = 16
QUESTION = "Is more data worth it?"


@dataclass(frozen=True)
class DataCurve(Measurement):
    """A learning curve and where it leads.

    Attributes:
        sizes, losses: training rows and held-out loss of each model.
        rows: rows there are now.
        now: loss at `rows`, mean over its models.
        now_error: standard error of `now` over rows and models; 0 where unknown.
        train_now: training loss at `rows`; NaN where unknown.
        twice, four_times: (mean, low, high) of the loss at 2 and 4 times the rows; 80 % interval.
        floor: loss that no amount of such data gets below.
    """

    sizes: tuple[int, ...]
    losses: tuple[float, ...]
    rows: int
    now: float
    now_error: float
    train_now: float
    twice: tuple[float, float, float]
    four_times: tuple[float, float, float]
    floor: float


def nested_subsets(
    rows: int, sizes: Sequence[int], *, labels: Sequence[int] | None = None, seed: int = 0
) -> list[np.ndarray[Any, Any]]:
    """Row numbers of subsets, each within the next larger one; with `labels`, class by class.

    Raises:
        ValueError: a size that is not in 1..rows.
    """
    if not all(0 < size <= rows for size in sizes):
        raise ValueError(f"sizes must be in 1..{rows}; got {list(sizes)}")
    rng = np.random.default_rng(seed)
    order = rng.permutation(rows)
    if labels is not None:
        # Each row's place within its class, as a share: every prefix holds all classes alike.
        classes = np.asarray(labels)[order]
        place = np.empty(rows)
        for value in np.unique(classes):
            own = np.flatnonzero(classes == value)
            place[own] = (np.arange(len(own)) + rng.random()) / len(own)
        order = order[np.argsort(place, kind="stable")]
    return [np.sort(order[:size]) for size in sizes]


def usual_sizes(rows: int, count: int = 4) -> tuple[int, ...]:
    """Sizes that halve from `rows` down, largest last; none under 16 rows."""
    sizes = [round(rows / 2**k) for k in range(count)]
    return tuple(sorted({size for size in sizes if size >= min(LEAST_ROWS, rows)}))


def learning_curve(
    train: Callable[[np.ndarray[Any, Any], int], float | Sequence[float]],
    rows: int,
    *,
    sizes: Sequence[int] | None = None,
    labels: Sequence[int] | None = None,
    seeds: int = 2,
    train_loss: float = math.nan,
) -> DataCurve:
    """Train on nested subsets and extrapolate.

    Args:
        train: (row numbers, seed) -> the loss on held-out rows that are always the same, or the
            losses of those rows; trained until it no longer improves.
        rows: training rows there are.
        sizes: default: halves of `rows`, down to an eighth.
        labels: class of each row: every subset then holds all classes.
        seeds: models of the two smallest sizes, whose losses scatter most; the others get one
            less, but never none.
        train_loss: of the model on all rows, where it is known.

    Raises:
        ValueError: fewer than three sizes (too few rows), or losses that are not finite.
    """
    chosen = sorted(set(sizes or usual_sizes(rows)))
    if len(chosen) < 3:
        raise ValueError(f"{rows} rows give {len(chosen)} sizes, and a curve needs 3")
    found: list[tuple[int, float]] = []
    errors: list[float] = []
    for place, size in enumerate(chosen):
        for seed in range(seeds if place < 2 else max(1, seeds - 1)):
            (subset,) = nested_subsets(rows, [size], labels=labels, seed=seed)
            losses = np.atleast_1d(np.asarray(train(subset, seed), dtype=float))
            found.append((size, float(losses.mean())))
            if size == chosen[-1] and len(losses) > 1:
                errors.append(float(losses.std(ddof=1) / math.sqrt(len(losses))))
    return extrapolate(found, rows, max(errors, default=0.0), train_loss)


def extrapolate(
    found: Sequence[tuple[int, float]],
    rows: int,
    now_error: float = 0.0,
    train_loss: float = math.nan,
) -> DataCurve:
    """The curve through (size, loss) pairs; raises ValueError where three sizes are not there."""
    sizes, losses = [s for s, _ in found], [loss for _, loss in found]
    curve = fit(sizes, losses)
    at_all = [loss for size, loss in found if size == max(sizes) and math.isfinite(loss)]
    return DataCurve(
        tuple(sizes),
        tuple(losses),
        rows,
        sum(at_all) / len(at_all) if at_all else math.nan,
        now_error,
        train_loss,
        curve.predict(2 * rows),
        curve.predict(4 * rows),
        curve.asymptote,
    )


def verdict(curve: DataCurve, *, worth: float = 0.03) -> Verdict:
    """What the loss is held up by.

    "data": twice the rows lower the loss, by the whole of the forecast's interval. Else, where
    training does no better than validation, "bigger model or longer"; where even the best of the
    interval gains less than `worth` of the loss, "labels or features".
    """
    mean, low, high = curve.twice
    if not math.isfinite(curve.now):
        return "undecided"
    if curve.now - high > 0 and curve.now - mean >= worth * curve.now:
        return "data"
    gap = curve.now - curve.train_now
    if math.isfinite(gap) and gap <= max(2 * curve.now_error, worth * curve.now):
        return "bigger model or longer"
    return "labels or features" if curve.now - low < worth * curve.now else "undecided"


def exhibit(curve: DataCurve) -> Curve:
    """The points, the forecast with its interval, and the floor."""
    known = Line("trained", tuple(map(float, curve.sizes)), curve.losses)
    ends = ((curve.now,) * 3, curve.twice, curve.four_times)
    ahead = Line(
        "forecast (80 %)",
        tuple(float(curve.rows * k) for k in (1, 2, 4)),
        tuple(e[0] for e in ends),
        tuple(e[1] for e in ends),
        tuple(e[2] for e in ends),
    )
    return Curve(
        "Learning curve", "regularize", "training rows", "validation loss", (known, ahead),
        (Mark("floor", curve.floor),), log_x=True,
    )  # fmt: skip


def answer(curve: DataCurve) -> Answer:
    """The recipe's question, answered."""
    kind = verdict(curve)
    words = {
        "data": "yes",
        "bigger model or longer": "not now: training does no better; a bigger or longer one first",
        "labels or features": "no: the curve is flat; look at labels and features",
        "undecided": "undecided",
    }[kind]
    return Answer(QUESTION, "regularize", f"{words}; {_forecast(curve)}", {"verdict": kind})


def _forecast(curve: DataCurve) -> str:
    (two, low2, high2), (four, low4, high4) = curve.twice, curve.four_times
    return (
        f"loss {curve.now:.4f} on {curve.rows:,} rows, {two:.4f} [{low2:.4f}, {high2:.4f}] "
        f"foreseen on {2 * curve.rows:,} and {four:.4f} [{low4:.4f}, {high4:.4f}] "
        f"on {4 * curve.rows:,}"
    )


def more_data_helps(
    curve: DataCurve,
    *,
    worth: Annotated[
        float, "3 % of the loss: less than a forecast misses by (median 5-6 %)"
    ] = 0.03,
) -> Iterator[Fault]:
    """Twice the data would lower the loss, by all of the forecast's interval."""
    if verdict(curve, worth=worth) != "data":
        return
    yield Fault(
        f"more rows would help: {_forecast(curve)}",
        subject="training rows",
        evidence={
            "seen": f"{curve.now:.4g} on {curve.rows:,} rows",
            "expected": f"{curve.twice[0]:.4g} on {2 * curve.rows:,}",
            "low": curve.twice[1],
            "high": curve.twice[2],
            "floor": curve.floor,
        },
    )


MORE_DATA_HELPS = Check(
    name="more-data-helps",
    stage="regularize",
    severity="note",
    moments=("end",),
    why="More real data is the best regularizer by far, and what it buys can be foreseen.",
    fix="more_data.learning_curve(train, len(rows), labels=labels)",
    source="Karpathy, A Recipe for Training Neural Networks (2019); Hestness et al. (2017)",
    unsure="A forecast for rows drawn as these were; four times the rows is far.",
    judges=(more_data_helps,),
    call="hf_recipe.regularize.more_data.learning_curve(train, rows)",
)
