"""What a study's report shows: the best trials, what matters, and each parameter, others free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_recipe.core.exhibit import Answer, Cell, Curve, Line, Table
from hf_recipe.tune.study import Study, expected_best, levels, name_of
from hf_recipe.tune.surface import Effect

BINS = 5
BEST = 10
TRIALS = "The best trials"
FEWEST = 8  # trials by which a parameter's share of the variance can be told at all


def exhibits(study: Study, surface: Sequence[Effect]) -> Iterator[Table | Curve | Answer]:
    """Everything to show of `study`; nothing where no trial has a score but the table."""
    names = [name_of(p) for p in study.parameters]
    rows = study.done
    order = [int(i) for i in rows[np.argsort(study.scores[rows], kind="stable")][:BEST]]
    yield _best(study, names, order)
    if not len(rows):
        return
    if len(rows) >= FEWEST and all(np.isfinite(effect.share) for effect in surface):
        yield _importance(surface)
    yield _yield(study)
    stretches = [_stretches(study, j) for j in range(len(names))]
    for j, found in enumerate(stretches):
        yield from _along(study, j, found)
    yield from _training(study, order[:3])
    yield _isolated(study, names, stretches)
    top = study.trials[order[0]]
    said = ", ".join(f"{n}={_short(top.params.get(n))}" for n in names)
    yield Answer("Which trial was best?", "tune", f"{study.value(top.score):.6g} with {said}")


def _best(study: Study, names: Sequence[str], order: Sequence[int]) -> Table:
    seeds = any(study.trials[i].seed is not None for i in order)
    rows = []
    for i in order:
        trial = study.trials[i]
        told = (trial.number, study.value(trial.score), *([trial.seed] if seeds else []))
        rows.append((*told, *(_cell(trial.params.get(n)) for n in names)))
    left = f"; {study.open} more were stopped early or still run" if study.open else ""
    return Table(
        TRIALS,
        "tune",
        ("trial", study.metric, *(["seed"] if seeds else []), *names),
        tuple(rows),
        caption=f"{len(study.done)} of {len(study.trials)} trials gave a finite value{left}",
    )


def _importance(surface: Sequence[Effect]) -> Table:
    ranked = sorted(surface, key=lambda e: -e.share)
    return Table(
        "Which parameters matter",
        "tune",
        ("parameter", "share of explained variance"),
        tuple((e.name, round(e.share, 3)) for e in ranked),
        caption="by an additive model in which the bad trials are flattened",
    )


# ------------------------------------------------------------------ one parameter, the others free


@dataclass(frozen=True)
class _Stretch:
    """A fifth of a parameter's range, or one of its named values.

    Attributes:
        where: as a reader is told.
        middle: median of its values; NaN for a named one.
        trials, infeasible: how many fell there, and how many of these gave no finite value.
        best: the best value there, the other parameters free; NaN where none is finite.
    """

    where: str
    middle: float
    trials: int
    infeasible: int
    best: float


def _stretches(study: Study, j: int) -> list[_Stretch]:
    parameter, at = study.parameters[j], study.places[:, j]
    name = name_of(parameter)
    if np.isfinite(at).any():
        bins = np.minimum((np.nan_to_num(at, nan=0.0) * BINS).astype(int), BINS - 1)
        groups = [np.flatnonzero((bins == b) & np.isfinite(at)) for b in range(BINS)]
    else:
        given = [trial.params.get(name) for trial in study.trials]
        groups = [
            np.array([i for i, value in enumerate(given) if value == level], dtype=int)
            for level in levels(parameter)
        ]
    found = []
    for inside in (group for group in groups if len(group)):
        values = [study.trials[i].params[name] for i in inside]
        scores = study.scores[inside]
        good = scores[np.isfinite(scores)]
        numbers = bool(np.isfinite(at[inside]).all())
        ends = dict.fromkeys(_short(v) for v in ((min(values), max(values)) if numbers else values))
        found.append(
            _Stretch(
                " to ".join(ends),
                float(np.median(values)) if numbers else np.nan,
                len(inside),
                len(inside) - len(good),
                study.value(float(good.min())) if len(good) else np.nan,
            )
        )
    return found


def _along(study: Study, j: int, stretches: Sequence[_Stretch]) -> Iterator[Curve]:
    """Every trial along a parameter that has an order, and the best of each stretch."""
    parameter, at = study.parameters[j], study.places[:, j]
    name = name_of(parameter)
    known = sorted(np.flatnonzero(np.isfinite(at)), key=lambda i: at[i])
    if len(known) < 2:
        return
    x = tuple(float(study.trials[i].params[name]) for i in known)
    y = tuple(study.value(study.trials[i].score) for i in known)
    failed = sum(not np.isfinite(value) for value in y)
    middles, best = zip(*((s.middle, s.best) for s in stretches), strict=True)
    yield Curve(
        f"{study.metric} along {name}",
        "tune",
        name,
        study.metric,
        (Line("trials", x, y, dots=True), Line("best of each fifth", middles, best)),
        caption=f"\u00d7 marks {failed} infeasible trials" if failed else "",
        log_x="log" in parameter.distribution and min(x) > 0,
    )


def _isolated(study: Study, names: Sequence[str], stretches: Sequence[Sequence[_Stretch]]) -> Table:
    return Table(
        "The best of each stretch, the other parameters free",
        "tune",
        ("parameter", "where", f"best {study.metric}", "trials", "infeasible"),
        tuple(
            (name, s.where, s.best if np.isfinite(s.best) else None, s.trials, s.infeasible)
            for name, found in zip(names, stretches, strict=True)
            for s in found
        ),
    )


# ------------------------------------------------------------------ courses


def _training(study: Study, order: Sequence[int]) -> Iterator[Curve]:
    lines = tuple(
        Line(
            f"trial {trial.number}",
            tuple(float(k) for k in range(1, len(trial.curve) + 1)),
            tuple(study.value(v) for v in trial.curve),
        )
        for trial in (study.trials[i] for i in order)
        if len(trial.curve) > 1
    )
    if lines:
        yield Curve("Training curves of the best trials", "tune", "evaluation", study.metric, lines)


def _yield(study: Study) -> Curve:
    scores = study.scores[study.done]
    draws = np.unique(np.geomspace(1, len(scores), min(len(scores), 40)).round().astype(int))
    best = tuple(study.value(expected_best(scores, int(k))) for k in draws)
    return Curve(
        "Expected best by number of trials",
        "tune",
        "trials",
        study.metric,
        (Line("expected best", tuple(float(k) for k in draws), best),),
        log_x=True,
    )


def _short(value: Any) -> str:
    cell = _cell(value)
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _cell(value: Any) -> Cell:
    if isinstance(value, np.generic):
        value = value.item()
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
