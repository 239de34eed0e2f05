"""What one stage hands to the next: the setup so far, and the outcomes it rests on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hf_recipe.instruments.compare import Gain, Outcome, paired_gain, residual_spread
from hf_recipe.runner.beside import settled
from hf_recipe.runner.experiment import Lab
from hf_recipe.runner.setup import Setup

PROMISING = 0.7  # level of the interval by which a gain is worth a second look
TWO_LOOKS = 0.97  # two looks at this level err as often as one at 95 % (Pocock 1977)


@dataclass
class Journey:
    """The state of the job between stages; rebuilt from remembered outcomes after a restart.

    Attributes:
        setup: the best known way to train.
        rows: the last table: what, validation loss, metric, seconds.
        trained: losses of all trainings compared so far, (seeds, rows) each, by what they are of.
        seen: outcomes of each setup that was trained with several seeds, the baselines apart.
        simplest: outcomes of the simplest model, once the baselines are there.
        teachers: folders of the models that the student has learned from.
    """

    lab: Lab
    setup: Setup
    rows: list[list[str]] = field(default_factory=list)
    trained: dict[tuple[str, str], np.ndarray[Any, Any]] = field(default_factory=dict)
    seen: list[list[Outcome]] = field(default_factory=list)
    simplest: list[Outcome] = field(default_factory=list)
    teachers: list[Path] = field(default_factory=list)

    def outcomes(
        self, change: str, setup: Setup, *, watch: bool = False, seeds: Sequence[int] | None = None
    ) -> list[Outcome]:
        """`setup` trained with every seed; with `watch` the first is reported on in full."""
        lab, first = self.lab, self.lab.seeds[0]
        asked = lab.seeds if seeds is None else seeds
        lab.ahead([setup.variant(change, seed) for seed in asked], watch=watch)
        found = [lab.run(change, setup, seed, watch=watch and seed == first) for seed in asked]
        if lab.stage != "baselines" and found not in self.seen:
            self.seen.append(found)
        return found

    def gain(
        self,
        before: list[Outcome],
        after: list[Outcome],
        *,
        train: bool = False,
        level: float = 0.95,
    ) -> Gain:
        """Paired gain over the same seeds, on validation rows or on the sampled training rows.

        Until the decay is tuned, trainings at a constant rate are compared by the averages beside
        them: their last weights hold the noise of their last steps, which the decay takes away.
        Where one side ends with its average, that is what is compared with the other's end.

        With few seeds per comparison their variance is hardly known; so it is pooled over all
        trainings that were compared so far. The baselines are left out of it: a linear model's
        seeds agree, and would make a large one's luck look like skill.
        """
        ended = any(o.facts.get("averaged") for o in (*before, *after))
        if not ended and self.lab.stage != "tune":
            before, after = [settled(o) for o in before], [settled(o) for o in after]
        first, second = (
            np.asarray([o.facts["train_losses"] if train else o.row_losses for o in group])
            for group in (before, after)
        )
        kind = f"{self.lab.stage == 'baselines'} {train} {first.shape}"
        if first.shape == second.shape:
            for losses in (first, second):
                self.trained[kind, hashlib.sha256(losses.tobytes()).hexdigest()] = losses
        pool = [losses for (of, _), losses in self.trained.items() if of == kind]
        return paired_gain(
            first.tolist(), second.tolist(), level=level, seed_variance=residual_spread(pool)
        )

    @property
    def more_seeds(self) -> Sequence[int]:
        """As many seeds again, for a second look."""
        seeds = self.lab.seeds
        return range(seeds[-1] + 1, seeds[-1] + 1 + len(seeds))

    def look_twice(
        self,
        before: list[Outcome],
        after: list[Outcome],
        again: Callable[[Sequence[int]], tuple[list[Outcome], list[Outcome]]],
    ) -> Gain:
        """The gain; on twice the seeds where it may be there but cannot be told from noise.

        Args:
            again: more seeds -> outcomes of both sides.
        """
        gain = self.gain(before, after, level=TWO_LOOKS)
        if gain.verdict is None and self.gain(before, after, level=PROMISING).verdict is True:
            more = again(self.more_seeds)
            gain = self.gain([*before, *more[0]], [*after, *more[1]], level=TWO_LOOKS)
        return gain

    def note(self, what: str, outcomes: list[Outcome]) -> None:
        """A line of the last table."""
        losses = [o.loss for o in outcomes]
        metrics = [o.metric for o in outcomes if o.metric is not None]
        self.rows.append(
            [
                what,
                f"{sum(losses) / len(losses):.4f}",
                f"{sum(metrics) / len(metrics):.4f}" if metrics else "",
                f"{sum(o.cost for o in outcomes):.1f}",
            ]
        )


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def train_loss(outcomes: list[Outcome]) -> float:
    """Mean loss on training rows, in evaluation mode, over seeds."""
    return mean([mean(list(o.facts["train_losses"])) for o in outcomes])


def validation_loss(outcomes: list[Outcome]) -> float:
    """Mean loss on validation rows over seeds."""
    return mean([o.loss for o in outcomes])
