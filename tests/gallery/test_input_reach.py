"""Inputs without influence: literal numbers, planted through real Trainers, and fixed twins."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Trainer

from hf_recipe.baselines.input_reach import InputInfluence, InputReach, without_influence
from tests.gallery.harness import Case, assert_found, assert_silent
from tests.gallery.test_leaks import masked
from tests.models import arguments, points


def reach(parameters=True, zeroed=False, tokens=0, idle=0, **changes):
    chosen = {"name": "x", "connected": True, "gradient": 0.0, "moves": False, **changes}
    return InputReach((InputInfluence(**chosen),), parameters, zeroed, tokens, idle)


@pytest.mark.parametrize(
    ("measured", "severities"),
    [
        (reach(gradient=0.1), []),
        (reach(), ["warning"]),
        (reach(connected=False), ["warning"]),
        (reach(connected=False, moves=True), ["note"]),
        (reach(moves=True), []),
        (reach(zeroed=True), []),
        (reach(parameters=False), []),
        (reach(gradient=0.1, tokens=20, idle=5), []),
        (reach(gradient=0.1, tokens=20, idle=18), [None]),
    ],
)
def test_judging_numbers(measured, severities):
    assert [f.severity for f in without_influence(measured)] == severities


class Two(nn.Module):
    """Takes two inputs; uses both, or one."""

    def __init__(self, faulty):
        super().__init__()
        self.faulty = faulty
        self.head = nn.Linear(8, 4)

    def forward(self, features=None, extra=None, labels=None):
        logits = self.head(features if self.faulty else features + extra)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def forgotten(folder, faulty):
    torch.manual_seed(0)
    data = points(64).map(lambda row: {"extra": [x * x for x in row["features"]]})
    return Trainer(model=Two(faulty), args=arguments(folder, max_steps=3), train_dataset=data)


CASES = [
    Case("input-without-gradient", forgotten, "warning", train=False, name="forgotten"),
    Case("input-without-gradient", masked("inverted"), "warning", train=False, name="mask-turned"),
]
for case in CASES:
    case.settings.setdefault("select", ["input-without-gradient"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fault_is_found(case, tmp_path):
    assert_found(case, tmp_path)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fixed_twin_is_silent(case, tmp_path):
    assert_silent(case, tmp_path)
