"""The race of rates in the main job: short runs at constant rates, remedies where some blow up."""

from __future__ import annotations

import math

import numpy as np

from hf_recipe.complexify.rate_race import (
    Lap,
    RateRace,
    blown_up,
    picture,
    settled,
    warm_ups,
)
from hf_recipe.core.check import Measurement
from hf_recipe.core.exhibit import Answer
from hf_recipe.examiner import Examiner
from hf_recipe.instruments.compare import Outcome
from hf_recipe.instruments.distributed import from_rank_0, rank
from hf_recipe.runner.experiment import Lab
from hf_recipe.runner.journey import Journey, mean, train_loss
from hf_recipe.runner.setup import Setup

FACTORS = (0.2, 0.5, 1.0, 2.0, 4.0)
RACE_SHARE = 0.3  # of the epochs: enough to rank rates, not to finish


def judge(lab: Lab, measurement: Measurement) -> None:
    """Let the selected checks judge what a stage has measured."""
    examiner = Examiner(
        lab.settings(), lab.report, hear=lab.show.finding, agree=from_rank_0, leads=rank() == 0
    )
    examiner.judge(measurement, "end")


def short(setup: Setup, rate: float) -> Setup:
    """`setup`, briefly and at a constant rate."""
    epochs = max(1.0, round(setup.epochs * RACE_SHARE))
    return setup.change(schedule="constant", epochs=epochs, learning_rate=rate)


def race(journey: Journey) -> float:
    """The rate with the lowest training loss; the two best are run with a second seed."""
    lab, setup = journey.lab, journey.setup
    rates = [setup.learning_rate * factor for factor in FACTORS]
    lab.ahead([short(setup, rate).variant(_called(rate), lab.seeds[0]) for rate in rates])
    runs = {rate: [lab.run(_called(rate), short(setup, rate))] for rate in rates}
    finite = sorted(
        (r for r in runs if math.isfinite(train_loss(runs[r]))), key=lambda r: train_loss(runs[r])
    )
    again = finite[:2] if len(lab.seeds) > 1 else []
    lab.ahead([short(setup, rate).variant(_called(rate), lab.seeds[1]) for rate in again])
    for rate in again:
        runs[rate].append(lab.run(_called(rate), short(setup, rate), lab.seeds[1]))
    laps = tuple(_lap(rate, outcomes) for rate, outcomes in runs.items())
    blind = float(np.mean(lab.data.task.blind_losses(lab.feed)))
    found = RateRace(laps, (), blind)
    best = found.best()
    if best is None:
        return setup.learning_rate
    found = RateRace(laps, _remedies(journey, found, runs[best.rate][0]), blind)
    lab.report.exhibit(picture(found))
    judge(lab, found)
    lab.report.answer(_which(found, best))
    lab.report.answer(_bound(runs[best.rate][0], setup, best))
    return best.rate


def _called(rate: float) -> str:
    return f"constant rate {rate:.1e}"


def _lap(rate: float, outcomes: list[Outcome], change: str = "") -> Lap:
    rows = np.asarray(outcomes[0].facts["train_losses"], dtype=float)
    error = float(rows.std(ddof=1) / math.sqrt(len(rows))) if len(rows) > 1 else 0.0
    losses = tuple(mean(list(o.facts["train_losses"])) for o in outcomes)
    return Lap(rate, losses, error if math.isfinite(error) else 0.0, change)


def _remedies(journey: Journey, found: RateRace, best: Outcome) -> tuple[Lap, ...]:
    """The lowest rate that blew up, with a warm-up by decades, then with clipping."""
    lost = blown_up(found)
    if not lost:
        return ()
    rate, steps = lost[0].rate, int(best.facts["planned"])
    plain, laps = short(journey.setup, rate), []
    tried: list[tuple[str, dict[str, float]]] = [
        (f"a warm-up over {share:.1%} of the steps", {"warmup": share})
        for share in warm_ups(steps)[-2:]
    ]
    norm = best.facts.get("norm_p90")
    if norm:
        tried.append((f"clipping at {norm:.2g}", {"clip": float(f"{norm:.2g}")}))
    for name, change in tried:
        schedule = "constant_with_warmup" if "warmup" in change else "constant"
        setup = plain.change(schedule=schedule, **change)
        outcome = journey.lab.run(f"rate {rate:.1e}, {name}", setup)
        laps.append(_lap(rate, [outcome], name))
    return tuple(laps)


def _which(found: RateRace, best: Lap) -> Answer:
    rates = [lap.rate for lap in found.laps]
    edge = best.rate in (rates[0], rates[-1])
    return Answer(
        "Which learning rate?",
        "complexify",
        f"{best.rate:.1e} at a constant rate, training loss {best.loss:.4f} +- {best.error:.4f}"
        + (", the edge of the race: try beyond it" if edge else ""),
        {"rates": rates, "losses": [lap.loss for lap in found.laps]},
    )


def _bound(outcome: Outcome, setup: Setup, best: Lap) -> Answer:
    """The playbook's first guess of the number of steps."""
    steps = int(outcome.facts["steps"])
    share = settled([(float(s), float(loss)) for s, loss in outcome.facts["train_curve"]])
    if share >= 0.8:
        word = f"yes, at this length: at {best.rate:.1e} the loss still fell at step {steps:,}"
    else:
        word = f"no: at {best.rate:.1e} the loss settled at step {round(share * steps):,}"
    guess = round(share * steps) if share < 0.8 else round(steps / RACE_SHARE)
    return Answer(
        "Is training bound by compute?",
        "complexify",
        f"{word}; first guess {guess:,} steps",
        {"steps": guess, "settled": share},
    )
