"""more-data-helps: literal curves, nested subsets, and problems whose answer is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from hf_recipe.core.check import Measurement
from hf_recipe.regularize.more_data import (
    DataCurve,
    answer,
    exhibit,
    extrapolate,
    learning_curve,
    more_data_helps,
    nested_subsets,
    usual_sizes,
    verdict,
)

STEEP = DataCurve(
    (100, 200, 400), (0.9, 0.7, 0.5), 400, 0.50, 0.01, 0.05, (0.4, 0.36, 0.44), (0.3, 0.2, 0.4), 0.1
)


def test_literal_numbers():
    (fault,) = more_data_helps(STEEP)
    assert "0.5000 on 400 rows" in fault.message
    assert "0.4000 [0.3600, 0.4400] foreseen on 800" in fault.message
    assert verdict(STEEP) == "data"
    assert answer(STEEP).answer.startswith("yes")
    flat = replace(STEEP, twice=(0.495, 0.49, 0.499))
    cases = {
        "labels or features": flat,
        "bigger model or longer": replace(flat, train_now=0.49),
        "undecided": replace(STEEP, twice=(0.4, 0.2, 0.55)),
    }
    for kind, curve in cases.items():
        assert verdict(curve) == kind
        assert not list(more_data_helps(curve))
    for nan in ("now", "train_now"):
        assert not list(more_data_helps(replace(flat, **{nan: math.nan})))
    assert not list(more_data_helps(replace(STEEP, now=math.nan)))
    assert DataCurve.from_values(STEEP.values()) == STEEP
    assert issubclass(DataCurve, Measurement)
    assert len(exhibit(STEEP).lines[1].low) == 3


def test_subsets_are_nested_and_hold_every_class():
    labels = [0] * 180 + [1] * 20
    parts = nested_subsets(200, [20, 60, 200], labels=labels, seed=3)
    assert [len(p) for p in parts] == [20, 60, 200]
    assert set(parts[0]) < set(parts[1]) < set(parts[2])
    shares = [np.mean(np.asarray(labels)[p]) for p in parts]
    assert all(abs(share - 0.1) <= 0.051 for share in shares)
    assert set(nested_subsets(200, [20], labels=labels, seed=4)[0]) != set(parts[0])
    assert usual_sizes(1000) == (125, 250, 500, 1000)
    assert usual_sizes(40) == (20, 40)
    with pytest.raises(ValueError, match="sizes must be"):
        nested_subsets(10, [20])
    with pytest.raises(ValueError, match="needs 3"):
        learning_curve(lambda rows, seed: 1.0, 40)
    with pytest.raises(ValueError, match="3 are needed"):
        extrapolate([(10, 0.5), (20, math.nan), (40, 0.2)], 40)


def problem(columns, informative, flipped=0.0, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1, (6000, columns))
    labels = (x[:, :informative].sum(1) + rng.normal(0, 0.3, 6000) > 0).astype(int)
    return x, np.where(rng.random(6000) < flipped, 1 - labels, labels)


def curve_of(x, y, rows):
    def losses(model, chosen):
        return -np.log(
            np.clip(model.predict_proba(x[chosen])[np.arange(len(chosen)), y[chosen]], 1e-4, 1)
        )

    def train(chosen, seed):
        return losses(LogisticRegression(C=1.0).fit(x[chosen], y[chosen]), np.arange(4000, 6000))

    whole = np.arange(rows)
    fitted = losses(LogisticRegression(C=1.0).fit(x[:rows], y[:rows]), whole).mean()
    return learning_curve(train, rows, labels=y[:rows], seeds=3, train_loss=float(fitted))


def test_many_columns_and_few_rows_ask_for_data():
    x, y = problem(60, 60)
    curve = curve_of(x, y, 400)
    print(answer(curve))
    assert verdict(curve) == "data"
    (fault,) = more_data_helps(curve)
    assert fault.evidence["high"] < curve.now
    truth = -np.log(
        np.clip(
            LogisticRegression(C=1.0)
            .fit(x[:800], y[:800])
            .predict_proba(x[4000:])[np.arange(2000), y[4000:]],
            1e-4,
            1,
        )
    ).mean()
    assert curve.twice[0] == pytest.approx(truth, rel=0.15)


def test_noise_alone_does_not():
    x, y = problem(2, 2, flipped=0.3)
    curve = curve_of(x, y, 3000)
    print(answer(curve))
    assert verdict(curve) != "data"
    assert not list(more_data_helps(curve))
