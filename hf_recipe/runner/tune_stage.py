"""Tune: a small quasi-random search, its winner run again with other seeds, then a student."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hf_recipe.core.exhibit import Answer, Table
from hf_recipe.core.report import Gate
from hf_recipe.instruments.compare import Outcome
from hf_recipe.runner.decaying import tune_decay
from hf_recipe.runner.gates import ADOPT_AT, tune_gate
from hf_recipe.runner.journey import Journey, mean
from hf_recipe.runner.setup import Setup


def space(setup: Setup) -> dict[str, Any]:
    """The search space around `setup`, in the form of a sweep's parameters."""
    return {
        "learning_rate": {
            "distribution": "log_uniform_values",
            "min": setup.learning_rate / 3,
            "max": setup.learning_rate * 3,
        },
        "weight_decay": {"distribution": "log_uniform_values", "min": 1e-3, "max": 0.3},
        "dropout": {"values": [0.0, 0.1, 0.2]},
        "warmup": {"distribution": "uniform", "min": 0.0, "max": 0.2},
    }


def run(journey: Journey) -> Gate:
    """Search, confirm, train longer, distil."""
    from hf_recipe.tune.space import quasi_random

    lab = journey.lab
    before = journey.outcomes("where the stage begins", journey.setup)
    standing, start = tune_decay(journey, before), journey.setup
    seed = int(lab.options.training.seed)
    elsewhere = max(lab.seeds) + 1  # the winner is judged by seeds that did not choose it
    points = quasi_random(space(start), lab.options.recipe.trials, seed)
    trials: list[tuple[Setup, Outcome]] = []
    for number, point in enumerate(points, 1):
        setup = start.change(**{k: _plain(v) for k, v in point.items()})
        trials.append((setup, lab.run(f"trial {number}", setup, elsewhere)))
    feasible = [(o.loss, s) for s, o in trials if math.isfinite(o.loss)]
    lab.report.exhibit(_table(points, [o for _, o in trials], lab.metric_name))
    _study(journey, points, [o for _, o in trials], elsewhere)
    if feasible:
        winner = min(feasible, key=lambda pair: pair[0])[1]
        standing = _adopt(journey, "the search's winner", winner, standing)
    longer = journey.setup.change(epochs=2 * start.epochs)
    standing = _adopt(journey, "twice as long", longer, standing)
    journey.note("tune", standing)
    _distil(journey)
    gain = journey.gain(before, standing)
    return tune_gate(
        gain,
        _improved(before, standing),
        len(feasible),
        len(trials),
        lab.options.target,
        _target_value(journey, standing),
    )


def _study(
    journey: Journey, points: list[dict[str, Any]], outcomes: list[Outcome], seed: int
) -> None:
    """What the search as a whole says: edges, sparseness, where it diverged."""
    from hf_recipe.tune.analysis import analyse

    lab = journey.lab
    trials = []
    for point, outcome in zip(points, outcomes, strict=True):
        finite = math.isfinite(outcome.loss)
        trials.append(
            {
                "params": {name: _plain(value) for name, value in point.items()},
                "value": outcome.loss if finite else None,
                "state": "complete" if finite else "failed",
                "seed": seed,
                "curve": [loss for _, loss in outcome.facts["curve"]],
            }
        )
    seen = analyse(trials, space(journey.setup), "validation loss", False)
    wanted = lab.chosen("tune")
    for finding in seen.flat:
        if finding.check in wanted:
            lab.report.add(finding)
            lab.show.finding(finding)
    lab.absorb(seen)
    for exhibit in seen.exhibits:
        lab.report.exhibit(exhibit)


def _adopt(journey: Journey, what: str, setup: Setup, standing: list[Outcome]) -> list[Outcome]:
    """Take `setup` where it beats what stands beyond seed noise."""
    outcomes = journey.outcomes(what, setup)
    gain = journey.gain(standing, outcomes)
    better = gain.verdict is True and _improved(standing, outcomes) >= ADOPT_AT
    journey.lab.report.answer(
        Answer(
            f"Does {what} beat what stood before?",
            "tune",
            f"{'yes' if better else 'not beyond noise'}: {gain}",
        )
    )
    if not better:
        return standing
    journey.setup = setup
    return outcomes


def _improved(before: list[Outcome], after: list[Outcome]) -> float:
    return mean([float(b.loss < a.loss) for a, b in zip(before, after, strict=True)])


def _distil(journey: Journey) -> None:
    """A student with and without the teacher, on the same rows and seeds."""
    lab = journey.lab
    kept = journey.setup.change(keep=True)
    teacher = kept.variant("teacher", lab.seeds[0])
    lab.train(teacher)
    alone = student_of(journey)
    taught = alone.change(teacher=str(lab.model_path(teacher)))
    plain = journey.outcomes("student alone", alone)
    distilled = journey.outcomes("student, distilled", taught)
    gain = journey.gain(plain, distilled)
    journey.note("student alone", plain)
    journey.note("student, distilled", distilled)
    word = {True: "yes", False: "no", None: "undecided"}[gain.verdict]
    lab.report.answer(Answer("Does the teacher help the student?", "tune", f"{word}: {gain}"))


def student_of(journey: Journey) -> Setup:
    """A small network at the rate the job began with: it bears more than a large one."""
    rate = journey.lab.start.learning_rate
    return journey.setup.change(model="student", learning_rate=rate, dropout=0.0)


def _target_value(journey: Journey, outcomes: list[Outcome]) -> float | None:
    target = journey.lab.options.target
    if target is None:
        return None
    key = f"validation_{target[0]}"
    values = [o.facts["metrics"].get(key) for o in outcomes]
    return mean(values) if all(v is not None for v in values) else None


def _table(points: list[dict[str, Any]], outcomes: list[Outcome], metric: str) -> Table:
    names = tuple(points[0]) if points else ()
    rows = tuple(
        (*(_plain(point[name]) for name in names), outcome.loss, outcome.metric)
        for point, outcome in zip(points, outcomes, strict=True)
    )
    return Table("The search", "tune", (*names, "validation loss", metric), rows)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
