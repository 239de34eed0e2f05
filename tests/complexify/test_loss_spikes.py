"""The loss's course: divergence and spikes on drawn curves, and what must stay silent."""

import numpy as np
import pytest

from hf_recipe.complexify.loss_spikes import (
    LOSS_DIVERGED,
    LOSS_SPIKE,
    LossCourse,
    LossSpikes,
    Spike,
    follow_course,
    follow_spikes,
)
from hf_recipe.instruments.record import flushes_at
from hf_recipe.instruments.window import Step, Window
from tests.complexify.initial import initial_loss


def told(curve, rates=None, start=None):
    """(check, step) of every finding on a curve, flushed as the recorder does."""
    course, spikes, found, waiting = {}, {}, [], []
    seen = {} if start is None else {"InitialLoss": initial_loss(start)}
    for i, loss in enumerate(curve, 1):
        rate = 1e-3 if rates is None else float(rates[i - 1])
        waiting.append(Step(i, float(loss), rate, rows=(i, i + 1)))
        if not flushes_at(i) and i < len(curve):
            continue
        for window in (Window(tuple(waiting)), *([Window(ended=True)] * (i == len(curve)))):
            course, measured = follow_course(course, window, seen)
            if measured is not None:
                found += [("diverged", i) for _ in LOSS_DIVERGED.judge(measured)]
            spikes, measured = follow_spikes(spikes, window, seen)
            if measured is not None:
                found += [("spike", f.evidence["step"]) for f in LOSS_SPIKE.judge(measured)]
        waiting = []
    return found


def clean(kind, draw, steps=1000):
    """A healthy noisy curve, and what it begins at without noise."""
    t, noise = np.arange(steps), draw.normal(size=steps)
    base = 0.5 + 3.5 * np.exp(-t / draw.choice([30, 150, 600]))
    base = base if draw.random() < 0.7 else np.full(steps, 0.7)
    last = np.where(t % 20 == 19, 4, 1)  # a small last batch in every epoch
    curves = {
        "normal": base + draw.choice([0.01, 0.1]) * noise,
        "tails": base + 0.1 * draw.standard_t(3, size=steps),
        "products": base * np.exp(draw.choice([0.1, 0.5, 1.0]) * noise),
        "last batch": base * np.exp(0.1 * last * noise),
        "converged": 0.02 * np.exp(1.2 * noise),
        "huge": 1e12 * base * np.exp(0.6 * noise),
    }
    scale = {"huge": 1e12, "converged": 0.02 / base[0]}.get(kind, 1.0)
    return curves[kind], base[0] * scale


@pytest.mark.parametrize("kind", ["normal", "tails", "products", "last batch", "converged", "huge"])
def test_at_most_one_clean_curve_in_a_hundred_is_blamed(kind):
    draw = np.random.default_rng(7)
    curves = [clean(kind, draw) for _ in range(100)]
    blamed = [told(curve, start=start) for curve, start in curves]
    assert sum(any(name == "diverged" for name, _ in found) for found in blamed) <= 1
    assert sum(any(name == "spike" for name, _ in found) for found in blamed) <= 1


def test_a_run_that_leaves_for_good_is_found_within_a_hundred_steps():
    draw = np.random.default_rng(1)
    late = []
    for _ in range(20):
        curve, start = clean("normal", draw)
        at = int(draw.integers(100, 800))
        away = np.maximum(np.arange(1000) - at, 0)
        risen = curve + (start * 2.5) * (1 - np.exp(-away / 4))
        steps = [step for name, step in told(risen, start=start) if name == "diverged"]
        assert steps
        late.append(steps[0] - at)
    assert min(late) > 0
    assert np.median(late) <= 48
    assert max(late) <= 80


def test_too_hot_from_the_start_and_fallen_back():
    draw = np.random.default_rng(2)
    hot = [1.386, *(7 + draw.normal(size=63))]
    assert told(hot)[0] == ("diverged", 16)
    back = np.concatenate([np.linspace(4, 1, 200), np.full(200, 3.9)]) + draw.normal(size=400) / 50
    assert any(name == "diverged" and 200 < step < 300 for name, step in told(back))


def test_a_spike_is_told_once_with_its_rows_and_a_restart_is_not():
    draw = np.random.default_rng(3)
    curve = 1 + draw.normal(size=300) / 50
    curve[150:156] += [0.3, 1.0, 2.0, 1.0, 0.5, 0.2]
    assert told(curve) == [("spike", 153)]
    rates = np.full(300, 1e-4)
    rates[148:] = 1e-3
    assert told(curve, rates) == []


def test_judging():
    healthy = LossCourse(64, 4.0, 2.0, (2.3, 2.2, 2.1, 2.0), 0.1, False)
    assert list(LOSS_DIVERGED.judge(healthy)) == []
    (fault,) = LOSS_DIVERGED.judge(LossCourse(64, 4.0, 2.0, (6.0, 6.1, 6.0, 6.2), 0.1, False))
    assert "it began at 4" in fault.message
    spike = Spike(90, 9.0, 2.0, 0.1, 4, 2.0, 1e-3, (5, 6))
    (fault,) = LOSS_SPIKE.judge(LossSpikes(100, (spike,)))
    assert (fault.examples, fault.subject) == ((5, 6), "step 90")
    mild = Spike(90, 2.4, 2.0, 0.1, 1, 3.0, 1e-3)
    assert list(LOSS_SPIKE.judge(LossSpikes(100, (mild,)))) == []
