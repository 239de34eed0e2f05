"""Weight averaging: the arithmetic, BatchNorm, resume, and no trace in the run itself."""

import copy

import pytest
import torch
from transformers import Trainer, TrainerCallback

import hf_recipe
from hf_recipe.regularize.averaging import FILE, average_weights
from tests.models import arguments, batchnorm, points, signature


def trainer_of(folder, steps=24, **changes):
    options = {"eval_strategy": "steps", "eval_steps": 8, "learning_rate": 3e-2, **changes}
    return Trainer(
        model=batchnorm(),
        args=arguments(folder, max_steps=steps, **options),
        train_dataset=points(128),
        eval_dataset=points(200, seed=2),
    )


class Weights(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append([p.detach().clone() for p in model.parameters()])


def test_the_tail_is_the_mean_of_its_steps(tmp_path):
    trainer = trainer_of(tmp_path, steps=20)
    weights = Weights()
    trainer.add_callback(weights)
    averaging = average_weights(trainer, "tail", start=0.7)
    trainer.train()
    assert averaging.count == 6
    for place, mine in enumerate(averaging.averaged.module):
        mean = torch.stack([step[place] for step in weights.seen[14:]]).mean(0)
        torch.testing.assert_close(mine.data, mean)


def test_ema_follows_its_law(tmp_path):
    trainer = trainer_of(tmp_path, steps=12)
    weights = Weights()
    trainer.add_callback(weights)
    averaging = average_weights(trainer, "ema", decay=0.6)
    trainer.train()
    expected = weights.seen[0][0]  # the first one is copied
    for seen, step in enumerate(weights.seen[1:], start=1):
        share = min(0.6, (1 + seen) / (10 + seen))
        expected = expected * share + step[0] * (1 - share)
    torch.testing.assert_close(next(iter(averaging.averaged.module)).data, expected)


def test_the_run_itself_does_not_notice(tmp_path):
    plain = trainer_of(tmp_path / "a", eval_strategy="steps")
    plain.train()
    watched = trainer_of(tmp_path / "b", eval_strategy="steps")
    averaging = average_weights(watched)
    recipe = hf_recipe.attach(watched)
    watched.train()
    assert recipe.report.crashed == {}
    log = watched.state.log_history
    assert sum("averaged_eval_loss" in entry for entry in log) == 3
    watched.state.log_history = [e for e in log if "averaged_eval_loss" not in e]
    assert signature(plain) == signature(watched)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, watched.model.state_dict()[name]), name
    assert [step for step, _, _ in averaging.history] == [8, 16, 24]
    assert averaging.gain is not None


def test_it_helps_a_run_at_a_high_constant_rate(tmp_path):
    trainer = trainer_of(
        tmp_path, steps=160, eval_steps=160, learning_rate=0.1, lr_scheduler_type="constant"
    )
    averaging = average_weights(trainer, "ema", decay=0.95)
    trainer.train()
    print(f"averaged: {averaging.gain}, {averaging.history}")
    assert averaging.gain.verdict is True
    raw = trainer.evaluate()["eval_loss"]
    with averaging.weights():
        inside = trainer.evaluate()["eval_loss"]
    assert inside < raw
    assert trainer.evaluate()["eval_loss"] == raw
    averaging.apply()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(inside, abs=1e-5)


def test_batchnorm_is_measured_with_the_averaged_weights(tmp_path):
    trainer = trainer_of(tmp_path, steps=40, learning_rate=0.1, lr_scheduler_type="constant")
    averaging = average_weights(trainer, "ema", decay=0.9)
    trainer.train()
    before = copy.deepcopy(trainer.model.state_dict())
    rows = torch.tensor(trainer.train_dataset["features"])
    with averaging.weights() as model, torch.no_grad():
        norm, linear = model.body[1], model.body[0]
        torch.testing.assert_close(norm.running_mean, linear(rows).mean(0), rtol=0.01, atol=0.02)
        assert not torch.equal(norm.running_mean, before["body.1.running_mean"])
        assert norm.momentum == 0.1
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_average_survives_a_resume(tmp_path):
    straight = trainer_of(tmp_path / "a")
    whole = average_weights(straight, decay=0.9)
    straight.train()
    saved = {"save_strategy": "steps", "save_steps": 12}
    first = trainer_of(tmp_path / "b", **saved)
    average_weights(first, decay=0.9)
    first.train()
    assert (tmp_path / "b" / "checkpoint-12" / FILE).is_file()
    again = trainer_of(tmp_path / "b", **saved)
    taken_up = average_weights(again, decay=0.9)
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-12"))
    assert taken_up.count == whole.count == 24
    for a, b in zip(whole.averaged.module, taken_up.averaged.module, strict=True):
        torch.testing.assert_close(a, b)
    assert [step for step, _, _ in taken_up.history] == [8, 16, 24]


def test_bad_settings_and_nothing_averaged(tmp_path):
    trainer = trainer_of(tmp_path)
    with pytest.raises(ValueError, match="kind"):
        average_weights(trainer, "mean")
    with pytest.raises(ValueError, match="decay"):
        average_weights(trainer, decay=1.0)
    with pytest.raises(RuntimeError, match="nothing has been averaged"):
        average_weights(trainer).apply()
