"""Overfitting: literal turns, folded windows, and the healthy runs that only look like it."""

import json
from dataclasses import replace

import numpy as np
import pytest

from hf_recipe.data.duplicates import Repeats
from hf_recipe.instruments.window import Evaluation, Step, Window
from hf_recipe.regularize.circumstances import Circumstances, advice
from hf_recipe.regularize.more_data import DataCurve
from hf_recipe.regularize.overfitting import DeclaredMetric, Turn, fold, overfitting

TURN = Turn("eval_loss", False, 100, 200, 0.50, 0.60, 0.10, 0.01, 0.01, 5, 0.40, 0.20, 0.01)
TURN = replace(TURN, advice=("more data (80 rows)", "weight decay (now 0)"))


def test_literal_numbers():
    (fault,) = overfitting(TURN)
    assert "step 100" in fault.message
    assert "0.1 +- 0.01 worse at step 200" in fault.message
    assert "in the recipe's order: more data (80 rows), weight decay (now 0)" in fault.message
    assert fault.severity is None
    (guarded,) = overfitting(replace(TURN, guarded=True))
    assert guarded.severity == "note"
    assert "early stopping keeps the best weights" in guarded.message
    for healthy in (
        replace(TURN, worse=0.03),  # within the noise
        replace(TURN, worse=0.008, scatter=0.0001, paired_error=0.0001),  # too small to matter
        replace(TURN, train_after=0.39),  # training does not fall
        replace(TURN, paired_error=0.05),
        replace(TURN, since=2),
        replace(TURN, worse=float("nan")),
        replace(TURN, scatter=float("nan")),
    ):
        assert not list(overfitting(healthy)), healthy


def run(train, losses, rows=None, metrics=None, declared=None, every=10):
    """Fold a run; the turns that were faults."""
    state, found = {}, []
    seen = {} if declared is None else {"DeclaredMetric": declared}
    for i, loss in enumerate(losses):
        steps = tuple(Step(i * every + j + 1, train[i * every + j], 1e-3) for j in range(every))
        state, _ = fold(state, Window(steps=steps), seen)
        evaluation = Evaluation(
            step=(i + 1) * every,
            split="validation",
            row_losses=tuple(rows[i]) if rows is not None else (),
            metrics={"eval_loss": loss, **({} if metrics is None else metrics[i])},
        )
        state, turn = fold(state, Window(evaluation=evaluation), seen)
        state = json.loads(json.dumps(state))
        found += [f for f in (overfitting(turn) if turn is not None else ())]
    return found


def courses(seed, turn, evaluations=30, noise=0.01):
    rng = np.random.default_rng(seed)
    train = 1.5 * np.exp(-np.arange(evaluations * 10) / 60) + rng.normal(0, 0.02, evaluations * 10)
    i = np.arange(evaluations)
    course = 0.6 + 0.5 * np.exp(-i / 3) + np.where(i > turn, 0.03 * (i - turn), 0)
    return train.tolist(), (course + rng.normal(0, noise, evaluations)).tolist()


def test_a_turn_is_found_and_a_plateau_is_not():
    hits = sum(bool(run(*courses(seed, 8))) for seed in range(30))
    alarms = sum(bool(run(*courses(seed, 99))) for seed in range(100))
    print(f"overfitting: {hits} of 30 turns, {alarms} of 100 plateaus")
    assert hits == 30
    assert alarms <= 1


def test_rows_give_a_paired_error():
    rng = np.random.default_rng(0)
    train, losses = courses(0, 8, noise=0)
    hard = rng.exponential(1, 200)
    rows = [(hard + loss + rng.normal(0, 0.02, 200)).tolist() for loss in losses]
    assert run(train, [float(np.mean(r)) for r in rows], rows=rows)


def test_a_rising_loss_with_a_rising_declared_accuracy_is_silent():
    train, losses = courses(0, 8)
    metrics = [{"eval_accuracy": 0.5 + 0.01 * i} for i in range(len(losses))]
    accuracy = DeclaredMetric("eval_accuracy", True)
    assert run(train, losses)
    assert not run(train, losses, metrics=metrics, declared=accuracy)
    falling = [{"eval_accuracy": 0.9 - 0.02 * max(0, i - 8)} for i in range(len(losses))]
    assert run(train, losses, metrics=falling, declared=accuracy)


def test_interpolation_that_generalises_is_silent():
    train = (0.5 * np.exp(-np.arange(300) / 20)).tolist()
    assert not run(train, (0.3 + 0.2 * np.exp(-np.arange(30) / 4)).tolist())


@pytest.mark.parametrize("value", [float("nan"), None])
def test_a_metric_that_is_absent_or_not_finite_is_silent(value):
    train, losses = courses(0, 8)
    declared = DeclaredMetric("eval_f1", True)
    metrics = [{} if value is None else {"eval_f1": value} for _ in losses]
    assert not run(train, losses, metrics=metrics, declared=declared)


def test_the_advice_says_what_this_run_has():
    run = Circumstances(80, 40_000, "pixel_values", 0.1, 0.0, False, False)
    repeats = Repeats(("image",), 80, 60, 20, conflicting=6)
    told = advice({"Circumstances": run, "Repeats": repeats}, 120)
    assert told == (
        "more data (80 rows, 25% of those read are copies)",
        "Augmentation(Move(), Noise())",
        "pretrained weights",
        "6 rows have equal inputs under different labels: mend these",
        "a smaller model (500 parameters per row)",
        "dropout (now 0.1)",
        "weight decay (now 0)",
        "early stopping (at step 120)",
    )
    curve = DataCurve(
        (40, 80, 160), (0.9, 0.7, 0.5), 160, 0.5, 0.01, 0.1, (0.4, 0.3, 0.45), (0.3, 0.2, 0.4), 0.1
    )
    other = replace(run, parameters=100, augmented=True, pretrained=True)
    told = advice({"Circumstances": other, "DataCurve": curve}, 120)
    assert told[0] == "more data (twice the rows: 0.5 to 0.4 [0.3, 0.45])"
    assert told[1] == "augmentation is on: a stronger one"
    assert len(told) == 5
    assert advice({}, 3)[0] == "more data"


def test_a_model_without_dropout_is_told():
    run = Circumstances(rows=100, parameters=10, dropouts=0)
    told = advice({Circumstances.kind(): run}, 5)
    assert "dropout (this model has none)" in told
