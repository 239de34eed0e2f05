"""Regularize: one change at a time, on paired rows; what does not help is not kept."""

from __future__ import annotations

import math

from hf_recipe.core.exhibit import Ladder, Rung
from hf_recipe.core.report import Gate
from hf_recipe.instruments.compare import Outcome
from hf_recipe.runner.data_worth import look_at_data
from hf_recipe.runner.gates import regularize_gate
from hf_recipe.runner.journey import Journey, train_loss, validation_loss
from hf_recipe.runner.looks import against_simplest
from hf_recipe.runner.pieces import curves
from hf_recipe.runner.setup import Setup


def changes(journey: Journey) -> list[tuple[str, dict[str, object]]]:
    """What is tried, in the recipe's order: data first, then the network, then stopping."""
    tried: list[tuple[str, dict[str, object]]] = []
    if journey.lab.feed.changes:
        tried.append(("augmentation", {"augment": True}))
    else:
        journey.lab.left_out("augmentation", journey.lab.feed.fixed)
    tried += [
        ("dropout 0.1", {"dropout": 0.1}),
        ("weight decay 0.1", {"weight_decay": 0.1}),
        ("early stopping", {"early_stopping": True}),
    ]
    first = journey.lab.start
    if journey.setup.model != first.model:  # trained already: it costs nothing to ask
        names = ("model", "learning_rate", "schedule")
        tried.append(("the smaller model", {name: getattr(first, name) for name in names}))
    return tried


def run(journey: Journey) -> Gate:
    """Add what helps to what stands; compare the end with the start."""
    lab = journey.lab
    start = journey.setup
    before = standing = journey.outcomes("where the stage begins", start)
    rungs = [Rung("start", validation_loss(before), metric=before[0].metric, kept=True)]
    for name, change in changes(journey):
        tried = journey.setup.change(**change)
        outcomes = journey.outcomes(name, tried)
        gain = journey.gain(standing, outcomes)
        finite = math.isfinite(gain.mean)
        rungs.append(
            Rung(
                name,
                validation_loss(outcomes),
                gain.mean if finite else None,
                gain.low if finite else None,
                gain.high if finite else None,
                outcomes[0].metric,
                sum(o.cost for o in outcomes),
                gain.verdict,
            )
        )
        if gain.verdict is True:
            journey.setup, standing = tried, outcomes
    lab.report.exhibit(
        Ladder("Regularizers, one at a time", "regularize", tuple(rungs), lab.metric_name)
    )
    lab.report.exhibit(curves(standing[0], "The regularized model's course", "regularize"))
    look_at_data(journey, standing)
    journey.note("regularize: " + (_kept(start, journey.setup) or "nothing kept"), standing)
    if journey.simplest:
        against_simplest(
            lab,
            validation_loss(journey.simplest),
            validation_loss(standing),
            journey.gain(journey.simplest, standing),
            len(standing[0].row_losses),
            int(standing[0].facts["steps"]),
        )
    return regularize_gate(journey.gain(before, standing), _gap(before), _gap(standing))


def _gap(outcomes: list[Outcome]) -> float:
    return validation_loss(outcomes) - train_loss(outcomes)


def _kept(start: Setup, end: Setup) -> str:
    names = ("augment", "dropout", "weight_decay", "early_stopping", "model")
    return ", ".join(name for name in names if getattr(start, name) != getattr(end, name))
