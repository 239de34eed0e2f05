"""Monitors that see every flush, and those that wait: none misses a step, none sees one twice."""

import copy
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Trainer, TrainerCallback

import hf_recipe
from hf_recipe.catalogue import MONITORS
from hf_recipe.complexify import loss_spikes
from hf_recipe.complexify.loss_spikes import follow_spikes
from hf_recipe.core.config import Settings
from hf_recipe.examiner import Examiner
from hf_recipe.instruments.layers import interval_of, looks_after, looks_at
from hf_recipe.instruments.record import flushes_after, flushes_at
from hf_recipe.instruments.window import Evaluation, Step, Window
from hf_recipe.trainer.watch import Watch
from tests.models import arguments, bert, words


def test_the_next_flush_is_the_next_that_is_named():
    named = [step for step in range(1, 2000) if flushes_at(step)]
    for step in range(1900):
        assert flushes_after(step) == next(each for each in named if each > step)


def windows_seen(monkeypatch, steps, *, evaluate_at=()):
    """By monitor: the windows it was given in a run of `steps`, flushed as the Trainer's are."""
    seen = {name: [] for name in MONITORS}

    def spy(name):
        return lambda state, window, latest: (seen[name].append(window) or state, None)

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
    evaluations = (300, 700, 1500)
    expected = [
        item
        for step in range(1, 3001)
        for item in ((step, "evaluation") if step in evaluations else (step,))
    ]
    windows = windows_seen(monkeypatch, 3000, evaluate_at=evaluations)
    assert len(windows) == len(MONITORS) > 10
    for received in windows.values():
        seen = []
        for window in received:
            seen += [step.step for step in window.steps]
            seen += ["evaluation"] if window.evaluation is not None else []
        assert seen == expected


def test_the_patient_are_given_many_flushes_together(monkeypatch):
    windows = windows_seen(monkeypatch, 3000, evaluate_at=(1500,))
    ends = {
        name: [w.steps[-1].step for w in received if w.steps and w.steps[-1].step > 512]
        for name, received in windows.items()
    }
    every = [*range(576, 1500, 64), 1500, *range(1536, 3000, 64), 3000]
    together = [1024, 1500, 2048, 2560, 3000]  # no more than 512 and a flush, or an evaluation
    for name, monitor in MONITORS.items():
        assert ends[name] == (together if monitor.patient else every), name
    assert {monitor.patient for monitor in MONITORS.values()} == {True, False}


def test_an_evaluation_with_no_step_before_it_is_no_window_of_steps(monkeypatch):
    seen = windows_seen(monkeypatch, 0)
    assert {len(received) for received in seen.values()} == {1}  # the end
    watch = Watch(Examiner(Settings.resolve({}, checks={})))
    watch.begin({})
    watch.fold(Window(), 0, settle=True)
    assert {len(received) for received in seen.values()} == {1}


@given(st.lists(st.floats(0.1, 9.0), min_size=1, max_size=90), st.sampled_from([0.01, 1.0]))
def test_the_short_way_past_a_quiet_window_leads_to_the_same_state(losses, height):
    flat = tuple(Step(i, 5.0 + 0.01 * (-1) ** i, 1e-3) for i in range(32))
    start, _ = follow_spikes({}, Window(flat), {})
    window = Window(tuple(Step(32 + i, 5.0 + height * x, 1e-3) for i, x in enumerate(losses)))
    short = follow_spikes(copy.deepcopy(start), window, {})
    with mock.patch.object(loss_spikes, "_is_quiet", return_value=False):
        long = follow_spikes(copy.deepcopy(start), window, {})
    assert short == long


def trainer_of(folder, steps, kind=Trainer, **changes):
    return kind(
        model=bert(num_hidden_layers=1),
        args=arguments(folder, max_steps=steps, **changes),
        train_dataset=words(),
    )


class SetsTheRate(TrainerCallback):
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
    trainer = trainer_of(tmp_path, 12, kind, gradient_accumulation_steps=2)
    if with_callback:
        trainer.add_callback(hf_recipe.RecipeCallback())
    trainer.add_callback(SetsTheRate())
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
    trainer = trainer_of(tmp_path, 12)
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
    trainer = trainer_of(tmp_path, 40)
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
    trainer = trainer_of(tmp_path, 48)
    recipe = hf_recipe.attach(trainer, overhead=0.32)
    trainer.train()
    assert recipe.report.crashed == {}
    samples = recipe.examiner.latest["LayerSamples"].samples
    assert [sample.step for sample in samples] == [20, 32, 48]
