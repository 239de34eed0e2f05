"""Learning curves: recorded ones (scripts/learning_curves.py), made ones, and bad input."""

import json
from pathlib import Path

import numpy as np
import pytest

from hf_recipe.regularize.learning_curve import fit

RECORDED = json.loads((Path(__file__).parent / "learning_curves.json").read_text())


def extrapolations(times):
    """(relative errors, hits of the interval) at `times` the largest size that was fitted."""
    errors, hits = [], []
    for curve in RECORDED:
        points = np.array(curve["points"])
        for last in np.unique(points[:, 0])[-2:]:
            known = points[points[:, 0] <= last / times * 1.1]
            if len(np.unique(known[:, 0])) < 4:
                continue
            truth = points[points[:, 0] == last, 1].mean()
            mean, low, high = fit(known[:, 0], known[:, 1]).predict(last)
            errors.append(abs(mean / truth - 1))
            hits.append(low <= truth <= high)
    return np.array(errors), np.array(hits)


@pytest.mark.parametrize(("times", "limit"), [(2, 0.065), (4, 0.084)])
def test_recorded_curves_are_extrapolated(times, limit):
    errors, hits = extrapolations(times)
    assert len(errors) >= 20
    assert np.median(errors) <= limit
    assert 0.65 <= hits.mean() <= 0.97


def made(seed, noise):
    draw = np.random.default_rng(seed)
    floor, scale, power = draw.uniform(0.1, 0.5), draw.uniform(0.5, 2), draw.uniform(0.4, 0.8)
    sizes = np.repeat(np.geomspace(100, 10_000, 7), 3)

    def loss(size):
        return floor + scale * (size / 100) ** -power

    return sizes, loss(sizes) * (1 + noise * draw.standard_normal(len(sizes))), floor, loss


def test_the_floor_of_a_made_power_law_is_found():
    errors, hits = [], []
    for seed in range(60):
        sizes, losses, floor, loss = made(seed, 0.02)
        curve = fit(sizes, losses)
        errors.append(abs(curve.asymptote / floor - 1))
        _, low, high = curve.predict(40_000)
        hits.append(low <= loss(40_000) <= high)
    assert np.mean(errors) < 0.10
    assert 0.7 <= np.mean(hits) <= 0.97


def test_without_noise_the_law_is_found_and_the_interval_is_narrow():
    sizes, losses, _, loss = made(3, 0.0)
    mean, low, high = fit(sizes, losses).predict(20_000)
    assert mean == pytest.approx(loss(20_000), rel=0.01)
    assert low <= loss(20_000) <= high


def test_the_interval_widens_with_the_distance():
    sizes, losses, _, _ = made(5, 0.03)
    curve = fit(sizes, losses)
    widths = [high - low for _, low, high in map(curve.predict, (20_000, 80_000, 1_000_000))]
    means = [curve.predict(size)[0] for size in (5_000, 20_000, 80_000)]
    assert means == sorted(means, reverse=True)
    assert widths[2] / curve.predict(1e6)[0] > widths[0] / curve.predict(2e4)[0]


def test_a_flat_curve_stays_flat_and_order_and_nan_do_not_matter():
    sizes = np.array([100, 200, 400, 800] * 2)
    flat = fit(sizes, np.full(8, 0.7))
    assert flat.predict(3200)[0] == pytest.approx(0.7, rel=0.01)
    _, low, high = flat.predict(3200)
    assert 0 <= low <= 0.7 <= high
    losses = 0.2 + 3 * sizes**-0.5
    one = fit(sizes, losses).predict(3000)
    other = fit([50, *sizes[::-1]], [np.nan, *losses[::-1]]).predict(3000)
    assert one == pytest.approx(other)


def test_a_loss_that_rises_is_not_extrapolated_below_itself():
    curve = fit([100, 200, 400, 800], [0.5, 0.55, 0.6, 0.62])
    mean, low, high = curve.predict(1600)
    assert 0.5 <= mean <= 0.65
    assert low < mean < high


@pytest.mark.parametrize(
    ("sizes", "losses", "message"),
    [
        ([100, 200], [1.0], "one loss per size"),
        ([100, 200, -5], [1.0, 0.9, 0.8], "positive"),
        ([100, 200, 400], [1.0, -0.9, 0.8], "negative"),
        ([100, 100, 200], [1.0, 0.9, 0.8], "2 sizes"),
        ([100, 200, 400], [1.0, 0.9, np.nan], "2 sizes"),
        ([], [], "0 sizes"),
    ],
)
def test_what_cannot_be_fitted_is_named(sizes, losses, message):
    with pytest.raises(ValueError, match=message):
        fit(sizes, losses)


def test_a_size_that_is_none_is_named():
    with pytest.raises(ValueError, match="size"):
        fit([1, 2, 4], [3.0, 2.0, 1.5]).predict(0)
