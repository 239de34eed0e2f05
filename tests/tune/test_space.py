"""Search spaces: every distribution on known quantiles, clear errors, and the regret."""

import math

import numpy as np
import pytest
from scipy.stats import qmc

from hf_recipe.tune.space import parameters_of, points, quasi_random


def column(given, n=256, seed=3):
    return [trial["x"] for trial in quasi_random({"x": given}, n, seed)]


def test_the_space_of_the_contract():
    space = {
        "learning_rate": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-2},
        "dropout": {"values": [0, 0.1, 0.3]},
    }
    trials = quasi_random(space, 30, seed=0)
    assert trials == quasi_random(space, 30, seed=0) != quasi_random(space, 30, seed=1)
    assert all(1e-5 <= t["learning_rate"] <= 1e-2 for t in trials)
    assert {t["dropout"] for t in trials} == {0, 0.1, 0.3}
    assert quasi_random(space, 12, seed=0) == trials[:12]
    decades = np.histogram([math.log10(t["learning_rate"]) for t in trials], 3, (-5, -2))[0]
    assert all(8 <= count <= 12 for count in decades)


def test_inference_as_wandb_does():
    kinds = {
        "a": {"value": 3},
        "b": {"values": ["x", "y"]},
        "c": {"min": 1, "max": 4},
        "d": {"min": 1.0, "max": 4},
        "e": {"mu": 1.0},
    }
    expected = ["constant", "categorical", "int_uniform", "uniform", "normal"]
    assert [p.distribution for p in parameters_of(kinds)] == expected
    assert set(column({"min": 1, "max": 4})) == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("given", "low", "high", "median"),
    [
        ({"distribution": "uniform", "min": -1, "max": 3}, -1, 3, 1),
        ({"distribution": "log_uniform", "min": -2, "max": 2}, math.exp(-2), math.exp(2), 1),
        ({"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}, 1e-4, 1e-2, 1e-3),
        ({"distribution": "inv_log_uniform", "min": 0, "max": 4}, math.exp(-4), 1, math.exp(-2)),
        ({"distribution": "beta", "a": 2, "b": 2}, 0, 1, 0.5),
        ({"distribution": "beta", "a": 1, "b": 3}, 0, 1, 1 - 0.5 ** (1 / 3)),
        ({"distribution": "inv_log_uniform_values", "min": 1, "max": 100}, 1, 100, 10),
        ({"distribution": "normal", "mu": 5, "sigma": 2}, -7, 17, 5),
        ({"distribution": "log_normal", "mu": 0, "sigma": 1}, 0.002, 500, 1),
    ],
)
def test_ranges_and_medians(given, low, high, median):
    drawn = column(given)
    assert low <= min(drawn) < max(drawn) <= high
    assert np.median(drawn) == pytest.approx(median, rel=0.05, abs=0.05)


@pytest.mark.parametrize(
    ("given", "step"),
    [
        ({"distribution": "q_uniform", "min": 0, "max": 10, "q": 2}, 2),
        ({"distribution": "q_uniform", "min": 0.0, "max": 1.0, "q": 0.1}, 0.1),
        ({"distribution": "q_log_uniform", "min": 0, "max": 5}, 1),
        ({"distribution": "q_log_uniform_values", "min": 8, "max": 512, "q": 8}, 8),
        ({"distribution": "q_normal", "mu": 0, "sigma": 10, "q": 5}, 5),
        ({"distribution": "q_log_normal", "mu": 2, "sigma": 1}, 1),
        ({"distribution": "q_beta", "a": 2, "b": 5, "q": 0.05}, 0.05),
    ],
)
def test_quantised(given, step):
    for value in column(given):
        assert value / step == pytest.approx(round(value / step), abs=1e-9)
        assert isinstance(value, int) == float(step).is_integer()


def test_points_are_even_on_a_logarithm_and_far_evener_than_random_ones():
    rate = {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-1}
    for seed in range(5):
        decades = np.histogram(np.log10(column(rate, 48, seed)), 4, (-5, -1))[0]
        assert all(10 <= count <= 14 for count in decades)
    space = {f"x{i}": {"min": 0.0, "max": 1.0} for i in range(3)}
    ours = np.array([list(point.values()) for point in quasi_random(space, 100, 0)])
    at_random = np.random.default_rng(0).random((100, 3))
    assert qmc.discrepancy(ours) < 0.3 * qmc.discrepancy(at_random)


def test_probabilities():
    drawn = column({"values": ["a", "b", "c"], "probabilities": [0.5, 0.5, 0.0]})
    assert set(drawn) == {"a", "b"}
    assert drawn.count("a") == pytest.approx(128, abs=6)
    named = {"distribution": "categorical_w_probabilities", "values": ["a", "b"]}
    assert column(named | {"probabilities": [0.25, 0.75]}).count("a") == pytest.approx(64, abs=6)


def test_nested_parameters():
    space = {
        "optimizer": {"parameters": {"name": {"value": "adam"}, "lr": {"min": 0.0, "max": 1.0}}}
    }
    for trial in quasi_random(space, 5, 0):
        assert trial["optimizer"]["name"] == "adam"
        assert 0 <= trial["optimizer"]["lr"] < 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"minn": 0, "max": 1}, "'min'"),
        ({"distribution": "log_uniform_value", "min": 1, "max": 2}, "'log_uniform_values'"),
        ({"min": 2.0, "max": 1.0}, "min must be less than max"),
        ({"min": 1.0, "max": 1.0}, "min must be less than max"),
        ({"distribution": "log_uniform_values", "min": 0, "max": 1}, "min > 0"),
        ({"distribution": "log_uniform", "min": 1, "max": 5000}, "log_uniform_values"),
        ({"min": 0}, "both min and max"),
        ({"min": 0, "max": float("nan")}, "finite"),
        ({"min": "1e-5", "max": 1}, "finite number"),
        ({"values": []}, "at least one"),
        ({"values": [1, 2], "probabilities": [0.5, 0.6]}, "sum to 1"),
        ({"distribution": "uniform", "min": 0, "max": 1, "q": 1}, "takes no q"),
        ({"distribution": "normal", "sigma": 0}, "sigma must be positive"),
        (3, "'value': 3"),
        ({}, "nothing is said"),
    ],
)
def test_bad_spaces_name_the_parameter_and_the_remedy(given, says):
    with pytest.raises(ValueError, match="x: ") as error:
        quasi_random({"x": given}, 3, 0)
    assert says in str(error.value)


def test_no_space_and_no_points():
    with pytest.raises(ValueError, match="search space"):
        quasi_random({}, 3, 0)
    assert quasi_random({"x": {"value": 1}}, 0, 0) == []
    assert quasi_random({"x": {"value": 1}}, 2, 0) == [{"x": 1}, {"x": 1}]


@pytest.mark.parametrize(("n", "dimensions"), [(8, 2), (16, 4), (32, 4), (64, 4)])
@pytest.mark.parametrize("edge", [0.0, 0.1, 0.2])
def test_regret_against_random_search(n, dimensions, edge):
    """Quadratic valleys: the best of n points, against the best of n random ones."""
    rng = np.random.default_rng(0)
    space = {str(i): {"min": 0.0, "max": 1.0} for i in range(dimensions)}
    ours, theirs = 0.0, 0.0
    for repeat in range(200):
        drawn = np.array([list(trial.values()) for trial in quasi_random(space, n, repeat)])
        for _ in range(20):
            centre = rng.uniform(edge, 1 - edge, dimensions)
            weight = 10 ** rng.uniform(-1, 0, dimensions)
            ours += (weight * (drawn - centre) ** 2).sum(1).min()
            theirs += (weight * (rng.random((n, dimensions)) - centre) ** 2).sum(1).min()
    print(f"regret, {n} points, {dimensions} dimensions, edge {edge}: {ours / theirs:.3f} x random")
    assert ours / theirs <= (0.86 if edge == 0 else 0.8)


def test_points_are_even_in_every_dimension():
    for seed in range(5):
        drawn = points(64, 4, seed)
        assert (np.floor(np.sort(drawn, axis=0) * 64) == np.arange(64)[:, None]).all()
