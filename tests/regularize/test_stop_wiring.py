"""Stopping and choosing that cannot work as set, read off real Trainers before step 1."""

import pytest
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import hf_recipe
from hf_recipe.instruments.subject import Plan, Subject
from hf_recipe.regularize.early_stopping import EarlyStopping
from hf_recipe.regularize.stop_wiring import EARLY_STOP_MISWIRED, ChosenMetric, take


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
    assert found(tmp_path, [EarlyStopping()], sets=True, **STEPS) == set()  # it follows them all
    other = found(tmp_path, [EarlyStopping("c_loss")], sets=True, **STEPS)
    assert other == {("metric", "error")}


def test_what_a_function_will_report_is_not_known_and_so_silent(tmp_path):
    named = {**BEST, "metric_for_best_model": "accuracy"}
    assert found(tmp_path, [stock()], compute=lambda p: {"accuracy": 1.0}, **named) == set()

    class Own(Trainer):
        def evaluate(self, *args, **kwargs):
            return super().evaluate(*args, **kwargs)

    assert found(tmp_path, [stock()], base=Own, **named) == set()


@pytest.mark.parametrize("metric", ["eval_f1", "eval_loss", "eval_runtime"])
def test_a_metric_that_was_returned_may_choose(metric):
    assert not list(EARLY_STOP_MISWIRED.judge(ChosenMetric(metric, ("eval_f1",))))


def test_a_metric_that_was_not_returned_cannot_choose():
    (fault,) = EARLY_STOP_MISWIRED.judge(ChosenMetric("eval_f1", ("eval_accuracy", "eval_mcc")))
    assert "eval_f1" in fault.message
    assert "eval_accuracy, eval_mcc" in fault.message


class Scorer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)

    def forward(self, x, labels=None):
        logits = self.linear(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


class AddsF1(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_f1"] = 1.0


@pytest.mark.parametrize(
    ("metric", "callbacks", "faults"),
    [
        ("f1", (), 1),
        ("accuracy", (), 0),
        ("eval_accuracy", (), 0),
        ("loss", (), 0),
        ("f1", (AddsF1(),), 0),
        ("loss", (EarlyStopping("f1"),), 1),
        ("loss", (EarlyStopping(("accuracy", "f1")),), 1),
        ("loss", (EarlyStopping("accuracy"), hf_recipe.BestCheckpoints()), 0),
        ("loss", (hf_recipe.BestCheckpoints(metric="f1"),), 1),
    ],
)
def test_the_rehearsal_tells_a_missing_metric_before_step_1(tmp_path, metric, callbacks, faults):
    rows = Dataset.from_dict({"x": torch.randn(32, 3).tolist(), "labels": [0, 1] * 16})
    options = {**BEST, "metric_for_best_model": metric, "greater_is_better": metric != "loss"}
    trainer = Trainer(
        Scorer(),
        TrainingArguments(tmp_path, max_steps=10, report_to=[], use_cpu=True, **options),
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=list(callbacks),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == 0).mean())},
    )
    seen = hf_recipe.attach(trainer, select=["early-stop-miswired", "eval-crashes"]).preflight()
    assert [f.check for f in seen] == ["early-stop-miswired"] * faults


@pytest.mark.parametrize(
    ("callback", "turned"),
    [
        (EarlyStopping("accuracy", greater_is_better=False), "EarlyStopping takes the lowest"),
        (EarlyStopping(greater_is_better=True), "EarlyStopping takes the highest eval_loss"),
        (hf_recipe.BestCheckpoints(metric="wer", greater_is_better=True), "BestCheckpoints takes"),
        (EarlyStopping("wer"), None),
        (EarlyStopping("accuracy"), None),
        (EarlyStopping("my_score", greater_is_better=False), None),
    ],
)
def test_a_callbacks_own_direction_is_verified(tmp_path, callback, turned):
    rows = Dataset.from_dict({"x": torch.randn(8, 3).tolist(), "labels": [0, 1] * 4})
    args = TrainingArguments(tmp_path, max_steps=10, report_to=[], use_cpu=True, **STEPS)
    trainer = Trainer(Scorer(), args, train_dataset=rows, eval_dataset=rows, callbacks=[callback])
    seen = hf_recipe.attach(trainer, select=["metric-direction"]).preflight()
    assert len(seen) == (turned is not None)
    assert all(finding.message.startswith(turned) for finding in seen)
