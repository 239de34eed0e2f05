"""Is the winner of a search one? The best few, run again on seeds that did not choose them.

The best of many trials is best by luck too: of 30 equal settings the winner looks better than it
is by about a seed's standard deviation. So the top few of a search are run again, each in pairs
with what stands: the same seeds, the same evaluation rows. One is adopted where it improves on
three quarters of the seeds (Bouthillier et al. 2021) and the interval of its gain lies above zero.
There are several contenders, so their intervals are widened (Bonferroni): that any of them is
adopted although all are alike happens in 5 of 100 searches at most.

    contest = Contest(len(contenders), seeds=3)
    for each contender: run seed after seed, until `contest.is_lost(wins, done)`
    contest.adopts(gain, wins)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hf_recipe.instruments.compare import Gain

TOP = 3  # of a search: the true best is among them more often than not
WINS = 0.75  # P(better): Bouthillier et al. 2021
FALSE_ADOPTIONS = 0.05  # share of searches among equals that may end in an adoption


@dataclass(frozen=True)
class Contest:
    """The rule by which one of several contenders takes the place of what stands.

    Attributes:
        contenders: how many are run again.
        seeds: on how many new seeds each of them is.
    """

    contenders: int
    seeds: int

    @property
    def level(self) -> float:
        """Of each contender's two-sided interval, 95 % or more; only its lower end can adopt."""
        return 1 - 2 * FALSE_ADOPTIONS / max(self.contenders, 2)

    def is_lost(self, wins: int, done: int) -> bool:
        """Whether the seeds that are left cannot bring enough wins: running them is waste."""
        return wins + self.seeds - done < WINS * self.seeds

    def adopts(self, gain: Gain, wins: int) -> bool:
        """Whether a contender that ran on all seeds is adopted.

        Args:
            gain: over all seeds and rows, with the interval of `level`.
            wins: seeds on which it improved.
        """
        return gain.verdict is True and wins >= WINS * self.seeds


@dataclass(frozen=True)
class Rerun:
    """What came of one contender.

    Attributes:
        losses: of each seed that it was run on, in the seeds' order; fewer than there are seeds
            where it could not win any more.
        wins: of these, seeds on which it improved.
        gain: over all seeds; None where it was given up.
        adopted: whether the rule is met.
    """

    losses: tuple[float, ...]
    wins: int
    gain: Gain | None
    adopted: bool


def rerun(
    contest: Contest,
    standing: Sequence[float],
    run: Callable[[int], float],
    gain: Callable[[], Gain],
) -> Rerun:
    """Run one contender seed after seed, as long as it can still be adopted.

    Args:
        standing: mean losses of what stands, one per seed.
        run: trains the contender with seed number i, gives its mean loss.
        gain: the paired gain over all seeds, once all were run.
    """
    losses: list[float] = []
    wins = 0
    for number, stood in enumerate(standing):
        losses.append(run(number))
        wins += math.isfinite(losses[-1]) and not losses[-1] >= stood  # a NaN is beaten by all
        if contest.is_lost(wins, len(losses)):
            return Rerun(tuple(losses), wins, None, False)
    found = gain()
    return Rerun(tuple(losses), wins, found, contest.adopts(found, wins))
