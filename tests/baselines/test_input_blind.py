"""Does the model use its inputs? Literal numbers, shuffled labels and honest twins."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from hf_recipe.baselines import input_blind
from hf_recipe.baselines.initial_loss import PROBE as LOSS
from hf_recipe.baselines.input_blind import AgainstBlind
from hf_recipe.instruments.subject import Plan
from tests.baselines.runs import told
from tests.baselines.start_cases import MLP, Squared, columns, diabetes, examined, trainer_of

BLIND = AgainstBlind(
    blind=0.69, model=0.70, gain=-0.01, standard_error=0.004, rows=400, order=0.51,
    order_error=0.03, accuracy=None, majority=0.5, training_loss=0.6, prior=0.69, steps=500,
    total_steps=500,
)  # fmt: skip


class TestJudging:
    def faults(self, **change):
        return list(input_blind.CHECK.judge(replace(BLIND, **change)))

    def test_no_better_than_blind(self):
        (fault,) = self.faults()
        assert "0.7, that of an input-blind model 0.69" in fault.message
        assert "50.0% right" in fault.message

    @pytest.mark.parametrize(
        "change",
        [
            {"gain": 0.3, "standard_error": 0.01},
            {"gain": 0.01, "standard_error": 0.02},  # undecided
            {"gain": 0.001, "standard_error": 0.002, "rising": True},  # on its way
            {"order": 0.8},  # overconfident, but it ranks
            {"accuracy": 0.9},
            {"steps": 20, "total_steps": 20},
            {"steps": 200},  # stopped early
            {"training_loss": 0.9},  # has not even learnt the frequencies
            {"training_loss": math.nan},
        ],
    )
    def test_silent(self, change):
        assert self.faults(**change) == []


def digits(share=None, flips=0.0, shuffled=False):
    data = load_digits()
    generator = np.random.default_rng(0)
    y = data.target.copy()
    if share is not None:
        keep = (y != 0) | (generator.random(len(y)) < share)
        data.data, y = data.data[keep], (y[keep] == 0).astype(int)
    if flips:
        y = np.where(generator.random(len(y)) < flips, 1 - (y > 4), y > 4).astype(int)
    if shuffled:
        y = generator.permutation(y)
    order = generator.permutation(len(y))
    return (data.data[order] / 16).astype("float32"), y[order], int(y.max()) + 1


def run_of(x, y, classes, *, steps=200, loss=None, rate=3e-3):
    torch.manual_seed(0)
    rows = columns(x=x, labels=y)
    held = len(rows) * 2 // 3
    trainer = trainer_of(
        MLP(x.shape[1], classes, loss=loss), rows[:held], evaluation=rows[held:], batch=32,
        max_steps=steps, learning_rate=rate, logging_steps=1, save_strategy="no",
        remove_unused_columns=False,
    )  # fmt: skip
    examiner = examined(trainer, LOSS, input_blind.PROBE)
    assert not examiner.report.crashed
    made = told(trainer, input_blind.MONITOR, examiner.latest, Plan(steps, 40, 32))
    return made, [f for m in made for f in input_blind.CHECK.judge(m)]


def test_shuffled_labels_are_found():
    made, faults = run_of(*digits(shuffled=True), steps=600)
    assert len(made) == len(faults) == 1


@pytest.mark.parametrize(
    "case", [{}, {"share": 0.1}, {"flips": 0.4}], ids=["digits", "imbalanced", "40% flips"]
)
def test_runs_that_use_their_inputs_are_silent(case):
    made, faults = run_of(*digits(**case))
    assert len(made) == 1
    assert faults == []
    if "flips" not in case:
        assert made[0].gain > 2 * made[0].standard_error


def test_regression_with_and_without_signal():
    x, y = diabetes()
    _, faults = run_of(x, y, 1, loss=Squared(), rate=1e-2)
    assert faults == []
    shuffled = np.random.default_rng(1).permutation(y)
    made, faults = run_of(x, shuffled, 1, loss=Squared(), rate=1e-2, steps=400)
    assert made[0].gain < 0
    assert len(faults) == 1


@pytest.mark.parametrize("factor", [1e6, 1e-5])
def test_targets_in_odd_units_are_not_judged(factor):
    x, y = diabetes(factor)
    _, faults = run_of(x, y + np.float32(2 * factor), 1, loss=Squared(), steps=100)
    assert faults == []
