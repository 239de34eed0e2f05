"""What a study's report shows: the best trials, each parameter alone, and the search's yield."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from hf_recipe.core.exhibit import Answer, Cell, Curve, Line, Table
from hf_recipe.tune.study import Study, expected_best, name_of
from hf_recipe.tune.surface import Effect

BINS = 5
BEST = 10


def exhibits(study: Study, surface: Sequence[Effect]) -> Iterator[Table | Curve | Answer]:
    """Everything to show of `study`; nothing where no trial has a score but the table."""
    names = [name_of(p) for p in study.parameters]
    rows = study.done
    order = [*rows[np.argsort(study.scores[rows], kind="stable")][:BEST]]
    yield Table(
        "The best trials",
        "tune",
        (*names, study.metric, "seed"),
        tuple(
            (*(_cell(study.trials[i].params.get(n)) for n in names),
             study.value(study.trials[i].score), study.trials[i].seed)
            for i in order
        ),
        caption=f"{len(rows)} of {len(study.trials)} trials gave a finite value",
    )  # fmt: skip
    if not len(rows):
        return
    if len(rows) >= 4:
        yield _importance(surface)
    for j, name in enumerate(names):
        yield from _isolation(study, j, name)
    yield _yield(study)
    curves = [(i, study.trials[i].curve) for i in order[:3] if len(study.trials[i].curve) > 1]
    if curves:
        yield Curve(
            "Training curves of the best trials",
            "tune",
            "evaluation",
            study.metric,
            tuple(
                Line(
                    f"trial {i}",
                    tuple(float(k) for k in range(len(curve))),
                    tuple(study.value(v) for v in curve),
                )
                for i, curve in curves
            ),
        )
    top = study.trials[order[0]]
    said = ", ".join(f"{n}={_short(top.params.get(n))}" for n in names)
    yield Answer("Which trial was best?", "tune", f"{study.value(top.score):.6g} with {said}")


def _importance(surface: Sequence[Effect]) -> Table:
    ranked = sorted(surface, key=lambda e: -e.share if np.isfinite(e.share) else 1.0)
    return Table(
        "Which parameters matter",
        "tune",
        ("parameter", "share of explained variance"),
        tuple((e.name, round(e.share, 4) if np.isfinite(e.share) else None) for e in ranked),
        caption="by an additive model of the better trials",
    )


def _isolation(study: Study, j: int, name: str) -> Iterator[Table | Curve]:
    """The best of each stretch of one parameter, the others free; and every trial along it."""
    at = study.places[:, j]
    if not np.isfinite(at).any():
        return
    bins = np.minimum((np.nan_to_num(at, nan=0.0) * BINS).astype(int), BINS - 1)
    lines: list[tuple[Cell, ...]] = []
    middles: list[float] = []
    for b in range(BINS):
        inside = np.flatnonzero((bins == b) & np.isfinite(at))
        values = [float(study.trials[i].params[name]) for i in inside]
        scores = study.scores[inside]
        good = scores[np.isfinite(scores)]
        if not len(inside):
            continue
        best = study.value(float(good.min())) if len(good) else None
        lines.append((min(values), max(values), len(inside), len(inside) - len(good), best))
        middles.append(float(np.median(values)))
    columns = ("from", "to", "trials", "infeasible", f"best {study.metric}")
    yield Table(f"{name}: best with the others free", "tune", columns, tuple(lines))
    known = sorted(np.flatnonzero(np.isfinite(at)), key=lambda i: at[i])
    if len(known) < 2:
        return
    x = tuple(float(study.trials[i].params[name]) for i in known)
    y = tuple(study.value(study.trials[i].score) for i in known)
    failed = sum(not np.isfinite(value) for value in y)
    best_of = tuple(np.nan if line[-1] is None else float(line[-1]) for line in lines)
    yield Curve(
        f"{study.metric} along {name}",
        "tune",
        name,
        study.metric,
        (Line("trials", x, y, dots=True), Line("best of each fifth", tuple(middles), best_of)),
        caption=f"\u00d7 marks {failed} infeasible trials" if failed else "",
        log_x="log" in study.parameters[j].distribution and min(x) > 0,
    )


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
