"""The response surface of a study: how the score depends on each parameter, the others free.

One additive model, a parabola for each stretch of numbers and a mean for each named value, fitted
to scores in which the bad half is flattened (a diverged trial says where not to go, not how steep
the good region is). It tells the share of each parameter, and where each optimum lies, with
standard errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_recipe.tune.space import Parameter
from hf_recipe.tune.study import Array, Study, levels, name_of

CREST = 2.0  # scores beyond this many times the distance from best to median are flattened


@dataclass(frozen=True)
class Effect:
    """What one parameter does.

    Attributes:
        name: the parameter.
        share: of the variance that all parameters explain.
        low_slope, high_slope: slope of the score at the lower and upper edge's inner side, in
            its standard errors; NaN: no stretch of numbers, or too few trials.
    """

    name: str
    share: float
    low_slope: float
    high_slope: float


def effects(study: Study, edge: float) -> list[Effect]:
    """The effect of each parameter, from the trials that have a score.

    Args:
        study: the trials.
        edge: share of the range that counts as its edge.
    """
    rows = study.done
    scores = study.scores[rows]
    if len(rows) < 4:
        return [Effect(name_of(p), np.nan, np.nan, np.nan) for p in study.parameters]
    target = flattened(scores)
    blocks = [_columns(study, j, rows) for j in range(len(study.parameters))]
    if 1 + sum(block.shape[1] for block in blocks) > 0.7 * len(rows):
        return _one_by_one(study, blocks, target, edge)
    design = np.concatenate([np.ones((len(rows), 1)), *blocks], axis=1)
    coefficients, covariance = _least_squares(design, target)
    found, start = [], 1
    explained = []
    for parameter, block in zip(study.parameters, blocks, strict=True):
        stop = start + block.shape[1]
        part = coefficients[start:stop]
        explained.append(float(np.var(block @ part)) if block.shape[1] else 0.0)
        found.append((parameter, part, covariance[start:stop, start:stop]))
        start = stop
    total = sum(explained) or 1.0
    return [
        Effect(name_of(p), share / total, *_slopes(part, spread, edge))
        for (p, part, spread), share in zip(found, explained, strict=True)
    ]


def _one_by_one(study: Study, blocks: list[Array], target: Array, edge: float) -> list[Effect]:
    """With few trials each parameter alone: what the others do counts as noise."""
    explained, slopes = [], []
    for block in blocks:
        design = np.concatenate([np.ones((len(target), 1)), block], axis=1)
        if design.shape[1] > 0.7 * len(target):
            explained.append(np.nan)
            slopes.append((np.nan, np.nan))
            continue
        coefficients, covariance = _least_squares(design, target)
        explained.append(float(np.var(block @ coefficients[1:])))
        slopes.append(_slopes(coefficients[1:], covariance[1:, 1:], edge))
    total = sum(explained) or 1.0
    return [
        Effect(name_of(p), share / total, *slope)
        for p, share, slope in zip(study.parameters, explained, slopes, strict=True)
    ]


def flattened(scores: Array) -> Array:
    """Scores with the bad ones drawn in, in units of the distance from best to median."""
    best, middle = float(scores.min()), float(np.median(scores))
    unit = middle - best
    if not unit > 0:
        return np.zeros(len(scores))
    return np.minimum((scores - best) / unit, CREST)


def _columns(study: Study, j: int, rows: Any) -> Array:
    """u and u^2 of a stretch of numbers, or one column per further named value."""
    places = study.places[rows, j]
    if np.isfinite(places).any():
        middle = np.nanmean(places)
        filled = np.where(np.isfinite(places), places, middle) - 0.5
        wanted = 2 if len(np.unique(filled)) > 2 else 1
        if np.ptp(filled) == 0:
            return np.zeros((len(rows), 0))
        return np.stack([filled, filled**2], axis=1)[:, :wanted]
    return _named(study, study.parameters[j], rows)


def _named(study: Study, parameter: Parameter, rows: Any) -> Array:
    name = name_of(parameter)
    values = [study.trials[i].params.get(name) for i in rows]
    kept = [v for v in levels(parameter) if v in values][1:]
    if not kept:
        return np.zeros((len(rows), 0))
    return np.array([[float(value == level) for level in kept] for value in values])


def _least_squares(design: Array, target: Array) -> tuple[Array, Array]:
    normal = design.T @ design
    normal += 1e-9 * np.eye(len(normal)) * max(float(np.trace(normal)), 1.0)
    inverse = np.linalg.inv(normal)
    coefficients = inverse @ design.T @ target
    freedom = max(1, len(target) - design.shape[1])
    noise = float(np.sum((target - design @ coefficients) ** 2)) / freedom
    return coefficients, np.asarray(inverse * (noise + 1e-12))


def _slopes(part: Array, covariance: Array, edge: float) -> tuple[float, float]:
    """Slope at the inner side of each edge, in standard errors; NaN without a curvature."""
    if len(part) != 2:
        return np.nan, np.nan
    found = []
    for at in (edge - 0.5, 0.5 - edge):
        row = np.array([1.0, 2 * at])
        found.append(float(row @ part / np.sqrt(row @ covariance @ row)))
    return found[0], found[1]
