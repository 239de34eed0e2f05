"""Comparisons: one change at a time, trained with several seeds, judged on the same rows.

Accuracy on a few hundred rows resolves nothing under two points; the losses of the same rows,
paired, do. Two things move a comparison: which rows are in the evaluation set, and which seed
was drawn. Both stand in the interval; one seed alone cannot tell the second, and then the answer
is "undecided".
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hf_recipe.core.check import plain, unplain
from hf_recipe.core.exhibit import Ladder, Rung
from hf_recipe.core.finding import Stage
from hf_recipe.core.report import write_atomically
from hf_recipe.instruments.distributed import from_rank_0, rank

# Measured on small networks (digits, tables): 0.9 to 5 where training had settled. It counts as
# much as two degrees of freedom, and gives way to what the seeds themselves say.
SEEDS_OVER_ROWS, USUAL_WORTH = 2.5, 2


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
        change: what differs from the baseline, in words.
        settings: everything that `train` needs to know, as JSON-able values.
        seed: of weights, order and noise.
    """

    change: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def key(self) -> str:
        """A short name that is the same for the same settings and seed."""
        text = json.dumps([plain(self.settings), self.seed], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Outcome:
    """What a training gave.

    Attributes:
        row_losses: loss of each evaluation row, in the set's order (nats, or squared units).
        cost: seconds of training.
        metric: the task's metric on the same rows, if there is one.
        facts: anything else worth keeping, JSON-able.
    """

    row_losses: tuple[float, ...]
    cost: float = 0.0
    metric: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Mean over rows; NaN where there are none."""
        return float(np.mean(self.row_losses)) if self.row_losses else math.nan

    @property
    def standard_error(self) -> float:
        """Of the mean over rows."""
        rows = np.asarray(self.row_losses)
        return float(rows.std(ddof=1) / math.sqrt(len(rows))) if len(rows) > 1 else math.nan


@dataclass(frozen=True)
class Gain:
    """Mean paired fall of the loss (positive is better) with its interval.

    ``seeds`` says over how many seeds; with one, the interval holds the rows' share alone.
    """

    mean: float
    low: float
    high: float
    seeds: int = 1

    @property
    def verdict(self) -> bool | None:
        """True: better, False: worse, None: the interval holds 0."""
        if self.low > 0:
            return True
        return False if self.high < 0 or not math.isfinite(self.mean) else None

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def paired_gain(
    before: Sequence[Sequence[float]],
    after: Sequence[Sequence[float]],
    *,
    level: float = 0.95,
    seed_variance: tuple[float, int] | None = None,
) -> Gain:
    """The gain of `after` on `before`: per-row losses, one sequence per seed, paired by both.

    The variance of the mean is that of rows (each averaged over seeds) plus that of seeds (each
    averaged over rows), less what stands in both: how single rows scatter from seed to seed. The
    quantile is Student's, its degrees of freedom by Satterthwaite.

    Args:
        before, after: losses of shape (seeds, rows).
        level: of the interval.
        seed_variance: (variance of one seed's gain, its degrees of freedom), pooled over a
            ladder; default: from these seeds.

    Raises:
        ValueError: the two were not evaluated on the same rows with the same seeds.
    """
    from scipy.special import stdtrit

    first, second = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if first.shape != second.shape or first.ndim != 2 or not first.shape[1]:
        raise ValueError(
            f"paired losses need the same seeds and rows; got {first.shape} and {second.shape}"
        )
    if not np.isfinite(second).all():
        return Gain(-math.inf, -math.inf, -math.inf, len(first))
    if not np.isfinite(first).all():
        return Gain(math.inf, math.inf, math.inf, len(first))
    gains = first - second
    seeds, rows = gains.shape
    mean = float(gains.mean())
    parts = []
    if rows > 1:
        own = float(gains.mean(0).var(ddof=1)) / rows
        if seeds > 1:
            rest = gains - gains.mean(0) - gains.mean(1, keepdims=True) + mean
            both = float((rest * rest).sum()) / ((rows - 1) * (seeds - 1))
            own = max(0.0, own - both / (rows * seeds))
        parts.append((own, rows - 1))
    spread = seed_variance or seed_spread([gains])
    if spread is not None:
        parts.append((spread[0] / seeds, spread[1]))
    variance = sum(part for part, _ in parts)
    if not variance > 0:
        return Gain(mean, mean, mean, seeds)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    half = float(stdtrit(freedom, 0.5 + level / 2)) * math.sqrt(variance)
    return Gain(mean, mean - half, mean + half, seeds)


def seed_spread(gains: Sequence[np.ndarray]) -> tuple[float, int] | None:
    """Variance of one seed's mean gain and its degrees of freedom, pooled over comparisons.

    Args:
        gains: one array (seeds, rows) per comparison.
    """
    kept = [g.mean(1) for g in gains if len(g) > 1 and np.isfinite(g).all()]
    freedom = sum(len(g) - 1 for g in kept)
    if not freedom:
        return None
    return sum(float(g.var(ddof=1)) * (len(g) - 1) for g in kept) / freedom, freedom


def residual_spread(losses: Sequence[np.ndarray]) -> tuple[float, int] | None:
    """Variance of one seed's gain between any two of these trainings, and its degrees of freedom.

    A training's mean loss is taken to be its settings' share, its seed's share and noise; a paired
    gain is the difference of two noises. Gains on one baseline all hold that baseline's luck, and
    pooling them (`seed_spread`) would count it as if it had been drawn anew for each.

    Two seeds of two trainings say next to nothing of it, and then the rows help: how far two
    seeds' losses of single rows scatter is known from hundreds of them, and the means scatter by
    some `SEEDS_OVER_ROWS` times what rows that err independently would give.

    Args:
        losses: one array (seeds, rows) per training, of the same seeds; not finite: left out.
    """
    kept = [each for each in losses if np.isfinite(each).all()]
    if len(kept) < 2 or len(kept[0]) < 2:
        return None
    table = np.stack([each.mean(1) for each in kept])
    rest = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
    single = [(each - each.mean(0)).var(axis=1).sum() / (len(each) - 1) for each in kept]
    usual = SEEDS_OVER_ROWS * float(np.mean(single)) / kept[0].shape[1]
    squares = float((rest * rest).sum()) + USUAL_WORTH * usual
    return 2 * squares / (freedom + USUAL_WORTH), freedom + USUAL_WORTH


FIRST_LOOK = 0.2  # share of a rung's error that its first look may spend; the second has the rest


def ladder_level(rungs: int, share: float = 1.0) -> float:
    """Level of each rung's interval at which all rungs that do nothing stay out in 95 % of ladders.

    Bonferroni's share of 5 %, one-sided, since a rung is kept on one side alone; never under 95 %.

    Args:
        share: of the rung's error that this look at it may spend, where it is looked at twice.
    """
    return 1 - 0.1 * share / max(2, rungs)


def compare(
    train: Callable[[Variant], Outcome],
    baseline: Variant,
    variants: Sequence[Variant],
    seeds: Sequence[int] = (0, 1, 2),
    *,
    title: str = "One change at a time",
    stage: Stage = "regularize",
    metric_name: str = "loss",
    cache: str | Path | None = None,
) -> Ladder:
    """Train the baseline and each variant with each seed; compare on the same evaluation rows.

    Args:
        train: trains one variant and evaluates it; called once per variant and seed.
        baseline: what the variants are compared with; their own ``seed`` is replaced.
        seeds: two or more, or every rung stays undecided.
        cache: folder of outcomes; what is found there is not trained again.

    Returns:
        The baseline's rung, then one rung per variant with its gain, its 95 % interval (rows and
        seeds) and ``kept``: True (better), False (worse), None (undecided).
    """
    run = remembered(train, cache) if cache is not None else train
    outcomes = [
        [run(dataclasses.replace(variant, seed=seed)) for seed in seeds]
        for variant in (baseline, *variants)
    ]
    losses = [np.asarray([o.row_losses for o in group], dtype=float) for group in outcomes]
    spread = residual_spread([other for other in losses if other.shape == losses[0].shape])
    rungs = [_rung(baseline, outcomes[0], None)]
    for variant, group, after in zip(variants, outcomes[1:], losses[1:], strict=True):
        gain = paired_gain(losses[0], after, seed_variance=spread)  # type: ignore[arg-type]
        rungs.append(_rung(variant, group, gain))
    return Ladder(title, stage, tuple(rungs), metric_name=metric_name)


def _rung(variant: Variant, group: Sequence[Outcome], gain: Gain | None) -> Rung:
    metrics = [o.metric for o in group if o.metric is not None]
    kept: bool | None = True
    note = ""
    if gain is not None:
        kept = gain.verdict
        if not math.isfinite(gain.mean):
            note = "the loss is not finite"
        elif gain.seeds < 2:
            kept, note = None, "one seed: the interval holds the rows' share alone"
    finite = gain is not None and math.isfinite(gain.mean)
    return Rung(
        change=variant.change,
        loss=float(np.mean([o.loss for o in group])),
        gain=gain.mean if gain is not None and finite else None,
        low=gain.low if gain is not None and finite else None,
        high=gain.high if gain is not None and finite else None,
        metric=float(np.mean(metrics)) if metrics else None,
        cost=float(sum(o.cost for o in group)),
        kept=kept,
        note=note,
    )


def remembered(
    train: Callable[[Variant], Outcome], folder: str | Path
) -> Callable[[Variant], Outcome]:
    """`train` that reads its outcome from `folder` where it stands there, and writes it else.

    On several processes rank 0 reads and writes; all get its word.
    """

    def run(variant: Variant) -> Outcome:
        path = Path(folder) / f"{variant.key}.json"
        known = from_rank_0(read_outcome(path) if rank() == 0 else None)
        if known is not None:
            return known
        outcome = from_rank_0(train(variant))
        if rank() == 0:
            write_outcome(path, variant, outcome)
        return outcome

    return run


def read_outcome(path: str | Path) -> Outcome | None:
    """The outcome that stands in `path`, or None where there is none (or not a whole one)."""
    try:
        data = unplain(json.loads(Path(path).read_text(encoding="utf-8")))["outcome"]
    except (OSError, ValueError, KeyError):
        return None
    return Outcome(
        row_losses=tuple(data["row_losses"]),
        cost=data["cost"],
        metric=data["metric"],
        facts=data["facts"],
    )


def write_outcome(path: str | Path, variant: Variant, outcome: Outcome) -> None:
    """Keep an outcome and the variant it came from, as JSON."""
    content = plain({"variant": variant, "outcome": outcome})
    write_atomically(path, json.dumps(content, allow_nan=False))
