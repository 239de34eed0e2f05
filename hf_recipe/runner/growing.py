"""Growth in the main job: the next rung of the ladder, and the input by one size at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hf_recipe.complexify.architectures import RUNGS, NextRung, ladder, table
from hf_recipe.complexify.growth import Growth, climb
from hf_recipe.core.exhibit import Answer, Ladder, Rung
from hf_recipe.instruments.compare import Gain, Outcome
from hf_recipe.runner.journey import Journey, train_loss, validation_loss
from hf_recipe.runner.racing import judge, short

SMALL = 0.05  # of the held-out loss: a gain that may be given up for a smaller input


def grow_input(journey: Journey, rate: float) -> None:
    """Grow the input one size at a time, briefly, at a constant rate; two seeds each.

    What stands is adopted. One that is smaller than the whole input is so only where the whole
    one's gain is known to be small: "no gain that could be seen" may be few rows speaking.
    """
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
        setup, name = plain.change(share=share), f"{what} {feed.size_of(share)}"
        lab.ahead([setup.variant(name, seed) for seed in seeds])
        return [lab.run(name, setup, seed) for seed in seeds]

    sizes = [(feed.size_of(share), share) for share in shares]
    standing, rungs, grown = climb(train, sizes, what=what, gain=aside, metric_name=lab.metric_name)
    lab.report.exhibit(rungs)
    for growth in grown:
        judge(lab, growth)
    adopted = adopt(standing, {s: g for s, g in zip(shares[1:], grown, strict=True)}, rungs)
    journey.setup = journey.setup.change(share=adopted)
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


def adopt(standing: float, grown: Mapping[float, Growth], rungs: Ladder) -> float:
    """The share of the input to go on with.

    Args:
        standing: the largest share whose growth was kept.
        grown: what growing to each share gave.
        rungs: the ladder, for the losses.
    """
    losses = [rung.loss for rung in rungs.rungs]
    limit = SMALL * min(abs(loss) for loss in losses if loss is not None)
    doubtful = any(g.high > limit for s, g in grown.items() if standing < s <= 1)
    return 1.0 if standing < 1 and doubtful else standing


def try_next_rung(journey: Journey, rate: float) -> None:
    """Train the next architecture of the ladder as briefly as the race did; keep what helps.

    Where the larger one has just been turned down, those trainings are remembered, not repeated.
    It is kept where it fits the training rows better and the held-out rows too: capacity that
    only learns by heart is there already.
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
    brief = Journey(lab, plain)  # brief runs pool with no others
    gain, held_out = brief.gain(here, there, train=True), brief.gain(here, there)
    kept = gain.verdict is True and held_out.verdict is True
    sizes = {
        name: int(o[0].facts["parameters"]) for name, o in ((setup.model, here), (upper, there))
    }
    lab.report.exhibit(table(rungs, sizes))
    if setup.model != RUNGS[1]:  # else the stage's first ladder shows these two
        names = (rungs[setup.model].name, rungs[upper].name)
        lab.report.exhibit(_climbed(names, here, there, held_out, kept, lab.metric_name))
    if kept:
        journey.setup = setup.change(model=upper)
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


def _climbed(
    names: tuple[str, str],
    here: Sequence[Outcome],
    there: Sequence[Outcome],
    gain: Gain,
    kept: bool,
    metric: str,
) -> Ladder:
    """The two architectures on held-out rows."""
    finite = math.isfinite(gain.mean)
    tried = Rung(
        names[1],
        validation_loss(list(there)),
        gain.mean if finite else None,
        gain.low if finite else None,
        gain.high if finite else None,
        there[0].metric,
        sum(o.cost for o in there),
        kept,
    )
    stood = Rung(names[0], validation_loss(list(here)), metric=here[0].metric, kept=True)
    return Ladder("The next architecture", "complexify", (stood, tried), metric)
