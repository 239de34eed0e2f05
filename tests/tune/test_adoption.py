"""Who takes the place of what stands: the rule on literal numbers, and how often it errs."""

import math

import numpy as np
import pytest

from hf_recipe.instruments.compare import Gain, paired_gain, residual_spread
from hf_recipe.tune.adoption import FALSE_ADOPTIONS, Contest, rerun

CLEAR, UNSURE = Gain(0.02, 0.01, 0.03, 2), Gain(0.02, -0.01, 0.05, 2)


@pytest.mark.parametrize(
    ("seeds", "wins", "gain", "adopted"),
    [
        (2, 2, CLEAR, True),
        (2, 1, CLEAR, False),
        (4, 3, CLEAR, True),
        (4, 2, CLEAR, False),
        (2, 2, UNSURE, False),
        (2, 2, Gain(-math.inf, -math.inf, -math.inf, 2), False),
    ],
)
def test_three_quarters_of_the_seeds_and_an_interval_above_zero(seeds, wins, gain, adopted):
    assert Contest(1, seeds).adopts(gain, wins) is adopted


def test_more_contenders_need_wider_intervals():
    assert Contest(1, 2).level == Contest(2, 2).level == pytest.approx(0.95)
    assert Contest(3, 2).level == pytest.approx(1 - 0.1 / 3)


@pytest.mark.parametrize(
    ("losses", "run", "wins", "adopted"),
    [
        ([0.4, 0.4, 0.4, 0.4], 4, 4, True),
        ([0.6, 0.4, 0.4, 0.4], 4, 3, True),
        ([0.6, 0.6, 0.4, 0.4], 2, 0, False),  # two wins of four are too few: no third run
        ([0.4, 0.6, 0.6, 0.4], 3, 1, False),
        ([math.nan, math.inf, 0.4, 0.4], 2, 0, False),
    ],
)
def test_a_contender_is_given_up_when_it_cannot_win_any_more(losses, run, wins, adopted):
    asked = []

    def train(number):
        asked.append(number)
        return losses[number]

    found = rerun(Contest(3, 4), [0.5] * 4, train, lambda: CLEAR)
    assert asked == list(range(run))
    assert (len(found.losses), found.wins, found.adopted) == (run, wins, adopted)
    assert (found.gain is None) is (run < 4 or not adopted)


def test_whatever_is_finite_beats_what_diverged():
    found = rerun(Contest(1, 2), [math.nan, math.inf], lambda number: 5.0, lambda: CLEAR)
    assert found.wins == 2
    assert found.adopted


def null_search(draw, seeds=2, rivals=3, rows=300):
    """Whether one of several settings that are all alike is adopted; losses of rows and seeds."""
    hard = draw.gamma(0.5, 0.2, rows)  # rows differ, whoever is asked

    def run():
        return hard * (1 + 0.1 * draw.normal()) + 0.1 * draw.normal(size=rows)

    trained = [np.array([run() for _ in range(seeds)]) for _ in range(7)]
    standing = trained[-1]
    rules, adopted = Contest(rivals, seeds), False
    for _ in range(rivals):
        losses = []

        def train(number, losses=losses):
            losses.append(run())
            return float(losses[-1].mean())

        def gain(losses=losses):
            trained.append(np.array(losses))
            spread = residual_spread(trained)
            return paired_gain(standing, losses, level=rules.level, seed_variance=spread)

        adopted |= rerun(rules, standing.mean(1).tolist(), train, gain).adopted
    return adopted


def test_equals_are_adopted_in_one_search_of_twenty_at_most():
    adopted = np.mean([null_search(np.random.default_rng(n)) for n in range(300)])
    assert adopted <= FALSE_ADOPTIONS + 0.02  # 1.6 standard errors of 300 studies
