"""What can be wrong with a search, judged on the numbers of its study.

The Tuning Playbook (Godbole et al. 2023) asks of every study: is the best point at an edge of the
space, were enough points drawn, which region is infeasible, do the training curves say that the
runs were too long or too short, and does the winner beat what stands by more than seeds do?
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from hf_recipe.core.check import Check, Measurement
from hf_recipe.core.finding import Fault

CALL = "hf_recipe.tune.analysis.analyse(trials, space, metric, greater_is_better)"
PLAYBOOK = "Godbole et al., Deep Learning Tuning Playbook (2023)"
_check = functools.partial(Check, stage="tune", moments=("study",), call=CALL)


@dataclass(frozen=True)
class EdgePressure(Measurement):
    """How the good trials lie at one edge of a parameter's range.

    Attributes:
        parameter, edge: name; "lower" or "upper".
        slope: how the score rises from the edge inwards, in standard errors; positive: better
            towards the edge.
        median, farthest: distance of the best trials from the edge, as shares of the range.
        crowd, trials: number of best trials looked at, and of all.
        bound: value at that edge.
        natural: nothing lies beyond it: a rate of 0, or the trials next to it failed.
    """

    parameter: str
    edge: str
    slope: float
    median: float
    farthest: float
    crowd: int
    trials: int
    bound: float
    natural: bool


def at_edge(
    pressure: EdgePressure,
    *,
    sure: Annotated[float, "200 synthetic studies: hits against 5 % false alarms"] = 1.5,
    near: Annotated[float, "as above; with a slope of half as many standard errors"] = 0.38,
    crowded: Annotated[float, "four points in an outer fifth by chance: 3 in 1,000"] = 0.2,
) -> Iterator[Fault]:
    """The best trials crowd an edge of the range."""
    crowding = pressure.farthest < crowded and pressure.crowd >= 4
    sloping = pressure.slope > sure and pressure.median < 0.5
    leaning = pressure.slope > sure / 2 and pressure.median < near
    if pressure.natural or not (crowding or sloping or leaning):
        return
    yield Fault(
        f"the {pressure.crowd} best of {pressure.trials} trials lie, at the median, "
        f"{pressure.median:.0%} of the range from the {pressure.edge} edge of "
        f"{pressure.parameter} ({pressure.bound:.3g}), and the metric improves towards it",
        subject=pressure.parameter,
        evidence={
            "seen": f"best trials at {pressure.median:.0%} from the {pressure.edge} edge",
            "expected": "the best trials inside the range",
            **{name: getattr(pressure, name) for name in ("edge", "slope", "bound")},
        },
    )


OPTIMUM_AT_EDGE = _check(
    name="optimum-at-edge",
    severity="warning",
    why="Where the best trials crowd an edge of the space, the optimum probably lies beyond it.",
    fix="widen the range at that edge (by a decade, on a log scale) and search there",
    source=PLAYBOOK,
    unsure="A flat optimum that reaches the edge; with under a dozen trials, chance.",
    judges=(at_edge,),
)


@dataclass(frozen=True)
class SearchYield(Measurement):
    """What more trials would bring.

    Attributes:
        trials: finished ones.
        gains: fall of the expected best from a quarter to half, and from half to all trials.
        expected: gain of as many trials again, by going on in the same ratio.
        noise: what counts as nothing: the seeds' standard deviation, or a share of the spread.
        noise_from: "seeds" or "spread".
    """

    trials: int
    gains: tuple[float, float]
    expected: float
    noise: float
    noise_from: str


def too_sparse(
    found: SearchYield,
    *,
    worth: Annotated[float, "one standard deviation of what counts as nothing"] = 1.0,
) -> Iterator[Fault]:
    """As many trials again would still bring a gain."""
    if not found.expected > worth * found.noise:
        return
    yield Fault(
        f"as many trials again ({found.trials}) should improve the best by about "
        f"{found.expected:.3g}; the last doubling brought {found.gains[1]:.3g}, and "
        f"{found.noise:.3g} is noise (from {found.noise_from})",
        evidence={
            "seen": f"{found.expected:.3g} still to be gained",
            "expected": f"at most {found.noise:.3g}",
            "trials": found.trials,
        },
    )


SEARCH_TOO_SPARSE = _check(
    name="search-too-sparse",
    severity="note",
    why="While the expected best still falls with every doubling, the search is not done.",
    fix="quasi_random(space, 2 * n, seed)[n:]  # the same points, gone on",
    source="Dodge et al. 2019, with the unbiased estimator of Tang et al. 2020",
    unsure="Trials of an adaptive search are no independent draws.",
    judges=(too_sparse,),
)


@dataclass(frozen=True)
class Infeasible(Measurement):
    """Trials without a finite value, and the region that holds them.

    Attributes:
        failed, trials: how many failed, and all.
        low: lower bound of the failing share with 95 % confidence (Wilson).
        parameter, side, bound: where they lie: a parameter, "above" or "below" a bound; "": no
            region tells them apart.
        inside, inside_failed: trials in that region, and the failed ones among them.
    """

    failed: int
    trials: int
    low: float
    parameter: str = ""
    side: str = ""
    bound: float = 0.0
    inside: int = 0
    inside_failed: int = 0


def infeasible(
    found: Infeasible,
    *,
    share: Annotated[float, "a tenth of the budget: at 95 % confidence, or in one region"] = 0.1,
) -> Iterator[Fault]:
    """A good part of the budget went into runs that diverged."""
    together = found.parameter and found.inside_failed >= 3 and found.failed > share * found.trials
    everything = found.failed == found.trials and found.trials >= 2
    if not (found.low > share or together or everything):
        return
    where = "; no region tells them apart"
    if found.parameter:
        where = (
            f": {found.inside_failed} of {found.inside} with {found.parameter} {found.side} "
            f"{found.bound:.3g}, {found.failed - found.inside_failed} of "
            f"{found.trials - found.inside} elsewhere"
        )
    yield Fault(
        f"{found.failed} of {found.trials} trials gave no finite value{where}",
        subject=found.parameter,
        evidence={
            "seen": f"{found.failed} of {found.trials} failed",
            "expected": f"under {share:.0%} for sure",
            "bound": found.bound,
        },
    )


TRIALS_INFEASIBLE = _check(
    name="trials-infeasible",
    severity="warning",
    why="Trials that diverge cost as much as others; they share a region that can be cut off.",
    fix="narrow the range to the feasible side, or add warm-up and clipping there",
    source=PLAYBOOK,
    unsure="Trials that the machine killed count as failed too.",
    judges=(infeasible,),
)


@dataclass(frozen=True)
class Rivals(Measurement):
    """The winner against the next best setting, both run with several seeds.

    Attributes:
        pairs: seeds that both ran with (or runs compared without common seeds).
        paired: whether the seeds are common.
        gain: mean improvement of the winner.
        low, high: its 95 % interval.
        better: share of comparisons that the winner wins.
    """

    pairs: int
    paired: bool
    gain: float
    low: float
    high: float
    better: float


def seed_noise(
    rivals: Rivals,
    *,
    wins: Annotated[float, "P(better) >= 0.75: Bouthillier et al. 2021"] = 0.75,
) -> Iterator[Fault]:
    """The winner's lead is no larger than what seeds do."""
    if rivals.better >= wins and rivals.low > 0:
        return
    yield Fault(
        f"the winner leads the next setting by {rivals.gain:.3g} "
        f"[{rivals.low:.3g}, {rivals.high:.3g}] over {rivals.pairs} "
        f"{'paired seeds' if rivals.paired else 'runs each'}, and is better in "
        f"{rivals.better:.0%} of the comparisons",
        evidence={
            "seen": f"{rivals.gain:.3g} [{rivals.low:.3g}, {rivals.high:.3g}]",
            "expected": f"an interval above 0 and {wins:.0%} of comparisons won",
            "pairs": rivals.pairs,
        },
    )


WITHIN_SEED_NOISE = _check(
    name="within-seed-noise",
    severity="warning",
    why="The best of many trials is best by luck, too: its lead must be larger than what seeds do.",
    fix="run the top 3 again on new, common seeds; keep what stands if none wins",
    source="Bouthillier et al. 2021, Accounting for Variance in Machine Learning Benchmarks",
    unsure="Two settings that are truly alike: either may be kept.",
    judges=(seed_noise,),
)


@dataclass(frozen=True)
class Beginnings(Measurement):
    """Where trials begin, against where the one before them ended.

    Attributes:
        trials: trials with a curve, in order.
        warm: later ones that begin within a tenth of the first one's progress from where the
            trial before them ended, and not where the first began.
    """

    trials: int
    warm: int


def warm_start(
    found: Beginnings,
    *,
    share: Annotated[float, "nearly all: a model that is reused is reused by every trial"] = 0.9,
) -> Iterator[Fault]:
    """Each trial goes on from the weights of the one before."""
    later = found.trials - 1
    if later < 2 or not found.warm >= share * later:
        return
    yield Fault(
        f"{found.warm} of {later} trials begin at the metric at which the trial before them "
        "ended, far from where the first began",
        evidence={
            "seen": f"{found.warm} of {later} begin trained",
            "expected": "every trial begins where the first did",
        },
    )


TRIAL_WARM_START = _check(
    name="trial-warm-start",
    severity="error",
    why="A trial that begins from another's weights is judged by the other's steps as well.",
    fix="Trainer(model_init=make_model)  # a new model for every trial",
    source="transformers' Trainer.hyperparameter_search: why model_init exists, 2020",
    unsure="Population based training hands weights over on purpose.",
    judges=(warm_start,),
)


@dataclass(frozen=True)
class SearchForm(Measurement):
    """What the points and the space look like.

    Attributes:
        grid: levels of each number searched, if the points are their full grid; else empty.
        points: different points.
        batch_sizes: names of searched parameters that are batch sizes.
    """

    grid: tuple[int, ...]
    points: int
    batch_sizes: tuple[str, ...]


def grid(
    form: SearchForm,
    *,
    dimensions: Annotated[int, "in two dimensions a grid costs little: Bergstra, Bengio 2012"] = 3,
) -> Iterator[Fault]:
    """A grid wastes its trials on the parameters that do not matter."""
    if len(form.grid) >= dimensions:
        yield Fault(
            f"{form.points} points are a grid of {' x '.join(map(str, form.grid))}: each number "
            f"was tried at {max(form.grid)} values at most; {form.points} quasi-random points "
            f"would try {form.points} of each",
            evidence={
                "seen": f"{max(form.grid)} values of each number",
                "expected": f"{form.points} values of each number",
            },
        )


GRID_SEARCH = _check(
    name="grid-search",
    severity="note",
    why="A grid spends most trials on values of the parameters that turn out not to matter.",
    fix="hf_recipe.tune.space.quasi_random(space, n, seed)",
    source="Bergstra and Bengio 2012; Karpathy 2019",
    unsure="A grid over what is to be compared on purpose (an ablation).",
    judges=(grid,),
)


def batch_size(form: SearchForm) -> Iterator[Fault]:
    """Batch size is for speed; other parameters make up for it."""
    for name in form.batch_sizes:
        yield Fault(
            f"{name} is searched for quality: rate and regularization, tuned at each size, make "
            "up for it",
            subject=name,
            evidence={"seen": f"{name} varies", "expected": "the largest size that is fast"},
        )


BATCH_SIZE_TUNED = _check(
    name="batch-size-tuned",
    severity="note",
    why="Batch size decides the speed; for quality, rate and regularization make up for it.",
    fix="fix per_device_train_batch_size at the largest size that is fast",
    source=PLAYBOOK,
    unsure="Batch normalization and contrastive losses do depend on the batch.",
    judges=(batch_size,),
)


@dataclass(frozen=True)
class BestSteps(Measurement):
    """Where in their runs the trials were best.

    Attributes:
        trials: trials with a curve of eight points or more.
        early: best in the first tenth.
        late: best in the last quarter, and improving there by more than the curve's own noise.
    """

    trials: int
    early: int
    late: int


def misjudged(
    steps: BestSteps,
    *,
    most: Annotated[float, "the playbook's 'most trials'"] = 0.6,
) -> Iterator[Fault]:
    """Runs are longer or shorter than the model needs."""
    for count, where, what in (
        (steps.early, "first 10 %", "far fewer steps would do"),
        (steps.late, "last 25 %", "more steps should bring more"),
    ):
        if steps.trials >= 3 and count >= most * steps.trials:
            yield Fault(
                f"{count} of {steps.trials} trials are best in the {where} of their steps: {what}",
                subject=where,
                evidence={"seen": f"{count} of {steps.trials}", "expected": f"under {most:.0%}"},
            )


STEPS_MISJUDGED = _check(
    name="steps-misjudged",
    severity="note",
    why="Where most trials are best early, steps are wasted; where late, the ranking may change.",
    fix="max_steps: fewer if most are best early; half as many again if late",
    source=PLAYBOOK,
    unsure="Under a decay to zero the end is best by design: a note.",
    judges=(misjudged,),
)
