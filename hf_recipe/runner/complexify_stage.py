"""Complexify: a larger model, a race of rates, a larger input; no decay yet. Aim: overfit."""

from __future__ import annotations

from hf_recipe.core.exhibit import Answer, Ladder, Rung
from hf_recipe.core.report import Gate
from hf_recipe.instruments.compare import Outcome
from hf_recipe.runner.gates import complexify_gate
from hf_recipe.runner.growing import grow_input, try_next_rung
from hf_recipe.runner.journey import Journey, mean, train_loss, validation_loss
from hf_recipe.runner.pieces import curves
from hf_recipe.runner.racing import race
from hf_recipe.runner.setup import Setup


def run(journey: Journey) -> Gate:
    """Grow, race, grow on; leaves the setup that fits the training rows best."""
    _grow(journey)
    stood = journey.setup
    best = race(journey)
    try_next_rung(journey, best)
    grow_input(journey, best)
    outcomes = _at_full_length(journey, stood, best)
    journey.note("complexify: " + journey.setup.model, outcomes)
    first = outcomes[0]
    journey.lab.report.exhibit(curves(first, "The large model's course", "complexify"))
    train = [Outcome(tuple(o.facts["train_losses"])) for o in outcomes]
    return complexify_gate(
        train_loss(outcomes),
        mean([o.standard_error for o in train]),
        validation_loss(outcomes),
        mean([o.standard_error for o in outcomes]),
    )


def _grow(journey: Journey) -> None:
    """Take the larger model if it fits the training rows better."""
    lab, setup = journey.lab, journey.setup
    if lab.pretrained:
        lab.report.answer(
            Answer("Does a larger model fit better?", "complexify", "a checkpoint is given")
        )
        return
    large = setup.change(model="large")
    before, after = journey.outcomes("base", setup), journey.outcomes("large", large, watch=True)
    gain, validation = journey.gain(before, after, train=True), journey.gain(before, after)
    word = {True: "yes", False: "no", None: "undecided"}[gain.verdict]
    lab.report.answer(
        Answer(
            "Does a larger model fit better?",
            "complexify",
            f"{word}: training loss {gain}, validation {validation}",
            {"training": str(gain), "validation": str(validation)},
        )
    )
    rungs = (
        Rung("base", validation_loss(before), metric=before[0].metric, kept=True),
        Rung(
            "large",
            validation_loss(after),
            validation.mean,
            validation.low,
            validation.high,
            after[0].metric,
            sum(o.cost for o in after),
            gain.verdict is True,
            f"training loss {gain}",
        ),
    )
    lab.report.exhibit(Ladder("Growth", "complexify", rungs, lab.metric_name))
    if gain.verdict is True:
        journey.setup = large


def _at_full_length(journey: Journey, stood: Setup, best: float) -> list[Outcome]:
    """What the brief runs liked, at full length and still constant: at the race's rate, or its own.

    It stays unless it fits the training rows worse than what stood before them; else that stays.
    """
    liked = journey.setup
    before = journey.outcomes("where the stage ends", stood)
    for what, setup in {
        f"the race's winner, {best:.1e}, at full length": liked.change(learning_rate=best),
        "what was liked, at the rate before": liked,
    }.items():
        if setup == stood:
            break
        outcomes = journey.outcomes(what, setup)
        if journey.gain(before, outcomes, train=True).verdict is not False:
            journey.setup = setup
            return outcomes
    journey.setup = stood
    return before
