"""Monitors that see every flush, and those that wait: none misses a step, none sees one twice."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Trainer, TrainerCallback

import hf_recipe
from hf_recipe.catalogue import MONITORS
from hf_recipe.complexify.loss_spikes import follow_spikes
from hf_recipe.core.config import Settings
from hf_recipe.examiner import Examiner
from hf_recipe.instruments.layers import interval_of, looks_after, looks_at
from hf_recipe.instruments.record import flushes_after, flushes_at
from hf_recipe.instruments.window import Evaluation, Step, Window
from hf_recipe.trainer.watch import PATIENCE, Watch
from tests.models import arguments, bert, words


def test_the_next_flush_is_the_next_that_is_named():
    named = [step for step in range(1, 2000) if flushes_at(step)]
    for step in range(1900):
        assert flushes_after(step) == next(each for each in named if each > step)


def steps_seen(monkeypatch, steps, *, evaluate_at=()):
    """By monitor: the steps it was given in a run of `steps`, flushed as the Trainer's would be."""
    seen = {name: [] for name in MONITORS}

    def spy(name):
        def fold(state, window, latest):
            seen[name] += [step.step for step in window.steps]
            seen[name] += ["evaluation"] if window.evaluation is not None else []
            return state, None

        return fold

    for name, monitor in MONITORS.items():
        monkeypatch.setitem(vars(monitor), "fold", spy(name))
    watch, waiting = Watch(Examiner(Settings.resolve({}, checks={}))), []
    watch.begin({})
    for number in range(1, steps + 1):
        waiting.append(Step(number, 1.0, 1e-3))
        if flushes_at(number) or number in evaluate_at:
            watch.fold(Window(tuple(waiting)), number, settle=number in evaluate_at)
            waiting = []
        if number in evaluate_at:
            watch.fold(Window(evaluation=Evaluation(number, "validation")), number)
    watch.fold(Window(tuple(waiting), ended=True), steps)
    return seen


def test_every_monitor_sees_every_step_once_and_in_order(monkeypatch):
    evaluations = (700, 1500)
    expected = [
        item
        for step in range(1, 3001)
        for item in ((step, "evaluation") if step in evaluations else (step,))
    ]
    seen = steps_seen(monkeypatch, 3000, evaluate_at=evaluations)
    assert len(seen) == len(MONITORS) > 10
    assert all(given == expected for given in seen.values())
    assert {m.patient for m in MONITORS.values()} == {True, False}


def test_the_patient_wait_no_longer_than_they_should(monkeypatch):
    seen = steps_seen(monkeypatch, 600)
    assert PATIENCE == 512
    assert all(given == list(range(1, 601)) for given in seen.values())


@given(st.lists(st.floats(0.1, 9.0), min_size=40, max_size=90), st.integers(1, 20))
def test_a_quiet_window_says_of_spikes_what_its_steps_say(losses, size):
    """However the steps are cut into windows that hold no rise, the highest rise is the same."""
    flat = [5.0 + 0.01 * ((-1) ** i) for i in range(32)]
    start, _ = follow_spikes({}, Window(tuple(Step(i, x, 1e-3) for i, x in enumerate(flat))), {})
    steps = [Step(32 + i, 5.0 + 0.001 * x, 1e-3) for i, x in enumerate(losses)]
    whole, spikes = follow_spikes(dict(start), Window(tuple(steps)), {})
    assert spikes is None
    assert whole["open"] is None
    by_hand = max((s.loss - 5.0) / noise_at_start(flat) for s in steps)
    assert whole["highest"] == pytest.approx(max(by_hand, start["highest"]), rel=1e-6)
    assert whole["rates"] == [1e-3] * 8
    assert whole["steps"] == 32 + len(steps)
    assert len(Window(tuple(steps[:size])).finite) == min(size, len(steps))


def noise_at_start(flat):
    return 1.4826 * (flat[0] - flat[1]) / math.sqrt(2)


class Looks(TrainerCallback):
    """Sets the rate by hand, in the last moment before the update."""

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        optimizer.param_groups[0]["lr"] = 1e-3 / (1 + state.global_step)


class OwnLoop(Trainer):
    """Its loop might call none of the methods that seams are on."""

    def _run_epoch(self, *args, **kwargs):
        return super()._run_epoch(*args, **kwargs)


@pytest.mark.parametrize("with_callback", [False, True])
@pytest.mark.parametrize("kind", [Trainer, OwnLoop])
def test_a_step_begins_once_and_its_rate_is_the_one_it_was_taken_with(
    tmp_path, kind, with_callback
):
    trainer = kind(
        model=bert(num_hidden_layers=1),
        args=arguments(tmp_path, max_steps=12, gradient_accumulation_steps=2),
        train_dataset=words(),
        callbacks=[hf_recipe.RecipeCallback(), Looks()] if with_callback else [Looks()],
    )
    recipe = hf_recipe.attach(trainer)
    began, updates = [], []
    begins, updated = recipe.closer_look.step_begins, recipe.closer_look.before_update
    recipe.closer_look.step_begins = lambda step: (began.append(step), begins(step))
    recipe.closer_look.before_update = lambda optimizer: (
        updates.append(trainer.state.global_step + 1),
        updated(optimizer),
    )
    trainer.train()
    assert recipe.by_events == (kind is OwnLoop)
    assert recipe.report.crashed == {}
    assert began == sorted(set(began))
    assert updates == sorted(set(updates))
    assert {1, 2, 3, 5, 10} <= set(updates) <= set(began)
    rates = recipe.recorder.curves["learning rate"]
    assert rates.x == list(range(1, 13))
    assert rates.y == pytest.approx([1e-3 / step for step in range(1, 13)])


def test_what_was_detached_records_nothing_more(tmp_path):
    """Who wraps a method after us keeps our wrapper alive."""
    trainer = Trainer(
        model=bert(num_hidden_layers=1),
        args=arguments(tmp_path, max_steps=12),
        train_dataset=words(),
    )
    recipe = hf_recipe.attach(trainer)
    inner = trainer.training_step
    trainer.training_step = lambda *args, **kwargs: inner(*args, **kwargs)

    class Detaches(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6:
                recipe.detach()

    trainer.add_callback(Detaches())
    trainer.train()
    assert trainer.state.global_step == 12
    assert recipe.recorder.last_step == 6
    assert recipe.recorder.micro_batches == []


def test_what_passes_while_paused_is_no_step(tmp_path):
    trainer = Trainer(
        model=bert(num_hidden_layers=1),
        args=arguments(tmp_path, max_steps=40),
        train_dataset=words(),
    )
    recipe = hf_recipe.attach(trainer)
    data = trainer.train_dataset

    class Pauses(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step in (10, 25):
                recipe.pause() if state.global_step == 10 else recipe.resume()

    trainer.add_callback(Pauses())
    seen, fold = [], recipe.watch.fold
    recipe.watch.fold = lambda window, step, **how: (
        seen.extend(window.steps),
        fold(window, step, **how),
    )
    shown, inner = {}, trainer.training_step

    def training_step(model, inputs, *args, **kwargs):
        shown[trainer.state.global_step + 1] = inputs["input_ids"].tolist()
        return inner(model, inputs, *args, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    assert recipe.report.crashed == {}
    assert [step.step for step in seen] == [*range(1, 9), *range(26, 41)]
    for step in seen:
        assert [data[row]["input_ids"] for row in step.rows] == shown[step.step]
        assert 0 <= step.waiting <= step.seconds < 60


def test_how_often_weights_are_looked_at_follows_the_share_that_is_allowed(tmp_path):
    assert [interval_of(share) for share in (0.005, 0.01, 0.04, 1.0)] == [1024, 512, 128, 10]
    named = [step for step in range(1, 2000) if looks_at(step, 150)]
    assert named == sorted({2, 5, 10, 20, 50, 100, 200, *range(150, 2000, 150)})
    for step in range(1800):
        assert looks_after(step, 150) == next(each for each in named if each > step)
    trainer = Trainer(
        model=bert(num_hidden_layers=1),
        args=arguments(tmp_path, max_steps=48),
        train_dataset=words(),
    )
    recipe = hf_recipe.attach(trainer, overhead=0.32)
    trainer.train()
    assert recipe.report.crashed == {}
    samples = recipe.examiner.latest["LayerSamples"].samples
    assert [sample.step for sample in samples] == [20, 32, 48]
