"""A metric that jumps late in training: literal numbers, and a run with its calm twin."""

import dataclasses

import pytest
from transformers import Trainer

from hf_recipe.instruments.window import Evaluation, Step, Window
from hf_recipe.regularize.late_noise import LATE_METRIC_NOISE, LateNoise, fold
from tests.gallery.harness import everything, run
from tests.models import arguments, bert, words

NOISE = LateNoise("eval_loss", "validation", 10, 1.0, 0.05, 0.01, 0.02, 1.0)


def told(**changes):
    return len(list(LATE_METRIC_NOISE.judge(dataclasses.replace(NOISE, **changes))))


def test_judging():
    assert told() == 1
    assert told(scatter=0.01) == 0
    assert told(gain=0.2) == 0  # it still falls by more
    assert told(level=5.0) == 0
    assert told(scatter=float("nan")) == 0


def test_folding():
    state = {}
    for i in range(20):
        steps = (Step(i + 1, 1.0, 1e-3),)
        state, _ = fold(state, Window(steps=steps), {})
        value = 2.0 + (0.1 if i % 2 else -0.1)
        evaluation = Evaluation(i + 1, "validation", metrics={"eval_loss": value})
        state, found = fold(state, Window(evaluation=evaluation), {})
        assert found is None
    _, found = fold(state, Window(ended=True), {})
    assert (found.evaluations, found.level) == (10, pytest.approx(2.0))
    assert found.scatter == pytest.approx(0.4 / 0.6745 / 6**0.5)
    assert found.gain < 0.1


def doubtful(rows, seed):
    """A third of the labels are another class's: the loss has a floor to jump above."""
    return words(rows, seed=seed).map(
        lambda row, i: {"labels": (row["labels"] + (i % 3 == 0)) % 4}, with_indices=True
    )


@pytest.mark.parametrize("hot", [True, False])
def test_a_run(hot, tmp_path):
    trainer = Trainer(
        model=bert(),
        args=arguments(
            tmp_path,
            max_steps=80,
            learning_rate=1e-2 if hot else 1e-3,
            lr_scheduler_type="constant" if hot else "linear",
            eval_strategy="steps",
            eval_steps=4,
        ),
        train_dataset=doubtful(256, 1),
        eval_dataset=doubtful(64, 2),
    )
    report = run(trainer)
    assert report.ran["late-metric-noise"] == ["eval"]
    found = [f for f in everything(report) if f.check == "late-metric-noise"]
    assert len(found) == hot
