"""Advice on steps and decay: from recorded numbers, and from real runs."""

import json

import numpy as np
import pytest
from transformers import Trainer

from hf_recipe.complexify.outlook import (
    FEWEST_STEPS,
    LONGER,
    SHORTER,
    Option,
    Outlook,
    fold,
    look_ahead,
    schedules,
)
from hf_recipe.complexify.schedule_advice import (
    SATURATED_EARLY,
    STILL_IMPROVING,
    advise,
    picture,
)
from hf_recipe.instruments.window import Step, Window
from hf_recipe.trainer.callback import LRDecayCallback
from tests.gallery.harness import everything, run
from tests.models import arguments, bert, words


def option(name, gain, low, high, steps=900):
    return Option(name, steps, 1.0 - gain, gain, low, high, (1.0, 2.0), (1.1, 1.0))


def outlook(longer=(0.1, 0.05, 0.15), shorter=(-0.1, -0.15, -0.05), **changes):
    values = {
        "ended": True,
        "steps": 600,
        "epochs": 2.0,
        "final": 1.0,
        "error": 0.002,
        "settled": 0.99,
        "rate_then": 1.0,
        "undecided": False,
        "evaluations": 0,
        "falls": 0.0,
        "options": (
            option("as it was", 0.0, 0.0, 0.0, 600),
            option(LONGER, *longer),
            option(SHORTER, *shorter, 360),
            option("linear to zero", 0.05, 0.02, 0.08, 600),
        ),
    }
    return Outlook(**{**values, **changes})


def test_judging_still_improving():
    def told(**changes):
        return len(list(STILL_IMPROVING.judge(outlook(**changes))))

    assert told() == 1
    assert told(ended=False) == 0
    assert told(longer=(0.1, -0.01, 0.2)) == 0  # the interval holds 0
    assert told(longer=(0.01, 0.005, 0.015)) == 0
    assert told(error=0.06) == 0
    assert told(epochs=30.0) == 0  # the training loss of rows seen thirty times
    assert told(epochs=30.0, evaluations=8, falls=5.0) == 1
    assert told(evaluations=8, falls=-3.0) == 0  # validation has turned


def test_judging_saturated_early():
    def told(**changes):
        values = {"settled": 0.4, "shorter": (-0.001, -0.002, 0.0), **changes}
        return len(list(SATURATED_EARLY.judge(outlook(**values))))

    assert told() == 1
    assert told(settled=0.7) == 0
    assert told(rate_then=0.05) == 0
    assert told(shorter=(-0.001, -0.03, 0.01)) == 0
    assert told(falls=4.0, evaluations=8) == 0


def course(rates, exponent, scale, gain, noise=0.01):
    """Losses by the law, with an answer to the annealing delayed by eighty steps."""
    n, peak = len(rates), rates.max()
    waiting, annealed = 0.0, []
    for i, rate in enumerate(rates):
        waiting = waiting * np.exp(-1 / 80) + ((rates[i - 1] - rate) / peak if i else 0.0)
        annealed.append((rates[0] - rate) / peak - waiting)
    noise = np.random.default_rng(0).normal(0, noise, n)
    travelled = np.cumsum(rates) / peak / 50
    return 1.0 + scale * travelled**-exponent - gain * np.array(annealed) + noise


def wsd(n):
    return 1e-3 * np.minimum(1.0, (n - np.arange(n)) / (0.2 * n))


def points(rates, losses):
    n = len(rates)
    return np.stack([np.arange(1.0, n + 1), np.ones(n), losses, rates], 1)


def test_predictions_hold_what_then_happens():
    """Fitted to 600 steps; the law itself says what 900 and 360 give."""
    made = look_ahead(points(wsd(600), course(wsd(600), 0.5, 1.0, 0.3)), 2, [], ended=True)
    ends = {n: course(wsd(n), 0.5, 1.0, 0.3, noise=0.0)[-1] for n in (600, 900)}
    longer = made.option(LONGER)
    assert longer.low <= ends[600] - ends[900] <= longer.high
    assert not made.undecided
    assert len(list(STILL_IMPROVING.judge(made))) == 1
    flat = look_ahead(points(wsd(600), course(wsd(600), 2.5, 0.1, 0.0)), 2, [], ended=True)
    assert list(STILL_IMPROVING.judge(flat)) == []
    assert len(list(SATURATED_EARLY.judge(flat))) == 1


def test_the_answer_names_the_best_decay_or_none():
    constant = np.full(600, 1e-3)
    made = look_ahead(points(constant, course(constant, 0.5, 1.0, 0.3)), 2, [], ended=True)
    assert made.undecided
    assert "undecided" in advise(made).answer
    assert advise(outlook()).answer.startswith("linear to zero: a training loss lower by 0.05")
    lines = picture(made).lines
    assert {len(line.x) == len(line.y) > 50 for line in lines} == {True}
    assert len(lines) == 7


def test_schedules_keep_the_warm_up():
    rates = np.concatenate([np.linspace(0.1, 1, 10), np.linspace(1, 0, 90)])
    made = schedules(rates)
    assert {len(made[name]) for name in made} == {150, 60, 100}
    for name, other in made.items():
        if len(other) == 100:
            assert other[:9] == pytest.approx(rates[:9]), name


def test_the_monitor_is_bounded_and_json():
    state, found = {}, None
    for start in range(0, 6000, 16):
        steps = tuple(Step(i + 1, 1 + 30 / (i + 30), 1e-3) for i in range(start, start + 16))
        state, found = fold(json.loads(json.dumps(state)), Window(steps=steps), {})
        assert found is None
    assert len(state["points"]) <= 1024
    _, found = fold(state, Window(ended=True), {})
    assert found.steps == 6000
    assert found.final == pytest.approx(1.005, abs=1e-3)


def test_a_real_run_ends_with_advice(tmp_path):
    trainer = Trainer(
        model=bert(),
        args=arguments(tmp_path, max_steps=FEWEST_STEPS, lr_scheduler_type="constant"),
        train_dataset=words(),
        callbacks=[LRDecayCallback()],
    )
    report = run(trainer)
    assert report.ran["still-improving"] == report.ran["saturated-early"] == ["end"]
    assert "Which learning-rate decay suits this data set?" in {a.question for a in report.answers}
    assert "Loss under other schedules, as predicted" in {e.title for e in report.exhibits}
    assert all(f.severity == "note" for f in everything(report) if f.check == "still-improving")
    assert "other schedules" in (tmp_path / "recipe" / "report.html").read_text()
