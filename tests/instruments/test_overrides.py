import functools

import pytest
from torch.utils.data import DataLoader, WeightedRandomSampler
from transformers import Trainer

import hf_recipe
from hf_recipe.instruments.callables import place_of, undisturbed
from hf_recipe.instruments.overrides import (
    overrides,
    own_method,
    replaces,
    samples_its_own_way,
)
from tests.models import arguments, bert, words


class Extends(Trainer):
    def training_step(self, *args, **kwargs):
        return super().training_step(*args, **kwargs)


class Replaces(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        return model(**inputs).loss.detach()


def build(kind, folder):
    return kind(model=bert(), args=arguments(folder), train_dataset=words(16))


def test_extending_is_not_replacing(tmp_path):
    stock, more, other = (build(kind, tmp_path) for kind in (Trainer, Extends, Replaces))
    assert [replaces(t, "training_step") for t in (stock, more, other)] == [False, False, True]
    assert [overrides(t, "training_step") for t in (stock, more, other)] == [False, True, True]


def test_the_recorders_own_seams_are_seen_through(tmp_path):
    trainer = build(Trainer, tmp_path)
    recipe = hf_recipe.attach(trainer)
    assert "training_step" in vars(trainer)
    assert not replaces(trainer, "training_step")
    assert not overrides(trainer, "training_step")
    assert own_method(trainer, "training_step").__func__ is Trainer.training_step
    recipe.detach()


def test_methods_put_on_one_instance(tmp_path):
    trainer = build(Trainer, tmp_path)
    inner = trainer.compute_loss

    @functools.wraps(inner)
    def wrapped(*args, **kwargs):
        return inner(*args, **kwargs)

    trainer.compute_loss = wrapped
    assert overrides(trainer, "compute_loss")
    trainer.training_step = lambda model, inputs, count=None: model(**inputs).loss.detach()
    assert replaces(trainer, "training_step")


def test_a_function_is_left_as_it_was():
    history, seen = [1], {"a": 1}

    def remembering(value):
        history.append(value)
        seen["b"] = value
        remembering.calls = 5

    with undisturbed(remembering) as function:
        function(7)
        assert history == [1, 7]
    assert (history, seen) == ([1], {"a": 1})
    assert not hasattr(remembering, "calls")


def test_the_users_own_line_is_named():
    def broken():
        raise KeyError("x")

    with pytest.raises(KeyError) as raised:
        broken()
    line = broken.__code__.co_firstlineno + 1
    assert place_of(raised.value) == f"test_overrides.py:{line}"


class OwnSampler(Trainer):
    def _get_train_sampler(self, train_dataset=None):
        return WeightedRandomSampler([1.0, 9.0], 2)


class WeightedLoader(Trainer):
    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, sampler=WeightedRandomSampler([1.0, 9.0], 2))


class PlainLoader(Trainer):
    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, batch_size=4, shuffle=True)


class CopiedLoader(Trainer):
    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, sampler=self._get_train_sampler())


@pytest.mark.parametrize(
    ("kind", "own"),
    [(Trainer, False), (OwnSampler, True), (WeightedLoader, True), (PlainLoader, False),
     (CopiedLoader, False)],
)  # fmt: skip
def test_rows_drawn_by_a_sampler_of_ones_own(kind, own, tmp_path):
    trainer = build(kind, tmp_path)
    assert samples_its_own_way(trainer) is own
    hf_recipe.attach(trainer, select=["hockey-stick"])  # its seams hide nothing
    assert samples_its_own_way(trainer) is own
