"""Metrics against scikit-learn, and through `evaluate`'s own ways."""

import evaluate
import numpy as np
import pytest
from sklearn import metrics as sk
from transformers import EvalPrediction

from hf_recipe.trainer.metrics import (
    F1,
    Accuracy,
    Matthews,
    MeanSquaredError,
    RSquared,
    compute_metrics_for,
)

DRAW = np.random.default_rng(0)
SEEN, TRUE = DRAW.integers(0, 4, 200), DRAW.integers(0, 4, 200)


def test_classes_agree_with_scikit_learn():
    given = {"predictions": SEEN, "references": TRUE}
    assert Accuracy().compute(**given)["accuracy"] == pytest.approx(sk.accuracy_score(TRUE, SEEN))
    macro = sk.f1_score(TRUE, SEEN, average="macro")
    assert F1().compute(**given)["f1"] == pytest.approx(macro)
    expected = sk.matthews_corrcoef(TRUE, SEEN)
    assert Matthews().compute(**given)["matthews"] == pytest.approx(expected)


def test_binary_f1_and_a_constant_answer():
    given = {"predictions": [1, 1, 0, 1], "references": [1, 0, 0, 1]}
    assert F1().compute(**given, average="binary")["f1"] == pytest.approx(0.8)
    assert Matthews().compute(predictions=[1, 1], references=[0, 1])["matthews"] == 0.0


def test_numbers_agree_with_scikit_learn():
    true = DRAW.normal(3, 2, 50)
    seen = true + DRAW.normal(0, 1, 50)
    given = {"predictions": seen, "references": true}
    mse = sk.mean_squared_error(true, seen)
    assert MeanSquaredError().compute(**given)["mse"] == pytest.approx(mse)
    assert RSquared().compute(**given)["r2"] == pytest.approx(sk.r2_score(true, seen))


def test_they_are_evaluate_metrics():
    metric = Accuracy()
    assert isinstance(metric, evaluate.Metric)
    metric.add_batch(predictions=[0, 1], references=[0, 0])
    metric.add_batch(predictions=[1], references=[1])
    assert metric.compute() == {"accuracy": pytest.approx(2 / 3)}


def test_compute_metrics_leaves_ignored_labels_out():
    logits = np.eye(3)[[0, 1, 2, 2]]
    compute = compute_metrics_for("sequence-classification")
    result = compute(EvalPrediction(logits, np.array([0, 1, -100, 0])))
    assert result["accuracy"] == pytest.approx(2 / 3)


def test_regression_is_told_in_the_target_unit():
    compute = compute_metrics_for("regression", scale=10.0)
    result = compute(EvalPrediction(np.array([[1.0], [2.0]]), np.array([1.0, 3.0])))
    assert result["mse"] == pytest.approx(50.0)


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match="tagging"):
        compute_metrics_for("tagging")
