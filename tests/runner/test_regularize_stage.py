"""The ladder of regularizers: what is tried, what comes with a training, what is kept."""

from types import SimpleNamespace

import numpy as np
import pytest
from transformers import BertConfig, ResNetConfig, SwinConfig

from hf_recipe.instruments.compare import Outcome, ladder_level, paired_gain, residual_spread
from hf_recipe.runner import regularize_stage
from hf_recipe.runner.beside import (
    AVERAGED,
    BOTH,
    STOPPED,
    crossfitted,
    gains_beside,
    outcome_beside,
    shared_with,
)
from hf_recipe.runner.journey import Journey
from hf_recipe.runner.options import UsageError, parse
from hf_recipe.runner.regularizers import NAMES, USUAL, Try, chosen, proposal
from hf_recipe.runner.setup import Setup
from scripts.benchmark_regularize import Rehearsal, kept_of

SETUP = Setup("base", 1e-3, 10)


# ---------------------------------------------------------------- what is tried


def test_names_come_in_the_recipes_order():
    assert chosen("usual") == USUAL
    assert chosen("all") == NAMES
    assert chosen("averaging, augmentation") == ("augmentation", "averaging")
    assert chosen("usual,label-smoothing")[-3] == "label-smoothing"
    assert chosen("") == ()
    with pytest.raises(ValueError, match="dropuot"):
        chosen("dropuot")


def test_a_mistyped_regularizer_is_one_line():
    with pytest.raises(UsageError, match="--regularizers: unknown value 'dropuot'; did you mean"):
        parse(["--regularizers", "dropuot"])


def a_journey(**changes):
    lab = Rehearsal(lambda setup, seed: (), ("dropout",))
    journey = Journey(lab, lab.start.change(**changes))
    return journey


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("dropout", {"dropout": 0.2}, "it is 0.2 already"),
        ("weight-decay", {"weight_decay": 5.0}, "it is 5 already"),
        ("smaller-model", {}, "began with"),
        ("averaging", {"average": True}, "it is on already"),
        ("features", {}, "no model was looked at"),
        ("stochastic-depth", {}, "drops no paths"),
    ],
)
def test_what_cannot_change_anything_is_not_trained(name, changes, says):
    assert says in proposal(name, a_journey(**changes), 250)


@pytest.mark.parametrize(
    ("config", "dropout", "depth"),
    [
        (ResNetConfig(), False, False),
        (BertConfig(), True, False),
        (SwinConfig(drop_path_rate=0.0), True, True),
    ],
)
def test_a_config_without_dropout_is_told(config, dropout, depth, monkeypatch, tmp_path):
    config.save_pretrained(tmp_path)
    journey = a_journey()
    journey.lab.options.model.config_name = str(tmp_path)
    assert isinstance(proposal("dropout", journey, 250), Try) is dropout
    assert isinstance(proposal("stochastic-depth", journey, 250), Try) is depth
    if not dropout:
        assert proposal("dropout", journey, 250) == "ResNetConfig has none"


# ---------------------------------------------------------------- what comes with a training


def test_stopping_and_averaging_share_the_plain_training():
    assert list(shared_with(SETUP)) == []
    assert list(shared_with(SETUP.change(early_stopping=True))) == [(STOPPED, SETUP)]
    averaged = SETUP.change(average=True)
    assert list(shared_with(averaged)) == [(AVERAGED, SETUP)]
    both = averaged.change(early_stopping=True)
    assert list(shared_with(both)) == [(STOPPED, averaged), (BOTH, SETUP)]
    assert list(shared_with(SETUP.change(average=True, keep=True))) == []


def an_outcome(losses, **beside):
    return Outcome(tuple(losses), 5.0, 0.9, {"steps": 60, "planned": 60, "beside": beside})


def test_an_outcome_beside():
    found = {"row_losses": [1.0, 2.0], "metric": 0.5, "steps": 20, "train_losses": [0.1]}
    end = an_outcome([2.0, 3.0], stopped=found, averaged={})
    stopped = outcome_beside(end, STOPPED)
    assert stopped.row_losses == (1.0, 2.0)
    assert (stopped.metric, stopped.cost, stopped.facts["steps"]) == (0.5, 0.0, 20)
    same = outcome_beside(end, AVERAGED)
    assert (same.row_losses, same.cost) == (end.row_losses, 0.0)
    assert outcome_beside(an_outcome([1.0]), STOPPED) is None
    (gains,) = gains_beside(STOPPED, [[end, end], [an_outcome([1.0, 1.0])]])
    assert gains.tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_cross_fitting_does_not_reward_luck():
    """Six evaluations that differ by noise alone: the best of them is no better."""
    draw = np.random.default_rng(0)
    naive, fair = [], []
    for _ in range(300):
        table = draw.normal(1, 0.5, (6, 100))
        naive.append(table[0].mean() - table.mean(1).min())
        fair.append(table[0].mean() - crossfitted(table).mean())
    assert np.mean(naive) > 0.04
    assert abs(np.mean(fair)) < 4 * np.std(fair) / 300**0.5
    turned = draw.normal(0, 0.1, (3, 100)) + np.array([[2.0], [1.0], [3.0]])
    assert crossfitted(turned).tolist() == turned[1].tolist()


# ---------------------------------------------------------------- what is kept


def test_residual_spread_does_not_count_the_baselines_luck_twice():
    """Five trainings of two seeds; their noise is 1 per seed, so a gain's variance is 2."""
    draw = np.random.default_rng(0)
    found = []
    for _ in range(400):
        common = draw.normal(0, 3, (2, 1))  # a seed that is easy for all
        group = [common + draw.normal(0, 1, (2, 1)) + np.zeros((2, 400)) for _ in range(5)]
        variance, freedom = residual_spread(group)
        found.append(variance * freedom / (freedom - 2))  # rows say 0 here, worth two of them
    assert freedom == 6
    assert np.mean(found) == pytest.approx(2.0, rel=0.1)
    assert residual_spread([np.zeros((2, 3))]) is None
    assert residual_spread([np.zeros((1, 3)), np.ones((1, 3))]) is None


def test_a_longer_ladder_asks_for_more():
    assert ladder_level(1) == ladder_level(2) == 0.95
    assert ladder_level(10) == pytest.approx(0.99)


def test_scatter_of_single_rows_is_counted_once():
    """Rows whose losses scatter from seed to seed, but no row that a change favours."""
    draw = np.random.default_rng(1)
    kept = 0
    for _ in range(400):
        first, second = draw.normal(1, 1, (2, 3, 60))
        kept += paired_gain(first.tolist(), second.tolist()).verdict is True
    assert 2 <= kept <= 20


def ladder_of(gain, draw, rungs=3, rows=200):
    """Trainings whose first rung is better by `gain`; seeds scatter by 0.02."""
    hard = draw.exponential(0.3, rows)
    losses = hard + draw.normal(0, 0.02, (2 * (rungs + 1), 1)) + draw.normal(0, 0.1, (8, rows))
    losses[2:4] -= gain
    return losses


def test_a_decay_is_as_strong_in_a_short_run_as_in_a_long_one():
    """Rate times decay times steps is one: the run forgets its beginning once."""
    for steps, value in ((250, 4.0), (100_000, 0.01)):
        found = proposal("weight-decay", a_journey(), steps)
        assert found.change == {"weight_decay": value}
        assert found.stronger.change == {"weight_decay": 2 * value}
        assert found.stronger.stronger is None


def climbed(train, names, seeds=2):
    """A ladder over made trainings: the lab, the journey at its end, and what was shown."""
    lab = Rehearsal(train, names)
    lab.seeds, said, shown = tuple(range(seeds)), [], []
    lab.show, lab.report = SimpleNamespace(say=said.append), SimpleNamespace(exhibit=shown.append)
    journey = Journey(lab, lab.start)
    whole, _ = regularize_stage.climb(journey, journey.outcomes("start", lab.start))
    return SimpleNamespace(lab=lab, journey=journey, whole=whole, ladder=shown[0], said=said)


def made(gain, draw, rows=200, scatter=0.02):
    """Losses of rows, some harder than others; seeds scatter; each setup is better by `gain`."""
    hard = draw.exponential(0.3, rows)
    return lambda setup, seed: (
        hard + draw.normal(0, scatter) + draw.normal(0, 0.1, rows) - gain(setup)
    )


@pytest.mark.parametrize("second", [0.6, 0.0])
def test_what_was_kept_is_tried_twice_as_strong(second):
    gains = {0.0: 0.0, 1.0: 0.3, 2.0: second}
    end = climbed(made(lambda s: gains[s.augment], np.random.default_rng(1)), ("augmentation",))
    assert [rung.kept for rung in end.ladder.rungs] == [True, True, second > 0]
    assert end.journey.setup.augment == (2.0 if second else 1.0)


def test_what_may_help_is_looked_at_twice_and_what_does_not_once():
    """A gain of two standard errors; a loss."""
    draw = np.random.default_rng(3)
    gains = lambda s: 0.06 * (s.augment > 0) - 0.1 * (s.dropout > 0)  # noqa: E731
    seen = {4: 0, 8: 0}
    for _ in range(20):
        end = climbed(made(gains, draw, scatter=0.05), ("augmentation", "dropout"), seeds=4)
        seen[1 + max(k for s, k in end.lab.known if s.augment == 1.0 and not s.dropout)] += 1
        assert max(k for s, k in end.lab.known if s.dropout) == 3
        assert len(end.whole) in (4, 8)
    assert seen[8] >= 8


def test_what_helps_is_kept_and_what_does_nothing_is_not():
    draw = np.random.default_rng(0)
    names = ("augmentation", "dropout", "weight-decay")
    better = lambda s: 0.15 if s.augment else 0.0  # noqa: E731
    helped = [kept_of(made(better, draw), names) for _ in range(60)]
    idle = [kept_of(made(lambda s: 0.0, draw), names) for _ in range(100)]
    assert sum("augment" in kept for kept in helped) >= 54
    assert sum(kept != "" for kept in idle) <= 8


def test_the_ladder_says_what_it_did_not_try():
    names = ("dropout", "features", "weight-decay")
    end = climbed(made(lambda s: 0.0, np.random.default_rng(2)), names)
    changes = [rung.change for rung in end.ladder.rungs]
    assert changes == ["start", "dropout 0.1", "weight decay 4"]
    assert "features: no model was looked at" in end.ladder.caption
    assert "augmentation" in end.ladder.caption.partition("Not asked for")[2]
    assert sum("not tried" in line for line in end.said) == 1
