"""What grows is adopted, or not, on the paired losses; decay is tuned last: on made outcomes."""

from types import SimpleNamespace

import numpy as np
import pytest

from hf_recipe.core.config import Settings
from hf_recipe.core.report import Report
from hf_recipe.instruments.compare import Outcome
from hf_recipe.runner.complexify_stage import _at_full_length
from hf_recipe.runner.decaying import decays, tune_decay
from hf_recipe.runner.growing import grow_input, try_next_rung
from hf_recipe.runner.journey import Journey
from hf_recipe.runner.setup import Setup

START = Setup("base", 1e-3, 20.0, schedule="constant")


class Made:
    """A lab whose trainings are drawn: a setup's loss, with the noise of rows and seeds."""

    def __init__(self, loss, train=None, scatter=0.02):
        self.loss, self.train_loss, self.scatter = loss, train or loss, scatter
        self.report, self.seeds, self.ran = Report(), (0, 1, 2), []
        self.metric_name, self.pretrained, self.given, self.stage = "accuracy", False, False, "tune"
        task = SimpleNamespace(ladder=lambda kind: kind)
        self.data = SimpleNamespace(kind="image", splits={"train": range(1000)}, task=task)
        self.feed = SimpleNamespace(
            sizes=(0.5, 1.0, 1.5), size_name="side", size_of=lambda share: f"{8 * share:g} px"
        )
        self.options = SimpleNamespace(model=SimpleNamespace(architecture=None))
        self.show = SimpleNamespace(finding=lambda finding: None)

    def settings(self):
        return Settings()

    def ahead(self, variants, *, watch=False):
        """None is: they are drawn when they are asked for."""

    def run(self, change, setup, seed=0, *, watch=False):
        self.ran.append((change, setup, seed))
        rows = np.random.default_rng(7).normal(0, 0.3, 200)  # the same rows are hard for all
        own = np.random.default_rng([len(self.ran), 1]).normal(0, self.scatter, 200)
        train = tuple(self.train_loss(setup) + rows + own)
        facts = {"train_losses": train, "parameters": 10, "steps": 100}
        return Outcome(tuple(self.loss(setup) + rows + own), 1.0, 0.9, facts)


@pytest.mark.parametrize(
    ("losses", "share", "kept"),
    [
        ({0.5: 2.0, 1.0: 1.0, 1.5: 1.2}, 1.0, [True, True, False]),
        ({0.5: 2.0, 1.0: 1.5, 1.5: 1.0}, 1.5, [True, True, True]),
        ({0.5: 1.0, 1.0: 1.0, 1.5: 1.0}, 0.5, [True, False, False]),
    ],
)
def test_the_input_that_stands_is_adopted(losses, share, kept):
    lab = Made(lambda setup: losses[setup.share])
    journey = Journey(lab, START)
    grow_input(journey, 1e-3)
    assert journey.setup == START.change(share=share)
    (ladder,) = lab.report.exhibits
    assert [rung.kept for rung in ladder.rungs] == kept
    assert {setup.schedule for _, setup, _ in lab.ran} == {"constant"}
    told = [f.subject for f in lab.report.flat if f.check == "growth-unhelpful"]
    assert len(told) == kept.count(False)


def test_few_rows_that_see_nothing_do_not_make_the_input_small():
    lab = Made(lambda setup: {0.5: 1.2, 1.0: 1.0, 1.5: 1.0}[setup.share], scatter=2.0)
    journey = Journey(lab, START)
    grow_input(journey, 1e-3)
    assert journey.setup.share == 1.0


@pytest.mark.parametrize(("held_out", "model"), [(0.5, "larger"), (1.2, "large")])
def test_the_next_architecture_is_kept_where_held_out_rows_gain_too(held_out, model):
    lab = Made(
        lambda setup: held_out if setup.model == "larger" else 1.0,
        train=lambda setup: 0.3 if setup.model == "larger" else 0.8,
    )
    journey = Journey(lab, START.change(model="large"))
    try_next_rung(journey, 1e-3)
    assert journey.setup.model == model
    ladder = next(e for e in lab.report.exhibits if e.title == "The next architecture")
    assert [rung.kept for rung in ladder.rungs] == [True, model == "larger"]
    assert [f.check for f in lab.report.flat] == ["capacity-short"]


def test_the_races_winner_is_adopted_where_it_fits_better_at_full_length_too():
    for better, rate in ((0.5, 4e-3), (1.5, 1e-3)):
        lab = Made(lambda setup, b=better: b if setup.learning_rate == 4e-3 else 1.0)
        journey = Journey(lab, START)
        _at_full_length(journey, START, 4e-3)
        assert (journey.setup.learning_rate, journey.setup.schedule) == (rate, "constant")


def test_a_smaller_input_that_fits_the_training_rows_no_longer_is_given_up():
    for rate, loss, share in ((1e-3, 0.5, 0.5), (1e-3, 1.5, 1.0), (4e-3, 1.5, 1.0)):
        lab = Made(lambda setup, loss=loss: loss if setup.share == 0.5 else 1.0)
        journey = Journey(lab, START.change(share=0.5))
        _at_full_length(journey, START, rate)
        assert journey.setup == START.change(share=share)


def test_decay_is_tried_with_one_seed_and_kept_where_it_helps():
    assert [s.schedule for s in decays(START).values()] == ["linear", "cosine"]
    for helps in (True, False):
        decayed = 0.5 if helps else 1.5
        lab = Made(lambda s, loss=decayed: {"constant": 1.0, "linear": 1.6}.get(s.schedule, loss))
        journey = Journey(lab, START)
        standing = journey.outcomes("where the stage begins", START)
        outcomes = tune_decay(journey, standing)
        assert journey.setup.schedule == ("cosine" if helps else "constant")
        assert (outcomes is standing) is not helps
        (ladder,) = lab.report.exhibits
        assert ladder.title == "Decay, tuned last"
        assert len(ladder.rungs) == 3
    lab = Made(lambda s: 1.0)
    journey = Journey(lab, START.change(schedule="cosine"))
    assert tune_decay(journey, []) == []
    assert lab.ran == []  # the flags have chosen
