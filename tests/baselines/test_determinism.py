"""Two short runs from one seed: equal, or the first tensor that differs, and nothing left."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import Trainer

import hf_recipe
from hf_recipe.baselines.determinism import Determinism, answer, compared
from tests.models import BatchNormMLP, NormConfig, arguments, batchnorm, bert, points, words

COUNTER = itertools.count(1)


def test_the_first_difference_is_named_by_step_phase_and_tensor():
    one = {"batch": {"x": "a"}, "loss": {"loss": "b"}, "gradient": {"w": "c", "v": "d"}}
    two = {**one, "gradient": {"w": "c", "v": "e"}}
    assert compared([one, one], [one, one]).equal
    found = compared([one, one], [one, two])
    assert (found.first_step, found.phase, found.names) == (2, "gradient", ("v",))
    assert "step 2 of 2 on the gradient differs (v)" in answer(found).answer
    assert compared([one], [{**one, "batch": {}}]).phase == "batch"
    assert "not tried: no rows" in answer("no rows").answer


class Drifting(BatchNormMLP):
    """Something that no seed sets: in the forward pass, in a gradient or in a buffer."""

    where = ""

    def forward(self, features=None, labels=None):
        if self.where == "loss":
            features = features * (1 + next(COUNTER) * 1e-3)
        made = super().forward(features, labels)
        if self.where == "gradient" and made.logits.requires_grad:
            made.logits.register_hook(lambda g: g)
            made.loss.register_hook(lambda g: g * (1 + next(COUNTER) * 1e-3))
        if self.where == "buffer":
            self.seen.fill_(next(COUNTER))
        return made


def trainer_of(folder, where="", data=None):
    torch.manual_seed(0)
    model = Drifting(NormConfig(num_labels=4))
    model.where = where
    model.register_buffer("seen", torch.zeros(1))
    args = arguments(folder, max_steps=8, warmup_steps=4)
    return Trainer(model=model, args=args, train_dataset=data if data is not None else points(64))


class Unseeded(torch.utils.data.Dataset):
    def __init__(self):
        self.rows = points(64)

    def __len__(self):
        return 64

    def __getitem__(self, index):
        row = self.rows[index]
        features = torch.tensor(row["features"]) + next(COUNTER) * 1e-3
        return {"features": features, "labels": row["labels"]}


@pytest.mark.parametrize("where", ["loss", "gradient", "buffer", "batch"])
def test_a_run_that_cannot_be_repeated_says_where(where, tmp_path):
    trainer = trainer_of(tmp_path, where, Unseeded() if where == "batch" else None)
    recipe = hf_recipe.attach(trainer)
    found = recipe.check_determinism(steps=2)
    assert not found.equal
    assert (found.first_step, found.phase) == (1, where)
    assert any(a.answer.startswith("no: from step 1") for a in recipe.report.answers)
    recipe.detach()


@pytest.mark.parametrize("kind", ["dropout", "batchnorm"])
def test_a_run_that_can_be_repeated_and_is_left_as_it_was(kind, tmp_path):
    def made(folder):
        model, data = (bert(), words) if kind == "dropout" else (batchnorm(), points)
        return Trainer(model=model, args=arguments(folder, max_steps=4), train_dataset=data(64))

    trainer = made(tmp_path / "asked")
    before = {n: v.clone() for n, v in trainer.model.state_dict().items()}
    random_state = torch.get_rng_state()
    recipe = hf_recipe.attach(trainer)
    found = recipe.check_determinism()
    assert found.equal, (found.first_step, found.phase, found.names)
    assert found.losses[0] == found.losses[1]
    assert len(set(found.losses[0])) == found.steps == 3  # batches differ, weights move
    after = trainer.model.state_dict()
    assert all(torch.equal(after[n], v) for n, v in before.items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert trainer.optimizer is None
    assert any(a.answer.startswith("yes: 3 steps") for a in recipe.report.answers)
    recipe.detach()


def test_a_stream_cannot_be_tried(tmp_path):
    trainer = Trainer(
        model=bert(), args=arguments(tmp_path), train_dataset=words(32).to_iterable_dataset()
    )
    recipe = hf_recipe.attach(trainer)
    assert recipe.check_determinism() is None
    assert any("stream" in a.answer for a in recipe.report.answers)
    with pytest.raises(ValueError, match="steps=0"):
        recipe.check_determinism(steps=0)
    recipe.detach()


def test_the_numbers_survive_the_report():
    found = Determinism(2, 8, 10, 1, "loss", ("loss",), 1, ((1.0, 2.0), (1.5, 2.0)))
    assert Determinism.from_values(found.values()) == found
