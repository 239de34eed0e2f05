from types import SimpleNamespace

import pytest
from transformers import TrainerCallback

from hf_recipe.baselines.rehearsal import EvaluationRehearsal
from hf_recipe.baselines.wiring import (
    EVAL_NEVER_RUNS,
    METRICS_NEVER_COMPUTED,
    EvaluationPlan,
    MetricWiring,
    _asks_for_evaluation,
    _first_evaluation,
)
from hf_recipe.instruments.subject import Plan


def wiring(**changes):
    healthy = {
        "label_names": ("labels",),
        "batch_keys": ("input_ids", "labels"),
        "candidates": ("labels",),
        "computes_metrics": True,
        "loss_only": False,
        "returns_loss": False,
        "scheduled": True,
    }
    return MetricWiring(**{**healthy, **changes})


def metric_faults(measurement):
    return list(METRICS_NEVER_COMPUTED.judge(measurement))


@pytest.mark.parametrize(
    "healthy",
    [
        wiring(),
        wiring(label_names=(), returns_loss=True),  # CLIP
        wiring(batch_keys=("input_ids",), computes_metrics=False, scheduled=False),
        wiring(loss_only=True, computes_metrics=False),
        wiring(
            label_names=("start_positions", "end_positions"),
            batch_keys=("input_ids", "start_positions", "end_positions"),
        ),
    ],
)
def test_labels_that_are_found_are_silent(healthy):
    assert metric_faults(healthy) == []


def test_labels_under_another_name_are_proposed():
    (fault,) = metric_faults(
        wiring(label_names=(), batch_keys=("input_ids", "targets"), candidates=("targets",))
    )
    assert fault.fix == 'TrainingArguments(..., label_names=["targets"])'
    assert "compute_metrics and eval_loss" in fault.message


def test_one_label_too_many_in_the_forward_is_left_out():
    (fault,) = metric_faults(wiring(label_names=("labels", "next_sentence_label")))
    assert fault.fix == 'TrainingArguments(..., label_names=["labels"])'


def test_metrics_that_prediction_loss_only_forbids():
    (fault,) = metric_faults(wiring(loss_only=True))
    assert "prediction_loss_only=False" in fault.fix


def test_a_prediction_step_of_ones_own_must_return_labels():
    rehearsal = EvaluationRehearsal(
        rows=7, total_rows=50, labels=False, computes_metrics=True, stock_step=False
    )
    (fault,) = metric_faults(rehearsal)
    assert "no labels" in fault.message
    stock = EvaluationRehearsal(rows=7, total_rows=50, labels=False, computes_metrics=True)
    assert metric_faults(stock) == []  # the static look has said so already


def plan(**changes):
    healthy = {
        "strategy": "steps",
        "first": 10,
        "total_steps": 100,
        "on_start": False,
        "needed_by": (),
        "asked_by_callback": False,
    }
    return EvaluationPlan(**{**healthy, **changes})


@pytest.mark.parametrize(
    ("measured", "severity"),
    [
        (plan(strategy="no", first=None), "note"),
        (plan(strategy="no", first=None, needed_by=("load_best_model_at_end",)), "warning"),
        (plan(first=101), "warning"),
        (plan(first=None), "warning"),
        (plan(strategy="epoch", first=None), "warning"),
    ],
)
def test_an_evaluation_out_of_reach(measured, severity):
    (fault,) = EVAL_NEVER_RUNS.judge(measured)
    assert fault.severity == severity


@pytest.mark.parametrize(
    "measured",
    [
        plan(),
        plan(first=100),
        plan(strategy="epoch", first=50),
        plan(strategy="no", first=None, asked_by_callback=True),
    ],
)
def test_an_evaluation_in_reach_is_silent(measured):
    assert list(EVAL_NEVER_RUNS.judge(measured)) == []


@pytest.mark.parametrize(
    ("strategy", "settings", "first"),
    [
        ("steps", {"eval_steps": 10}, 10),
        ("steps", {"eval_steps": 0.1}, 6),
        ("steps", {"eval_steps": 500}, 61),  # the Trainer adds one at the very end
        ("steps", {"eval_steps": 10, "eval_delay": 25}, 30),
        ("steps", {"eval_steps": 10, "eval_delay": 100}, None),
        ("epoch", {}, 20),
        ("epoch", {"eval_delay": 2}, 40),
        ("epoch", {"eval_delay": 9}, None),
        ("no", {}, None),
    ],
)
def test_the_first_evaluation(strategy, settings, first):
    args = SimpleNamespace(
        **{"eval_delay": 0, "eval_steps": None, "logging_steps": 500, **settings}
    )
    assert _first_evaluation(args, Plan(60, 20, 8), strategy) == first


def test_an_epoch_cut_short_is_evaluated():
    args = SimpleNamespace(eval_delay=0)
    assert _first_evaluation(args, Plan(12, 20, 8), "epoch") == 12


def test_a_callback_that_asks_for_evaluations():
    class Asking(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_evaluate = state.global_step % 7 == 0

    class Quiet(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = True

    assert _asks_for_evaluation(Asking())
    assert not _asks_for_evaluation(Quiet())
