"""The loss law on recorded curves, on made ones, and on input that makes no sense.

lr_curves.npz: thinned from the public repository MultiPowerLaw (MIT licence, Copyright (c) 2025
Kairong Luo): Llama-style models of 25M and 100M parameters under nine schedules.
"""

import numpy as np
import pytest

from hf_recipe.complexify.annealing import warmup_end
from hf_recipe.complexify.loss_law import fit
from scripts.benchmark_loss_law import CURVES, FITS, measure, read_curves


@pytest.fixture(scope="module")
def curves():
    return read_curves(CURVES)


@pytest.mark.parametrize(
    ("what", "limit"), [("one WSD run", 0.18), ("constant and two-stage", 0.23)]
)
def test_the_final_loss_of_unseen_schedules_is_predicted(curves, what, limit):
    errors, blind, hits, undecided = measure(curves, FITS[what])
    assert errors.mean() <= limit
    assert blind.mean() >= 6 * errors.mean()
    assert 0.7 <= hits.mean() <= 0.95
    assert not undecided.any()


@pytest.mark.parametrize("what", ["lone cosine", "lone constant"])
def test_a_run_without_plateau_and_decay_is_undecided_and_covered(curves, what):
    _, _, hits, undecided = measure(curves, FITS[what])
    assert undecided.all()
    assert hits.mean() >= 0.8


def schedule(name, steps, peak=1e-3):
    part = np.clip(np.arange(steps) / steps, 0, 1)
    shape = {
        "wsd": np.where(part < 0.8, 1.0, 1 - (part - 0.8) / 0.2 * 0.95),
        "linear": 1 - 0.95 * part,
        "cosine": 0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * part)),
        "two-stage": np.where(part < 0.5, 1.0, 0.2),
    }[name]
    return peak * shape * np.minimum(1, (np.arange(steps) + 1) / (0.05 * steps))


def quadratic(rates, noise, seed, scale=400.0):
    """Expected loss of SGD on a quadratic with a power-law spectrum, observed with noise."""
    curvature = np.arange(1, 201.0) ** -1.4
    error = np.ones(200) / 200 * 8
    losses = []
    for rate in rates * scale:
        losses.append(1.0 + 0.5 * float(curvature @ error))
        error = (1 - rate * curvature) ** 2 * error + rate**2 * 0.1 * curvature
    steps = np.arange(9, len(rates), 10)
    drawn = 1 + noise * np.random.default_rng(seed).standard_normal(len(steps))
    return (rates, steps, np.array(losses)[steps] * drawn), losses[-1]


@pytest.mark.parametrize("name", ["linear", "cosine", "two-stage"])
def test_a_short_run_of_another_kind_is_predicted_within_its_interval(name):
    run, _ = quadratic(schedule("wsd", 1500), 0.003, 0)
    law = fit([run])
    other = schedule(name, 1500)
    truth = quadratic(other, 0.0, 0)[1]
    low, high = law.interval(other)
    assert low <= truth <= high
    assert law.predict(other)[-1] == pytest.approx(truth, rel=0.03)
    wide = law.interval(other, level=0.99)
    assert wide[0] < low < high < wide[1]


def test_prediction_has_the_shape_of_the_schedule_and_the_unit_of_the_loss():
    rates = schedule("wsd", 5000)
    run, _ = quadratic(rates, 0.001, 1)
    law, tenfold = fit([run]), fit([(run[0], run[1], 10 * run[2])])
    assert law.predict(rates).shape == (5000,)
    np.testing.assert_allclose(tenfold.predict(rates), 10 * law.predict(rates), rtol=1e-4)
    assert not law.undecided


def test_order_nan_and_gaps_do_not_matter():
    rates = schedule("two-stage", 1200)
    (_, steps, losses), _ = quadratic(rates, 0.002, 2)
    shuffled = np.random.default_rng(0).permutation(len(steps))
    holes = losses.copy()
    holes[20] = np.nan
    there = np.isfinite(holes)
    ours = fit([(list(rates), list(steps[shuffled]), list(holes[shuffled]))])
    theirs = fit([(rates, steps[there], losses[there])])
    assert ours.predict(rates)[-1] == pytest.approx(theirs.predict(rates)[-1], rel=1e-9)


def test_warm_up_is_seen():
    assert warmup_end(schedule("wsd", 1000)) in (49, 50)
    assert warmup_end(np.full(10, 1e-3)) == 0


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "at least one"),
        ([([1e-3] * 100, [1, 2], [1.0])], "one loss per observed step"),
        ([([1e-3] * 100, [50, 200], [1.0, 2.0])], "must lie within"),
        ([([1e-3] * 100, [50, 60], [1.0, 2.0])], "8 are needed"),
        ([([], [], [])], "must hold the rate"),
        ([([-1.0, 1.0], [], [])], "not negative"),
    ],
)
def test_what_cannot_be_fitted_is_named(runs, message):
    with pytest.raises(ValueError, match=message):
        fit(runs)


def test_a_level_that_is_none_is_named():
    run, _ = quadratic(schedule("wsd", 600), 0.001, 1)
    with pytest.raises(ValueError, match="level"):
        fit([run]).interval(run[0], level=80)


@pytest.mark.parametrize("steps", [300, 1000, 24_000])
@pytest.mark.parametrize("shape", ["cosine", "linear", "a cosine to a tenth"])
def test_a_lone_decay_is_undecided_at_any_length(shape, steps):
    """A short run's delay is a large share of it, and blurs the decay: that separates nothing."""
    at = np.arange(steps)
    down = 1 - at / steps if shape == "linear" else 0.5 + 0.5 * np.cos(np.pi * at / steps)
    rates = 1e-3 * np.minimum(1, (at + 1) / (0.05 * steps)) * down
    if shape == "a cosine to a tenth":
        rates = 1e-4 + 0.9 * rates
    seen = np.arange(steps // 20, steps, steps // 100)
    losses = 2 + (np.cumsum(rates)[seen] / rates.sum()) ** -0.5
    assert fit([(rates, seen, losses)]).undecided


def test_a_longer_constant_run_beside_a_decay_does_not_stretch_its_delay():
    """The delay shows where the rate falls: a constant run of three times the length has none."""
    warm = np.minimum(1, (np.arange(72_000) + 1) / 2000)
    decay = warm[:24_000] * np.minimum(1, (24_000 - np.arange(24_000)) / 4000)
    delay = 900.0

    def losses(rates, seen):
        annealed = np.zeros(len(rates))
        for step in range(1, len(rates)):
            fall = max(rates[step - 1] - rates[step], 0.0)
            annealed[step] = annealed[step - 1] * np.exp(-1 / delay) + fall
        answered = np.cumsum(np.maximum(-np.diff(rates, prepend=rates[0]), 0)) - annealed
        return 2.5 + 0.3 * (np.cumsum(rates)[seen] / 1e4) ** -0.5 - 0.13 * answered[seen]

    runs = []
    for rates in (warm, decay):
        seen = np.arange(3000, len(rates), len(rates) // 200)
        runs.append((rates, seen, losses(rates, seen)))
    law = fit(runs)
    mean = sum(member.weight * member.delay for member in law.members)
    assert 600 < mean < 1300
    assert law.predict(decay)[-1] == pytest.approx(losses(decay, [23_999])[0], rel=2e-3)
