"""Paired comparisons on numbers whose answer is known."""

import dataclasses
import math

import numpy as np
import pytest

from hf_recipe.instruments.compare import (
    Outcome,
    Variant,
    compare,
    paired_gain,
    read_outcome,
    remembered,
    seed_spread,
    write_outcome,
)

ROWS = 400


def losses(mean, seed, change=0.0, seed_sd=0.0):
    """Row losses with a large part shared by all variants, as rows that are hard for all have."""
    shared = np.random.default_rng(99).exponential(1.0, ROWS)
    own = np.random.default_rng([seed, int(change * 1e6) % 2**31])
    return tuple(mean * shared - change + own.normal(0, seed_sd) + own.normal(0, 0.05, ROWS))


def trainer(calls=None, seed_sd=0.0):
    def train(variant):
        if calls is not None:
            calls.append((variant.change, variant.seed))
        return Outcome(losses(1.0, variant.seed, variant.settings["gain"], seed_sd), cost=2.0)

    return train


def variant(name, gain):
    return Variant(name, {"gain": gain})


def test_a_small_real_gain_is_seen_where_unpaired_rows_could_not():
    ladder = compare(trainer(), variant("base", 0.0), [variant("better", 0.02)])
    base, better = ladder.rungs
    assert base.gain is None
    assert better.kept is True
    assert better.low <= 0.02 <= better.high
    assert Outcome(losses(1.0, 0)).standard_error > 0.02  # unpaired, two points are noise


def test_worse_is_refused_and_equal_is_undecided():
    base = variant("base", 0.0)
    ladder = compare(trainer(), base, [variant("worse", -0.05), variant("same", 1e-5)])
    assert [rung.kept for rung in ladder.rungs[1:]] == [False, None]


def test_one_seed_decides_nothing():
    ladder = compare(trainer(), variant("base", 0.0), [variant("better", 0.5)], seeds=[0])
    assert ladder.rungs[1].kept is None
    assert "one seed" in ladder.rungs[1].note


def test_noise_between_seeds_widens_the_interval():
    quiet = compare(trainer(), variant("base", 0.0), [variant("better", 0.02)])
    noisy = compare(trainer(seed_sd=0.1), variant("base", 0.0), [variant("better", 0.02)])
    widths = [ladder.rungs[1].high - ladder.rungs[1].low for ladder in (quiet, noisy)]
    assert widths[1] > 3 * widths[0]
    assert noisy.rungs[1].kept is None


def test_under_the_null_few_are_kept():
    kept = 0
    for repeat in range(100):
        draw = np.random.default_rng(repeat)
        before = draw.normal(0, 1, (3, ROWS)) + draw.normal(0, 0.1, (3, 1))
        after = draw.normal(0, 1, (3, ROWS)) + draw.normal(0, 0.1, (3, 1))
        kept += paired_gain(before, after).verdict is not None
    assert kept <= 8


def test_a_loss_that_is_not_finite_is_worse_and_named():
    def train(v):
        rows = (math.nan,) * 4 if v.change == "blown up" else (1.0, 2.0, 3.0, 4.0)
        return Outcome(rows)

    rung = compare(train, Variant("base", {}), [Variant("blown up", {"x": 1})]).rungs[1]
    assert rung.kept is False
    assert rung.gain is None
    assert "not finite" in rung.note


def test_other_rows_cannot_be_paired():
    with pytest.raises(ValueError, match="same seeds and rows"):
        paired_gain([[1.0, 2.0]], [[1.0]])


def test_what_was_trained_is_not_trained_again(tmp_path):
    calls = []
    arguments = (variant("base", 0.0), [variant("better", 0.1)], [0, 1])
    first = compare(trainer(calls), *arguments, cache=tmp_path)
    assert len(calls) == 4
    assert compare(trainer(calls), *arguments, cache=tmp_path) == first
    assert len(calls) == 4
    next(tmp_path.glob("*.json")).write_text("{")  # killed while writing by another program
    assert compare(trainer(calls), *arguments, cache=tmp_path) == first
    assert len(calls) == 5


def test_an_outcome_survives_its_file(tmp_path):
    outcome = Outcome((1.0, math.nan, math.inf), 3.0, None, {"curve": [[1, 2.5]], "name": "x"})
    write_outcome(tmp_path / "o.json", Variant("x"), outcome)
    read = read_outcome(tmp_path / "o.json")
    assert read.row_losses[0] == 1.0
    assert math.isnan(read.row_losses[1])
    assert read.row_losses[2] == math.inf
    assert dataclasses.replace(read, row_losses=()) == dataclasses.replace(outcome, row_losses=())


def test_the_key_is_of_settings_and_seed_not_of_words():
    assert Variant("a", {"x": 1}).key == Variant("b", {"x": 1}).key
    assert Variant("a", {"x": 1}).key != Variant("a", {"x": 1}, seed=1).key


def test_seed_spread_pools():
    gains = [np.array([[1.0], [3.0]]), np.array([[0.0], [0.0]])]
    assert seed_spread(gains) == (1.0, 2)
    assert seed_spread([np.array([[1.0]])]) is None


def test_remembered_returns_what_was_trained(tmp_path):
    train = remembered(trainer(), tmp_path)
    assert train(variant("a", 0.0)) == train(variant("a", 0.0))


# -------------------------------------------------------------------- the null rate


def null_gains(trials, seeds, rows, seed_sd, seed=0):
    """Gains of changes that change nothing: other draws of the same seeds' and rows' noise."""
    rng = np.random.default_rng(seed)
    for _ in range(trials):
        hard = rng.exponential(1.0, rows)
        first, second = (
            hard + rng.normal(0, seed_sd, (seeds, 1)) + rng.normal(0, 0.3, (seeds, rows)) * hard
            for _ in range(2)
        )
        yield paired_gain(first.tolist(), second.tolist())


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("seed_sd", [0.0, 0.02, 0.1])
def test_nothing_is_kept_by_noise(seeds, seed_sd):
    kept = sum(g.verdict is True for g in null_gains(400, seeds, 120, seed_sd))
    print(f"{seeds} seeds, spread {seed_sd}: {kept} of 400 null changes kept")
    assert kept <= 20


def test_nothing_is_kept_by_noise_in_real_trainings():
    """Changes that change nothing: the same small networks under other seeds."""
    import torch
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    inputs = torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32)
    labels = torch.tensor(y)

    def train(seed):
        torch.manual_seed(seed)
        net = torch.nn.Sequential(torch.nn.Linear(30, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        for _ in range(40):
            rows = torch.randint(0, 300, (32,))
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(inputs[rows]), labels[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            held = torch.nn.functional.cross_entropy(
                net(inputs[300:]), labels[300:], reduction="none"
            )
        return held.tolist()

    outcomes = [train(seed) for seed in range(90)]
    draw, kept = np.random.default_rng(0), 0
    for _ in range(200):
        chosen = [outcomes[i] for i in draw.permutation(90)[:6]]
        kept += paired_gain(chosen[:3], chosen[3:]).verdict is True
    print(f"{kept} of 200 real null changes kept, three seeds each")
    assert kept <= 10
