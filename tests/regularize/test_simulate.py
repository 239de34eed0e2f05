"""Simulated rows: mixing, provenance, and whether they are worth it on a known truth."""

import datasets
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from hf_recipe.regularize.simulate import Simulated, compare_simulated


def real(rows, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, rows)
    x = rng.normal(0, 1, (rows, 6)) + 0.6 * labels[:, None]
    return datasets.Dataset.from_dict({"x": x.tolist(), "label": labels.tolist()})


def faithful(count, rng):
    labels = rng.integers(0, 2, count)
    return {"x": rng.normal(0, 1, (count, 6)) + 0.6 * labels[:, None], "label": labels}


def wrong(count, rng):
    rows = faithful(count, rng)
    return {**rows, "label": 1 - rows["label"]}


def test_the_mixture_has_its_share_and_its_provenance():
    mixed = Simulated(faithful, 0.25).mix(real(300, 0))
    assert len(mixed) == 400
    assert mixed["provenance"].count("simulated") == 100
    assert set(mixed.column_names) == {"x", "label", "provenance"}
    again = Simulated(faithful, 0.25).mix(real(300, 0))
    assert mixed["x"][:] == again["x"][:]
    alone = Simulated(faithful, 0.0).mix(real(30, 0))
    assert set(alone["provenance"]) == {"real"}


@pytest.mark.parametrize(
    ("generator", "message"),
    [
        (lambda n, rng: [{"x": [0.0] * 6, "label": 1}], "gave 1 rows"),
        (lambda n, rng: [{"x": [0.0] * 6}] * n, "absent: label"),
        (lambda n, rng: {"x": [[0.0] * 6] * n, "label": ["a"] * n}, "another type"),
    ],
)
def test_what_the_generator_does_wrong_is_named(generator, message):
    with pytest.raises(ValueError, match=message):
        Simulated(generator, 0.5).mix(real(20, 0))


def test_shares_and_sets_that_cannot_be():
    with pytest.raises(ValueError, match="share"):
        Simulated(faithful, 1.0)
    with pytest.raises(TypeError, match="mixes a"):
        Simulated(faithful).mix([1, 2])
    with pytest.raises(ValueError, match="already has"):
        Simulated(faithful).mix(Simulated(faithful).mix(real(20, 0)))


def test_good_simulations_are_kept_and_false_ones_dropped():
    held = real(2000, 99)
    x, y = np.array(held["x"]), np.array(held["label"])

    def train(data, seed):
        order = np.random.default_rng(seed).permutation(len(data))[: len(data) * 9 // 10]
        rows = data.select(order)
        model = LogisticRegression(C=100.0).fit(np.array(rows["x"]), np.array(rows["label"]))
        return -np.log(model.predict_proba(x)[np.arange(len(y)), y])

    good = compare_simulated(train, real(40, 0), Simulated(faithful, 0.8))
    bad = compare_simulated(train, real(40, 0), Simulated(wrong, 0.8))
    print(good.rungs[1], bad.rungs[1])
    assert good.rungs[1].kept is True
    assert bad.rungs[1].kept is False
