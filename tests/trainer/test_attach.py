"""The handle: seams come and go, rows and losses are what they are, nothing breaks the run."""

import json
import math

import pytest
import torch
from transformers import Trainer, TrainerCallback

import hf_recipe
from hf_recipe.trainer.seams import SEAMS
from tests.models import arguments, batchnorm, bert, classifier, llama, points, progressions, words


class Sees(TrainerCallback):
    """What the run really did, from the outside."""

    def __init__(self):
        self.rates = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])


def test_detach_leaves_nothing(tmp_path):
    trainer = classifier(tmp_path)
    before = dict(vars(trainer))
    callbacks = list(trainer.callback_handler.callbacks)
    recipe = hf_recipe.attach(trainer)
    assert set(SEAMS) <= set(vars(trainer))
    recipe.preflight()
    recipe.detach()
    recipe.detach()
    assert set(vars(trainer)) == set(before)
    assert {k: v for k, v in vars(trainer).items() if v is not before[k]} == {}
    assert trainer.callback_handler.callbacks == callbacks


def test_detach_keeps_a_seam_that_was_there_before(tmp_path):
    trainer = classifier(tmp_path)
    calls = []
    inner = trainer.training_step

    def mine(*args, **kwargs):
        calls.append(1)
        return inner(*args, **kwargs)

    trainer.training_step = mine
    hf_recipe.attach(trainer).detach()
    assert trainer.training_step is mine
    trainer.train()
    assert len(calls) == 20


def test_attaching_twice_watches_once(tmp_path):
    trainer = classifier(tmp_path)
    first = hf_recipe.attach(trainer)
    second = hf_recipe.attach(trainer)
    trainer.train()
    assert first.detached
    assert not second.detached
    assert len(second.recorder.curves["loss"].y) == 20
    assert (
        sum(isinstance(c, hf_recipe.RecipeCallback) for c in trainer.callback_handler.callbacks)
        == 1
    )


def test_only_a_trainer_can_be_attached_to():
    with pytest.raises(TypeError, match="got BertForSequenceClassification"):
        hf_recipe.attach(bert())


def test_every_step_is_recorded_as_the_trainer_logs_it(tmp_path):
    trainer = classifier(tmp_path, logging_steps=1, gradient_accumulation_steps=2, max_steps=9)
    sees = Sees()
    trainer.add_callback(sees)
    recipe = hf_recipe.attach(trainer)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    curves = recipe.recorder.curves
    assert curves["loss"].x == list(range(1, 10))
    assert curves["loss"].y == pytest.approx([entry["loss"] for entry in logged], rel=1e-4)
    assert curves["gradient norm"].y == pytest.approx(
        [entry["grad_norm"] for entry in logged], rel=1e-4
    )
    assert curves["learning rate"].y == pytest.approx(sees.rates)


def test_rows_are_those_of_the_batch(tmp_path):
    trainer = Trainer(
        model=batchnorm(), args=arguments(tmp_path, max_steps=40), train_dataset=points(100)
    )
    recipe = hf_recipe.attach(trainer)
    data = torch.tensor(trainer.train_dataset["features"])
    inner, inputs_seen = trainer.training_step, []

    def looks(model, inputs, *args, **kwargs):
        inputs_seen.append(inputs["features"].clone())
        return inner(model, inputs, *args, **kwargs)

    trainer.training_step = looks
    rows = []
    fold = recipe.watch.fold
    recipe.watch.fold = lambda window, step, **how: (
        rows.extend(s.rows for s in window.steps),
        fold(window, step, **how),
    )
    trainer.train()
    assert len(rows) == len(inputs_seen) == 40
    for chosen, features in zip(rows, inputs_seen, strict=True):
        assert torch.allclose(data[list(chosen)], features)


@pytest.mark.parametrize("kind", ["bert", "llama", "batchnorm"])
def test_evaluation_rows_average_to_the_evaluation_loss(kind, tmp_path):
    model, data = {
        "bert": (bert, words),
        "llama": (llama, progressions),
        "batchnorm": (batchnorm, points),
    }[kind]
    trainer = Trainer(
        model=model(), args=arguments(tmp_path), train_dataset=data(), eval_dataset=data(50, seed=2)
    )
    recipe = hf_recipe.attach(trainer)
    seen = []
    fold = recipe.watch.fold
    recipe.watch.fold = lambda window, step, **how: (
        seen.append(window),
        fold(window, step, **how),
    )
    loss = trainer.evaluate()["eval_loss"]
    evaluation = next(w.evaluation for w in seen if w.evaluation is not None)
    assert evaluation.split == "validation"
    assert len(evaluation.row_losses) == 50
    weights = [16, 16, 16, 2]
    batches = evaluation.batch_losses
    mean = sum(b * w for b, w in zip(batches, weights, strict=True)) / 50
    assert sum(evaluation.row_losses) / 50 == pytest.approx(mean, rel=1e-3)
    assert math.isfinite(loss)


def test_named_evaluation_sets_keep_their_names(tmp_path):
    trainer = Trainer(
        model=batchnorm(),
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=10),
        train_dataset=points(),
        eval_dataset={"near": points(20, seed=2), "far": points(30, seed=3)},
    )
    recipe = hf_recipe.attach(trainer)
    trainer.train()
    assert set(recipe.closing.evaluations) == {"near", "far"}
    assert recipe.closing.evaluations["far"].x == [10, 20]


def test_an_error_of_ours_never_stops_the_training(tmp_path, monkeypatch, caplog):
    trainer = classifier(tmp_path)
    recipe = hf_recipe.attach(trainer)

    def breaks(*args, **kwargs):
        raise KeyError("planted")

    monkeypatch.setattr(recipe.recorder, "flush", breaks)
    trainer.train()
    assert trainer.state.global_step == 20
    assert "KeyError" in recipe.report.crashed["recipe (step_end)"]


def test_pause_and_resume(tmp_path):
    trainer = classifier(tmp_path)
    recipe = hf_recipe.attach(trainer)

    hooks = []

    class Pauses(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                recipe.pause()
            if state.global_step == 15:
                recipe.resume()
            hooks.append(len(trainer.model._forward_hooks))

    trainer.add_callback(Pauses())
    trainer.train()
    # that of the labels' margins, and at sampled steps those of activations
    assert min(hooks[:5]) == min(hooks[15:]) == 1
    assert hooks[5:15] == [0] * 10
    assert not trainer.model._forward_hooks
    assert recipe.report.crashed == {}
    steps = recipe.recorder.curves["loss"].x
    assert steps[:5] == [1, 2, 3, 4, 5] or steps[:4] == [1, 2, 3, 4]
    assert not set(range(7, 15)) & {int(s) for s in steps}
    assert steps[-1] == 20


def test_what_probes_share_is_let_go_before_step_1(tmp_path):
    trainer = classifier(tmp_path)
    recipe = hf_recipe.attach(trainer)
    held = []

    class Looks(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            held.append(set(recipe.album.subject.cache))

    trainer.add_callback(Looks())
    trainer.train()
    assert held == [set()] * 20


def test_training_twice_goes_on_and_is_not_fresh(tmp_path):
    trainer = classifier(tmp_path)
    recipe = hf_recipe.attach(trainer)
    trainer.train()
    trainer.train()
    assert recipe.report.crashed == {}
    assert recipe._is_moved(trainer.model)


def test_our_state_survives_a_checkpoint(tmp_path):
    trainer = classifier(tmp_path, save_strategy="steps", save_steps=10)
    recipe = hf_recipe.attach(trainer)
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text())
    assert set(state["stateful_callbacks"]["hf_recipe"]) == {
        "monitors",
        "findings",
        "saved",
        "margins",
    }
    for restore in (False, True):
        again = classifier(
            tmp_path,
            save_strategy="steps",
            save_steps=10,
            restore_callback_states_from_checkpoint=restore,
        )
        resumed = hf_recipe.attach(again)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
        assert resumed.report.crashed == {}
        assert resumed.recorder.curves["loss"].x[0] == 11
        assert resumed.leader() in again.callback_handler.callbacks
        recipe = resumed
    assert recipe.report.status == "finished"


def test_an_exception_in_training_leaves_a_readable_report(tmp_path):
    trainer = classifier(tmp_path)
    recipe = hf_recipe.attach(trainer)
    recipe.preflight()

    class Breaks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("the user's own")

    trainer.add_callback(Breaks())
    with pytest.raises(RuntimeError, match="the user's own"):
        trainer.train()
    report = hf_recipe.Report.from_json(tmp_path / "recipe" / "report.json")
    assert report.status == "running"
    trainer.pop_callback(Breaks)
    trainer.train()
    assert recipe.report.status == "finished"


def test_several_callbacks_share_one_engine(tmp_path):
    callbacks = [hf_recipe.InitialLossCallback(), hf_recipe.LRDecayCallback()]
    trainer = Trainer(
        model=bert(), args=arguments(tmp_path), train_dataset=words(), callbacks=callbacks
    )
    trainer.add_callback(hf_recipe.HockeyStickCallback())
    trainer.train()
    reports = {id(c.report) for c in callbacks}
    assert len(reports) == 1
    assert callbacks[0].report.crashed == {}


def test_attach_takes_over_from_callbacks(tmp_path, capsys):
    callback = hf_recipe.RecipeCallback()
    trainer = Trainer(
        model=bert(), args=arguments(tmp_path), train_dataset=words(), callbacks=[callback]
    )
    recipe = hf_recipe.attach(trainer)
    trainer.train()
    assert callback.report is recipe.report
    assert len(recipe.recorder.curves["loss"].y) == 20


def test_one_batch_is_overfitted_and_every_weight_put_back(tmp_path):
    trainer = classifier(tmp_path)
    recipe = hf_recipe.attach(trainer)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    state = torch.get_rng_state()
    one = recipe.overfit_one_batch()
    assert one.reached
    assert one.end < one.start / 10
    assert all(torch.equal(before[n], p) for n, p in trainer.model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.optimizer is None
    assert "one-batch-not-overfit" in recipe.report.ran
    assert recipe.findings == [] or {f.severity for f in recipe.findings} == {"note"}
