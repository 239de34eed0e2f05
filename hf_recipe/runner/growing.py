"""Growth in the main job: the next rung of the ladder, and the input by one size at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_recipe.complexify.architectures import RUNGS, NextRung, ladder, table
from hf_recipe.complexify.growth import climb
from hf_recipe.core.exhibit import Answer
from hf_recipe.instruments.compare import Gain, Outcome
from hf_recipe.runner.journey import Journey, train_loss
from hf_recipe.runner.racing import judge, short


def grow_input(journey: Journey, rate: float) -> None:
    """Grow the input one size at a time, briefly, at a constant rate; two seeds each."""
    lab, feed = journey.lab, journey.lab.feed
    if not feed.sizes:
        lab.left_out("the size of the input", feed.fixed)
        return
    shares = feed.sizes if not lab.pretrained else tuple(s for s in feed.sizes if s <= 1)
    plain, seeds, what = short(journey.setup, rate), lab.seeds[:2], feed.size_name

    pool = Journey(lab, plain)  # brief runs pool with no others

    def aside(before: Sequence[Outcome], after: Sequence[Outcome]) -> Gain:
        return pool.gain(list(before), list(after))

    def train(share: float) -> list[Any]:
        setup = plain.change(share=share)
        return [lab.run(f"{what} {feed.size_of(share)}", setup, seed) for seed in seeds]

    sizes = [(feed.size_of(share), share) for share in shares]
    standing, rungs, grown = climb(train, sizes, what=what, gain=aside, metric_name=lab.metric_name)
    lab.report.exhibit(rungs)
    for growth in grown:
        judge(lab, growth)
    lab.report.answer(
        Answer(
            "How large an input is worth its cost?",
            "complexify",
            f"{what} {feed.size_of(standing)}: no larger one tried brought a gain beyond doubt"
            if standing < shares[-1]
            else f"{what} {feed.size_of(standing)}, the largest tried",
            {growth.after: [growth.gain, growth.low, growth.high] for growth in grown},
        )
    )


def try_next_rung(journey: Journey, rate: float) -> None:
    """Train the next architecture of the ladder as briefly as the race did.

    Where the larger one has just been turned down, those trainings are remembered, not repeated.
    """
    lab, setup = journey.lab, journey.setup
    if lab.pretrained or setup.model not in RUNGS[:-1] or lab.given:
        return
    begin = lab.options.model.architecture
    rungs = ladder(lab.data.task.ladder(lab.data.kind), len(lab.data.splits["train"]), begin)
    upper = RUNGS[RUNGS.index(setup.model) + 1]
    if rungs[upper] == rungs[setup.model]:
        return
    plain, seeds = short(setup, rate), lab.seeds[:2]
    if setup.model == RUNGS[1]:  # the stage began with these two, at full length
        plain, seeds = setup, lab.seeds
    here = [lab.run(f"constant rate {rate:.1e}", plain, seed) for seed in seeds]
    there = [lab.run(rungs[upper].name, plain.change(model=upper), seed) for seed in seeds]
    gain = Journey(lab, plain).gain(here, there, train=True)  # brief runs pool with no others
    sizes = {
        name: int(o[0].facts["parameters"]) for name, o in ((setup.model, here), (upper, there))
    }
    lab.report.exhibit(table(rungs, sizes))
    judge(
        lab,
        NextRung(
            name=rungs[setup.model].name,
            next_name=rungs[upper].name,
            parameters=sizes[setup.model],
            next_parameters=sizes[upper],
            loss=train_loss(here),
            gain=gain.mean,
            low=gain.low,
            high=gain.high,
            seeds=gain.seeds,
        ),
    )
