"""The assertions for users' own tests: each passes where it should, and says why where not."""

import pytest
import torch
from transformers import Trainer

from hf_recipe.testing import assert_finds, assert_healthy, assert_no_trace
from tests.models import arguments, bert, classifier, words


class Stale(Trainer):
    """Its optimizer holds the parameters of another model."""

    def create_optimizer(self, *args, **kwargs):
        self.optimizer = torch.optim.AdamW(bert().parameters(), lr=1e-3)
        return self.optimizer


def stale(folder):
    return Stale(model=bert(), args=arguments(folder), train_dataset=words())


def test_a_healthy_trainer_passes(tmp_path):
    assert assert_healthy(classifier(tmp_path), train=True).ran


def test_a_fault_is_told_with_its_fix(tmp_path):
    with pytest.raises(AssertionError, match=r"error\[parameter-unoptimized\].*fix: "):
        assert_healthy(stale(tmp_path))


def test_what_is_known_may_be_allowed(tmp_path):
    assert_healthy(stale(tmp_path), allow=["parameter-unoptimized"])


def test_a_fault_is_found_and_no_other(tmp_path):
    assert_finds(stale(tmp_path), "parameter-unoptimized")


def test_a_fault_that_is_not_there_is_missed_with_the_reason(tmp_path):
    with pytest.raises(AssertionError, match=r"parameter-unoptimized was not found \(it ran\)"):
        assert_finds(classifier(tmp_path), "parameter-unoptimized")
    with pytest.raises(ValueError, match="parameter-unoptimized"):
        assert_finds(classifier(tmp_path), "parameter-unoptimised")


def test_the_recipe_leaves_no_trace(tmp_path):
    assert_no_trace(lambda: classifier(tmp_path))


def test_two_runs_that_differ_are_told_apart_by_name(tmp_path):
    seeds = iter((3, 4))
    with pytest.raises(AssertionError, match="differs between the bare and the watched run"):
        assert_no_trace(lambda: classifier(tmp_path, seed=next(seeds)))
