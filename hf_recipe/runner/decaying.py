"""The learning rate's decay, tuned at the very end: every stage before trains at a constant rate.

Decay tables that come with code were made for another number of epochs of another data set; while
anything else still changes they decide when a run stops learning. So decay comes last, over exactly
this run's steps.
"""

from __future__ import annotations

import math

from hf_recipe.core.exhibit import Answer, Ladder, Rung
from hf_recipe.instruments.compare import Outcome
from hf_recipe.runner.journey import Journey, validation_loss
from hf_recipe.runner.setup import Setup

# a constant rate is punished for its noise, which decay takes away: so begin at twice the winner
DECAYS = (("linear", 2.0), ("cosine", 2.0))


def decays(setup: Setup) -> dict[str, Setup]:
    """Ways to decay from a setup with a constant rate, by what they are called."""
    found = {}
    for schedule, factor in DECAYS:
        rate = factor * setup.learning_rate
        found[f"decay {schedule} from {rate:.1e}"] = setup.change(
            schedule=schedule, learning_rate=rate
        )
    return found


def tune_decay(journey: Journey, standing: list[Outcome]) -> list[Outcome]:
    """Try decays with a seed of their own; the best is trained with all, kept where it is better.

    Args:
        standing: outcomes of the journey's setup.

    Returns:
        Outcomes of the setup that stands now.
    """
    lab, begin = journey.lab, journey.setup
    if begin.schedule != "constant":
        lab.report.answer(
            Answer("Which decay?", "tune", f"{begin.schedule}, as the flags say; none was tried")
        )
        return standing
    tried = decays(begin)
    elsewhere = max(journey.more_seeds) + 1  # the best is judged by seeds that did not choose it
    lab.ahead([setup.variant(name, elsewhere) for name, setup in tried.items()])
    losses = {name: lab.run(name, setup, elsewhere).loss for name, setup in tried.items()}
    finite = {name: loss for name, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        return standing
    best = min(finite, key=lambda name: finite[name])
    outcomes = journey.outcomes(best, tried[best])
    gain = journey.gain(standing, outcomes)
    # A constant rate's last weights hold the noise of its last steps, which any decay takes away:
    # what is left in doubt is the decay's to profit by.
    better = gain.verdict is not False and gain.mean > 0
    rungs = [
        Rung("a constant rate", validation_loss(standing), metric=standing[0].metric, kept=True)
    ]
    rungs += [Rung(name, loss, note="one seed") for name, loss in finite.items() if name != best]
    rungs.append(
        Rung(
            best,
            validation_loss(outcomes),
            gain.mean if math.isfinite(gain.mean) else None,
            gain.low if math.isfinite(gain.mean) else None,
            gain.high if math.isfinite(gain.mean) else None,
            outcomes[0].metric,
            sum(o.cost for o in outcomes),
            better,
        )
    )
    lab.report.exhibit(Ladder("Decay, tuned last", "tune", tuple(rungs), lab.metric_name))
    word = best if better else "none: a constant rate does as well"
    lab.report.answer(Answer("Which decay?", "tune", f"{word}; {gain}", {"losses": losses}))
    if not better:
        return standing
    journey.setup = tried[best]
    return outcomes
