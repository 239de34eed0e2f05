"""Look at a search as a whole: what the trials say together, which none says alone.

`analyse` takes the trials of any search, whatever ran them, and gives a report: findings, a table
of the best trials, what each parameter does with the others free, and what more trials would
bring.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student

from hf_recipe.core.check import Check, Measurement
from hf_recipe.core.exhibit import Answer
from hf_recipe.core.report import Report, Stored
from hf_recipe.tune import study_checks as checks
from hf_recipe.tune.study import (
    Array,
    Study,
    expected_best,
    levels,
    name_of,
    read_study,
    same_settings,
)
from hf_recipe.tune.study_exhibits import exhibits
from hf_recipe.tune.surface import Effect, effects

EDGE = 0.1  # of a range: what counts as its edge
FEWEST = 8  # trials before an edge is judged
SPREAD_SHARE = 0.1  # of the better half's spread: a gain that small counts as nothing

CHECKS: tuple[Check, ...] = (
    checks.OPTIMUM_AT_EDGE,
    checks.SEARCH_TOO_SPARSE,
    checks.TRIALS_INFEASIBLE,
    checks.WITHIN_SEED_NOISE,
    checks.TRIAL_WARM_START,
    checks.GRID_SEARCH,
    checks.STEPS_MISJUDGED,
    checks.BATCH_SIZE_TUNED,
)


def analyse(
    trials: Sequence[Mapping[str, Any]],
    space: Mapping[str, Any],
    metric: str,
    greater_is_better: bool,
) -> Report:
    """Analyse a study.

    Args:
        trials: in the order they ran: ``{"params": {...}, "value": float or None, "state":
            "complete" | "failed", "seed": int or absent, "curve": [...] or absent}``.
        space: the search space, as in a W&B sweep's ``parameters``.
        metric: name of the values.
        greater_is_better: its direction.

    Raises:
        ValueError: no trials, a trial without params, an unknown state, a space that makes no
            sense.
    """
    study = read_study(trials, space, metric, greater_is_better)
    report = Report(title=f"Study of {metric}", status="finished")
    surface = effects(study, EDGE)
    measured = [
        *_edges(study, surface),
        *_yield(study),
        *_infeasible(study),
        *_rivals(study),
        *_beginnings(study),
        _form(study),
        *_best_steps(study),
    ]
    for check in CHECKS:
        mine = [m for m in measured if m.kind() in check.by_kind]
        if not mine:
            report.skipped[check.name] = WHY_NOT[check.name]
            continue
        report.ran[check.name] = ["study"]
        for measurement in mine:
            _judge(report, check, measurement)
    for measurement in measured:
        values = measurement.values()
        report.store(Stored(measurement.kind(), measurement.version, "study", "", None, values))
    _show(report, study, surface)
    return report


WHY_NOT = {
    "optimum-at-edge": f"fewer than {FEWEST} finite trials, or no range of numbers was searched",
    "search-too-sparse": "fewer than 4 finite trials",
    "trials-infeasible": "no finished trial",
    "within-seed-noise": "no two settings were run with two or more seeds each",
    "trial-warm-start": "fewer than 3 trials with a curve",
    "steps-misjudged": "fewer than 3 trials with a curve of 8 points or more",
}


def _judge(report: Report, check: Check, measurement: Measurement) -> None:
    for fault in check.judge(measurement):
        report.add(check.finding(fault))


# -------------------------------------------------------------------- measuring


def _edges(study: Study, surface: Sequence[Effect]) -> Iterator[checks.EdgePressure]:
    rows = study.done
    if len(rows) < FEWEST:
        return
    order = rows[np.argsort(study.scores[rows], kind="stable")]
    crowd = order[: max(4, len(order) // 6)]
    if np.ptp(study.scores[rows]) == 0:
        return
    for j, (parameter, effect) in enumerate(zip(study.parameters, surface, strict=True)):
        at = study.places[crowd, j]
        numbers = levels(parameter)
        tried = study.places[rows, j]
        known = np.isfinite(at).all() and not parameter.distribution.endswith(("normal", "beta"))
        if not known or np.ptp(tried[np.isfinite(tried)]) == 0 or 0 < len(numbers) < 4:
            continue
        ends = (
            (min(numbers), max(numbers)) if numbers else (parameter.at(0), parameter.at(1 - 1e-9))
        )
        falling = ends[0] > ends[1]
        for edge, distance, slope, bound in (
            ("lower", at, effect.low_slope, ends[1] if falling else ends[0]),
            ("upper", 1 - at, -effect.high_slope, ends[0] if falling else ends[1]),
        ):
            yield checks.EdgePressure(
                parameter=name_of(parameter),
                edge=edge,
                slope=float(slope),
                median=float(np.median(distance)),
                farthest=float(distance.max()),
                crowd=len(crowd),
                trials=len(rows),
                bound=float(bound),
                natural=(edge == "lower" and abs(float(bound)) < 1e-12)
                or _is_walled(study, j, edge),
            )


def _is_walled(study: Study, j: int, edge: str) -> bool:
    """Whether the two trials nearest to the edge failed: nothing is to be had beyond it."""
    at = study.places[:, j]
    nearest = np.argsort(at if edge == "lower" else -at, kind="stable")[:2]  # NaN comes last
    return len(nearest) == 2 and all(study.trials[i].failed for i in nearest)


def _seed_spread(study: Study) -> float | None:
    """Standard deviation between runs of the same setting; None: nothing was repeated."""
    squares, freedom = 0.0, 0
    for group in same_settings(study.trials):
        scores = study.scores[group]
        scores = scores[np.isfinite(scores)]
        if len(scores) > 1:
            squares += float(np.sum((scores - scores.mean()) ** 2))
            freedom += len(scores) - 1
    return float(np.sqrt(squares / freedom)) if freedom else None


def _setting_scores(study: Study) -> Array:
    """Mean score of each setting that has one."""
    means = []
    for group in same_settings(study.trials):
        scores = study.scores[group]
        if np.isfinite(scores).any():
            means.append(float(np.nanmean(scores)))
    return np.array(means)


def _yield(study: Study) -> Iterator[checks.SearchYield]:
    scores = _setting_scores(study)
    n = len(scores)
    if n < 4:
        return
    best = [expected_best(scores, k) for k in (max(1, n // 4), n // 2, n)]
    gains = (best[0] - best[1], best[1] - best[2])
    ratio = min(max(gains[1] / gains[0], 0.0), 1.0) if gains[0] > 0 else 0.0
    noise, source = _seed_spread(study), "seeds"
    if noise is None:
        half = np.sort(scores)[: (n + 1) // 2]
        noise, source = SPREAD_SHARE * float(np.ptp(half)), "the spread of the better half"
    yield checks.SearchYield(n, gains, gains[1] * ratio, noise, source)


def _infeasible(study: Study) -> Iterator[checks.Infeasible]:
    failed = np.array([trial.failed for trial in study.trials], dtype=bool)
    n, bad = len(failed), int(failed.sum())
    if not n:
        return
    z = float(norm.ppf(0.95))
    share = bad / n
    low = (share + z * z / (2 * n) - z * np.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)) / (
        1 + z * z / n
    )
    best: tuple[float, checks.Infeasible] | None = None
    for j, parameter in enumerate(study.parameters):
        at = study.places[:, j]
        known = np.sort(np.unique(at[np.isfinite(at)]))
        for cut in (known[:-1] + known[1:]) / 2:
            for side, inside in (("above", at > cut), ("below", at < cut)):
                hit, miss = int((inside & failed).sum()), int((inside & ~failed).sum())
                gain = _separation(hit, miss, bad - hit, n - bad - miss)
                if hit > miss and gain > 3.0 and (best is None or gain > best[0]):
                    bound = _value_at(study, j, float(cut))
                    region = checks.Infeasible(
                        bad, n, float(low), name_of(parameter), side, bound, hit + miss, hit
                    )
                    best = (gain, region)
    yield best[1] if best else checks.Infeasible(bad, n, float(low))


def _separation(hit: int, miss: int, other_hit: int, other_miss: int) -> float:
    """Log-likelihood gain, in nats, of two failing shares over one."""

    def fit(bad: int, good: int) -> float:
        total = bad + good
        return sum(k * float(np.log(k / total)) for k in (bad, good) if k)

    both = fit(hit + other_hit, miss + other_miss)
    return fit(hit, miss) + fit(other_hit, other_miss) - both


def _value_at(study: Study, j: int, place: float) -> float:
    """The parameter's value at a place: the middle of the two tried values around it."""
    name = name_of(study.parameters[j])
    at = study.places[:, j]
    below = max(range(len(at)), key=lambda i: at[i] if at[i] < place else -1.0)
    above = min(range(len(at)), key=lambda i: at[i] if at[i] > place else 2.0)
    low, high = (float(study.trials[i].params[name]) for i in (below, above))
    return float(np.sqrt(low * high)) if min(low, high) > 0 else (low + high) / 2


def _rivals(study: Study) -> Iterator[checks.Rivals]:
    groups = []
    for group in same_settings(study.trials):
        rows = [i for i in group if np.isfinite(study.trials[i].score)]
        if len(rows) > 1:
            groups.append((float(np.mean(study.scores[rows])), rows))
    groups.sort(key=lambda pair: pair[0])
    if len(groups) < 2:
        return
    winner, rival = groups[0][1], groups[1][1]
    ours, theirs = (
        {study.trials[i].seed: study.trials[i].score for i in rows} for rows in (winner, rival)
    )
    common = [seed for seed in ours if seed is not None and seed in theirs]
    paired = len(common) >= 2
    if paired:
        gains = np.array([theirs[seed] - ours[seed] for seed in common])
        spread, freedom = float(gains.std(ddof=1)) / np.sqrt(len(gains)), len(gains) - 1
        better = float(np.mean(gains > 0))
    else:
        a, b = study.scores[winner], study.scores[rival]
        gains = np.subtract.outer(b, a).ravel()
        spread = float(np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b)))
        freedom, better = len(a) + len(b) - 2, float(np.mean(gains > 0))
    reach = float(student.ppf(0.975, freedom)) * spread
    gain = float(gains.mean())
    pairs = len(common) if paired else min(len(winner), len(rival))
    yield checks.Rivals(pairs, paired, gain, gain - reach, gain + reach, better)


def _beginnings(study: Study) -> Iterator[checks.Beginnings]:
    curves = [t.curve for t in study.trials if len(t.curve) >= 3 and np.isfinite(t.curve).all()]
    if len(curves) < 3:
        return
    first = curves[0][0] - curves[0][-1]
    warm = 0
    for before, now in itertools.pairwise(curves):
        follows = abs(now[0] - before[-1]) <= 0.1 * first
        warm += int(first > 0 and follows and curves[0][0] - now[0] >= 0.5 * first)
    yield checks.Beginnings(len(curves), warm)


def _form(study: Study) -> checks.SearchForm:
    at = study.places
    columns = [
        j for j in range(at.shape[1])
        if np.isfinite(at[:, j]).all() and len(np.unique(at[:, j].round(9))) > 1
    ]  # fmt: skip
    points = np.unique(at[:, columns].round(9), axis=0) if columns and len(at) else at[:0]
    tried = tuple(len(np.unique(points[:, i])) for i in range(len(columns)))
    full = len(columns) > 1 and int(np.prod(tried)) == len(points)
    sizes = tuple(
        name
        for name in (name_of(p) for p in study.parameters)
        if "batch_size" in name.lower() and "eval" not in name.lower()
    )
    return checks.SearchForm(tried if full else (), len(points), sizes)


def _best_steps(study: Study) -> Iterator[checks.BestSteps]:
    early = late = count = 0
    for trial in study.trials:
        curve = np.array(trial.curve, dtype=float)
        if trial.failed or len(curve) < 8 or not np.isfinite(curve).any():
            continue
        count += 1
        best = int(np.nanargmin(curve)) / (len(curve) - 1)
        start = int(0.75 * len(curve))
        moves = np.diff(curve[np.isfinite(curve)])
        noise = 1.4826 * float(np.median(np.abs(moves - np.median(moves))))
        gained = float(np.nanmin(curve[:start])) - float(np.nanmin(curve))
        total = float(np.nanmax(curve)) - float(np.nanmin(curve))
        early += int(best <= 0.1)
        late += int(best >= 0.75 and gained > max(noise, 0.01 * total))
    if count >= 3:
        yield checks.BestSteps(count, early, late)


# -------------------------------------------------------------------- showing


def _show(report: Report, study: Study, surface: Sequence[Effect]) -> None:
    for shown in exhibits(study, surface):
        if isinstance(shown, Answer):
            report.answer(shown)
        else:
            report.exhibit(shown)
