"""Stopping and choosing that cannot work as set, read off real Trainers before step 1."""

import pytest
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from hf_recipe.instruments.subject import Plan, Subject
from hf_recipe.regularize.early_stopping import EarlyStopping
from hf_recipe.regularize.stop_wiring import EARLY_STOP_MISWIRED, take


def found(folder, callbacks=(), compute=None, sets=False, steps=100, base=Trainer, **options):
    """(subject, severity) of every fault, for a run of `steps` steps, 10 to the epoch."""
    rows = Dataset.from_dict({"x": [[0.0]] * 4, "labels": [0] * 4})
    arguments = TrainingArguments(folder, max_steps=steps, report_to=[], use_cpu=True, **options)
    trainer = base(
        torch.nn.Linear(1, 1),
        arguments,
        train_dataset=rows,
        eval_dataset={"a": rows, "b": rows} if sets else rows,
        callbacks=list(callbacks),
        compute_metrics=compute,
    )
    subject = Subject(trainer.model, arguments, None, {}, trainer, plan=Plan(steps, 10, 4))
    (setup,) = take(subject)
    assert type(setup).from_values(setup.values()) == setup
    faults = EARLY_STOP_MISWIRED.judge(setup)
    return {(f.subject, f.severity or EARLY_STOP_MISWIRED.severity) for f in faults}


STEPS = {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 5}
BEST = {**STEPS, "load_best_model_at_end": True}
EPOCH = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}


def stock(patience=3, threshold=0.0):
    return EarlyStoppingCallback(patience, threshold)


@pytest.mark.parametrize(
    ("callbacks", "options"),
    [
        ((), {}),
        ((), {**STEPS}),
        ((), BEST),
        ((), EPOCH),
        ((stock(),), BEST),
        ((stock(),), EPOCH),
        ((stock(),), {**BEST, "metric_for_best_model": "eval_loss"}),
        ((stock(),), {**BEST, "eval_steps": 0.05, "save_steps": 0.05}),
        ((EarlyStopping(),), {"eval_strategy": "epoch"}),
        ((EarlyStopping(),), {"eval_strategy": "steps", "eval_steps": 10, "save_strategy": "no"}),
        ((), {**STEPS, "save_strategy": "best", "load_best_model_at_end": True}),
        ((), {"eval_strategy": "steps", "eval_steps": 500}),
    ],
)
def test_usual_setups_are_silent(tmp_path, callbacks, options):
    assert found(tmp_path, callbacks, **options) == set()


@pytest.mark.parametrize(
    ("callbacks", "options", "expected"),
    [
        ((stock(),), {**BEST, "metric_for_best_model": "accuracy"}, ("metric", "error")),
        ((stock(),), {**BEST, "metric_for_best_model": "train_loss"}, ("metric", "error")),
        ((stock(),), STEPS, ("metric", "error")),
        ((stock(),), {"metric_for_best_model": "loss"}, ("evaluation", "error")),
        ((EarlyStopping(),), {}, ("evaluation", "error")),
        ((EarlyStopping("f1"),), {"eval_strategy": "epoch"}, ("metric", "error")),
        ((), {"save_strategy": "no", "load_best_model_at_end": True}, ("evaluation", "error")),
        ((), {**BEST, "save_steps": 500}, ("save_steps", "error")),
        ((), {**BEST, "save_steps": 10}, ("save_steps", "warning")),
        ((stock(threshold=0.05),), BEST, ("threshold", "warning")),
        ((stock(30),), BEST, ("patience", "warning")),
        ((stock(1),), BEST, ("patience", "note")),
    ],
)
def test_faults(tmp_path, callbacks, options, expected):
    assert found(tmp_path, callbacks, **options) == {expected}


def test_several_sets_report_under_their_names(tmp_path):
    assert found(tmp_path, [stock()], sets=True, **BEST) == {("metric", "error")}
    named = {**BEST, "metric_for_best_model": "eval_a_loss"}
    assert found(tmp_path, [stock()], sets=True, **named) == set()


def test_what_a_function_will_report_is_not_known_and_so_silent(tmp_path):
    named = {**BEST, "metric_for_best_model": "accuracy"}
    assert found(tmp_path, [stock()], compute=lambda p: {"accuracy": 1.0}, **named) == set()

    class Own(Trainer):
        def evaluate(self, *args, **kwargs):
            return super().evaluate(*args, **kwargs)

    assert found(tmp_path, [stock()], base=Own, **named) == set()
