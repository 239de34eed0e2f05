"""Regularize: one change at a time, on paired rows; what does not help is not kept."""

from __future__ import annotations

import math

from hf_recipe.core.exhibit import Ladder, Rung
from hf_recipe.core.report import Gate
from hf_recipe.instruments.compare import (
    FIRST_LOOK,
    Gain,
    Outcome,
    ladder_level,
    paired_gain,
    seed_spread,
)
from hf_recipe.runner.beside import gains_beside
from hf_recipe.runner.data_worth import look_at_data
from hf_recipe.runner.gates import regularize_gate
from hf_recipe.runner.journey import PROMISING, Journey, train_loss, validation_loss
from hf_recipe.runner.looks import against_simplest
from hf_recipe.runner.pieces import curves
from hf_recipe.runner.regularizers import NAMES, Try, chosen, proposal
from hf_recipe.runner.setup import Setup


def run(journey: Journey) -> Gate:
    """Add what helps to what stands; compare the end with the start."""
    lab = journey.lab
    start = journey.setup
    before = journey.outcomes("where the stage begins", start)
    whole, rungs = climb(journey, before)
    standing = whole[: len(before)]
    lab.report.exhibit(curves(standing[0], "The regularized model's course", "regularize"))
    look_at_data(journey, standing)
    journey.note("regularize: " + (kept(start, journey.setup) or "nothing kept"), standing)
    if journey.simplest:
        against_simplest(
            lab,
            validation_loss(journey.simplest),
            validation_loss(standing),
            journey.gain(journey.simplest, standing),
            len(standing[0].row_losses),
            int(standing[0].facts["steps"]),
        )
    seeds = range(lab.seeds[0], lab.seeds[0] + len(whole))
    gain = journey.gain(journey.outcomes("where the stage began", start, seeds=seeds), whole)
    return regularize_gate(gain, _gap(before), _gap(standing), _closest(rungs, len(lab.seeds)))


def climb(journey: Journey, standing: list[Outcome]) -> tuple[list[Outcome], list[Rung]]:
    """Try one regularizer after the other on what stands; the ladder goes into the report.

    What is kept is tried at a greater strength at once. That asks nothing more of the level: the
    greater strength is tried only where the smaller one was no error.

    Returns:
        The outcomes of what stands at the end, on the journey's seeds or on twice as many, with
        ``journey.setup`` its setup; and the ladder.
    """
    names = chosen(journey.lab.options.recipe.regularizers)
    rungs = [Rung("start", validation_loss(standing), metric=standing[0].metric, kept=True)]
    pairs, left_out = _Pairs(journey, standing, len(names)), []
    for name in names:
        found: Try | str | None = proposal(name, journey, int(standing[0].facts["planned"]))
        if isinstance(found, str):
            left_out.append(f"{name}: {found}")
        while isinstance(found, Try):
            outcomes, gain, shared = pairs.judge(found)
            rungs.append(_rung(found.what, outcomes, gain, shared))
            if gain.verdict is True:
                journey.setup, pairs.standing = journey.setup.change(**found.change), outcomes
            found = found.stronger if gain.verdict is True else None
    _show(journey, rungs, left_out, names)
    return pairs.standing, rungs


class _Pairs:
    """What stands, and the paired comparisons of what is tried with it.

    Each is looked at twice, if need be: what might help but cannot be told from noise is trained
    with as many seeds again, on both sides. What does not look like helping is left at that.

    Attributes:
        standing: outcomes of the journey's setup, one for each seed, on some more seeds or not.
    """

    def __init__(self, journey: Journey, standing: list[Outcome], names: int) -> None:
        self.journey, self.standing, self.names = journey, list(standing), names
        self.few, self.more = len(standing), journey.more_seeds

    def judge(self, found: Try) -> tuple[list[Outcome], Gain, bool]:
        """Outcomes of what is tried, its gain, and whether it came with another training."""
        journey = self.journey
        tried = journey.setup.change(**found.change)
        outcomes = journey.outcomes(found.what, tried)
        level = ladder_level(self.names, FIRST_LOOK)
        gain, shared = self._gain(found, outcomes, level), self._shared(found, outcomes)
        if gain.verdict is None and self._gain(found, outcomes, PROMISING).verdict is True:
            if len(self.standing) == self.few:
                self.standing += journey.outcomes("what stands", journey.setup, seeds=self.more)
            outcomes = [*outcomes, *journey.outcomes(found.what, tried, seeds=self.more)]
            gain = self._gain(found, outcomes, ladder_level(self.names, 1 - FIRST_LOOK))
        return outcomes, gain, shared

    def _shared(self, found: Try, outcomes: list[Outcome]) -> bool:
        return bool(found.beside and all(o.facts.get("shared") for o in outcomes))

    def _gain(self, found: Try, outcomes: list[Outcome], level: float) -> Gain:
        """Over the seeds of `outcomes`.

        What comes with a training shares all of a seed's luck with that training's last weights;
        what is left of it is pooled over all trainings of the job that have it beside them.
        """
        standing = self.standing[: len(outcomes)]
        if not self._shared(found, outcomes):
            return self.journey.gain(standing, outcomes, level=level)
        return paired_gain(
            [o.row_losses for o in standing],
            [o.row_losses for o in outcomes],
            level=level,
            seed_variance=seed_spread(gains_beside(found.beside, self.journey.seen)),
        )


def _closest(rungs: list[Rung], seeds: int) -> tuple[str, Gain] | None:
    """Where nothing was kept: what came closest to it, by the lower end of its interval."""
    if any(rung.kept for rung in rungs[1:]):
        return None
    told = [
        (rung.change, Gain(rung.gain, rung.low, rung.high, seeds))
        for rung in rungs[1:]
        if rung.gain is not None and rung.low is not None and rung.high is not None
    ]
    return max(told, key=lambda each: each[1].low, default=None)


def _show(journey: Journey, rungs: list[Rung], left_out: list[str], names: tuple[str, ...]) -> None:
    """The ladder, and what was left out of it and why: in the report and on the console."""
    lab = journey.lab
    untried = [name for name in NAMES if name not in names]
    first, second = (ladder_level(len(names), share) for share in (FIRST_LOOK, 1 - FIRST_LOOK))
    caption = (
        f"Kept: better beyond an interval of {first:.1%}, or, with as many seeds again, of "
        f"{second:.1%}, so that all of {len(names)} that do nothing stay out in 95 % of ladders; "
        "what was kept is tried twice as strong."
        + (f" Not tried: {'; '.join(left_out)}." if left_out else "")
        + (f" Not asked for: {', '.join(untried)} (--regularizers)." if untried else "")
    )
    title = "Regularizers, one at a time"
    lab.report.exhibit(Ladder(title, "regularize", tuple(rungs), lab.metric_name, caption))
    for line in left_out:
        lab.show.say(f"       not tried: {line}")
    for rung in rungs[1:]:
        lab.show.say(f"       {line_of(rung)}")


def _rung(what: str, outcomes: list[Outcome], gain: Gain, shared: bool) -> Rung:
    finite = math.isfinite(gain.mean)
    note = "" if finite else "the loss is not finite"
    if shared:
        same = gain.low == gain.high == 0
        note = "the last weights are the best" if same else "looked at beside the one above"
    return Rung(
        what,
        validation_loss(outcomes),
        gain.mean if finite else None,
        gain.low if finite else None,
        gain.high if finite else None,
        outcomes[0].metric,
        sum(o.cost for o in outcomes),
        gain.verdict,
        note,
    )


def line_of(rung: Rung) -> str:
    """A rung in one line."""
    word = {True: "kept", False: "worse", None: "not kept"}[rung.kept]
    gain = rung.note
    if rung.gain is not None and rung.low is not None and rung.high is not None:
        gain = f"gain {rung.gain:+.4f} [{rung.low:+.4f}, {rung.high:+.4f}]"
    return f"{rung.change}: {gain}, {rung.cost or 0.0:.1f} s: {word}"


def _gap(outcomes: list[Outcome]) -> float:
    return validation_loss(outcomes) - train_loss(outcomes)


def kept(start: Setup, end: Setup) -> str:
    """Names of what differs between two setups, comma separated."""
    names = (
        *("augment", "simulated", "without", "model", "batch", "dropout", "depth"),
        *("weight_decay", "label_smoothing", "early_stopping", "average"),
    )
    return ", ".join(name for name in names if getattr(start, name) != getattr(end, name))
