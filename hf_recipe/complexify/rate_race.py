"""A race of short runs at constant rates, and what would open the rates above the best one.

No range test is an oracle: losses under a rate that grows say little of a rate that stays. So
short runs at constant rates are compared on the same training rows, with the noise of rows and
seeds. Where the rates just above the best one blow up, the playbook tries a longer warm-up, by
decades up to a tenth of the steps, and clipping at the 90th percentile of the gradient's norms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.exhibit import Curve, Line
from hf_recipe.core.finding import Fault

WARM_UPS = (0.001, 0.01, 0.1)  # shares of the steps
CLIP_AT = 0.9  # quantile of the gradient's norms


@dataclass(frozen=True)
class Lap:
    """One rate, run with one or more seeds.

    Attributes:
        rate: constant learning rate.
        losses: training loss of each seed's run, in evaluation mode.
        row_error: standard error of such a loss over rows.
        change: what was done besides, "" for nothing.
    """

    rate: float
    losses: tuple[float, ...]
    row_error: float
    change: str = ""

    @property
    def loss(self) -> float:
        """Mean over seeds."""
        return sum(self.losses) / len(self.losses)

    @property
    def error(self) -> float:
        """Standard error of the mean: rows, and seeds where there are several."""
        n = len(self.losses)
        spread = sum((x - self.loss) ** 2 for x in self.losses) / (n - 1) / n if n > 1 else 0.0
        return math.sqrt(self.row_error**2 / n + spread)


@dataclass(frozen=True)
class RateRace(Measurement):
    """All laps, and the runs with a remedy.

    Attributes:
        laps: in order of rate.
        remedies: the lowest rate that blew up, again, with a remedy each.
        blind: loss of an answer that never looks at its input.
    """

    laps: tuple[Lap, ...]
    remedies: tuple[Lap, ...]
    blind: float

    def best(self) -> Lap | None:
        """The lap with the lowest finite loss."""
        finite = [lap for lap in self.laps if math.isfinite(lap.loss)]
        return min(finite, key=lambda lap: lap.loss) if finite else None


def half_decades(centre: float, below: int = 2, above: int = 2) -> tuple[float, ...]:
    """Rates around `centre`, each about three times the one before, rounded to two digits."""
    return tuple(float(f"{centre * 10 ** (k / 2):.1e}") for k in range(-below, above + 1))


def blown_up(race: RateRace) -> tuple[Lap, ...]:
    """Laps above the best rate that learned nothing: no number, or most of the way to blind."""
    best = race.best()
    if best is None:
        return ()
    limit = best.loss + 0.5 * (race.blind - best.loss)
    return tuple(
        lap
        for lap in race.laps
        if lap.rate > best.rate and not lap.loss < max(limit, best.loss + 5 * best.error)
    )


def warm_ups(steps: int) -> tuple[float, ...]:
    """Shares of the steps that are two steps or more, by decades."""
    return tuple(share for share in WARM_UPS if round(share * steps) >= 2)


def picture(race: RateRace) -> Curve:
    """Loss over rate with its noise, and the remedies beside it."""
    lines = []
    for name, laps in (("constant", race.laps), ("with a remedy", race.remedies)):
        finite = [lap for lap in laps if math.isfinite(lap.loss)]
        if finite:
            lines.append(
                Line(
                    name,
                    tuple(lap.rate for lap in finite),
                    tuple(lap.loss for lap in finite),
                    tuple(lap.loss - 2 * lap.error for lap in finite),
                    tuple(lap.loss + 2 * lap.error for lap in finite),
                )
            )
    return Curve(
        "Race of rates",
        "complexify",
        "learning rate",
        "training loss",
        tuple(lines),
        caption="Short runs at constant rates; two standard errors of rows and seeds.",
        log_x=True,
    )


def settled(curve: Sequence[tuple[float, float]], share: float = 0.02) -> float:
    """The share of a run's steps after which its loss fell by less than `share` of itself."""
    if len(curve) < 4:
        return 1.0
    tail = [loss for _, loss in curve[-max(1, len(curve) // 5) :]]
    level = sum(tail) / len(tail) * (1 + share)
    first = next((step for step, loss in curve if loss <= level), curve[-1][0])
    return float(first / curve[-1][0])


# -------------------------------------------------------------------- the check


def unstable(
    race: RateRace,
    *,
    sigmas: Annotated[float, "standard errors by which a remedied rate beats the best one"] = 2.0,
) -> Iterator[Fault]:
    """Rates above the best one blow up: say what would open them."""
    best, lost = race.best(), blown_up(race)
    if best is None or not lost:
        return
    good = [
        lap
        for lap in race.remedies
        if lap.loss < best.loss - sigmas * math.hypot(lap.error, best.error)
    ]
    tried = ", ".join(f"{lap.change} {lap.loss:.4f}" for lap in race.remedies) or "nothing tried"
    fix = f"learning_rate={best.rate:.1e}"
    if good:
        opened = min(good, key=lambda lap: lap.loss)
        what = f"{opened.change} opens it: {opened.loss:.4f} against {best.loss:.4f}"
        fix = f"learning_rate={opened.rate:.1e}  # with {opened.change}"
    else:
        what = f"no remedy beats the best rate's {best.loss:.4f} ({tried})"
    yield Fault(
        f"rates from {lost[0].rate:.1e} on blow up, just above the best one, {best.rate:.1e}; "
        + what,
        subject="learning rate",
        evidence={
            "seen": f"loss {lost[0].loss:.4g} at {lost[0].rate:.1e}",
            "expected": f"near {best.loss:.4g}",
            "best": best.rate,
            "opened": bool(good),
        },
        fix=fix,
    )


def take(subject: object) -> Iterator[RateRace]:
    """Only trainings tell."""
    raise Skip("it takes trainings: hf-recipe run")


RACE = Probe("race the rates", "end", (RateRace,), take)

UNSTABLE_ABOVE_BEST_RATE = Check(
    name="unstable-above-best-rate",
    stage="complexify",
    severity="note",
    moments=("end",),
    why="A best rate at the edge of stability is no optimum: with a warm-up or clipping a higher "
    "one may train further.",
    fix="TrainingArguments(..., warmup_steps=0.1, max_grad_norm=1.0)",
    source="Godbole et al., Deep Learning Tuning Playbook (2023), training instability",
    judges=(unstable,),
    call="hf-recipe run",
    unsure="Short runs: instabilities that come late are not seen.",
)
