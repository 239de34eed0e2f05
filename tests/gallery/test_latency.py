"""How soon a fault is named: a number that is none at its step, a lost course within a hundred."""

import math

import pytest
import torch
from transformers import Trainer, TrainerCallback

from tests.gallery.harness import run
from tests.models import arguments, bert, words


class Breaks(Trainer):
    """Its loss is no number at one training step, or in one evaluation batch."""

    at = evaluation = None
    evaluated = 0

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if self.is_in_train and model.training and self.state.global_step + 1 == self.at:
            loss = loss + math.nan
        if self.is_in_train and not model.training and self.state.global_step == self.evaluation:
            self.evaluated += 1
            if self.evaluated == 2:
                loss = loss * math.inf
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("at", [3, 38, 141])
def test_a_loss_that_is_no_number_is_named_at_its_step(at, tmp_path):
    trainer = Breaks(
        model=bert(),
        args=arguments(tmp_path, max_steps=at + 4),
        train_dataset=words(),
    )
    trainer.at = at
    report = run(trainer, select=["loss-not-finite"])
    (found,) = [f for f in report.findings if f.severity == "error"]
    assert (found.check, found.step, found.evidence["first_step"]) == ("loss-not-finite", at, at)


def test_an_evaluation_that_is_no_number_is_named_there(tmp_path):
    trainer = Breaks(
        model=bert(),
        args=arguments(tmp_path, max_steps=12, eval_strategy="steps", eval_steps=4),
        train_dataset=words(),
        eval_dataset=words(64, seed=2),
    )
    trainer.evaluation = 8
    report = run(trainer, select=["loss-not-finite"])
    (found,) = [f for f in report.findings if f.severity == "error"]
    assert (found.check, found.split, found.step) == ("loss-not-finite", "validation", 8)


class Heats(TrainerCallback):
    """From one step on the rate is ten thousand times what it was."""

    def __init__(self, at):
        self.at = at

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step >= self.at:
            for group in optimizer.param_groups:
                group["lr"] = 3.0


@pytest.mark.parametrize("at", [40, 150])
def test_a_lost_course_is_named_within_a_hundred_steps(at, tmp_path):
    torch.manual_seed(0)
    trainer = Trainer(
        model=bert(num_hidden_layers=1),
        args=arguments(tmp_path, max_steps=at + 110),
        train_dataset=words(512),
        callbacks=[Heats(at)],
    )
    report = run(trainer, select=["loss-diverged", "loss-spike", "loss-not-finite"])
    found = [f for f in report.flat if f.check in ("loss-diverged", "loss-not-finite")]
    assert found, [(f.check, f.message) for f in report.flat]
    assert at < min(f.step for f in found) <= at + 100
