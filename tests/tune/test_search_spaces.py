"""Which parameters a budget bears, and what is never tuned."""

import pytest

from hf_recipe.tune.search_spaces import NEVER, Known, plan_search
from hf_recipe.tune.space import quasi_random

FRESH = Known(1e-3, has=("dropout",))


def searched(trials, known=FRESH, **options):
    return set(plan_search(trials, known, **options).space)


def test_the_budget_decides_how_many_parameters_are_searched():
    assert searched(9) == {"learning_rate"}
    assert searched(10) == searched(24) == {"learning_rate", "adam_beta1"}
    more = searched(25)
    assert more == searched(24) | {"adam_epsilon", "weight_decay", "warmup_steps", "dropout"}
    assert searched(50) == more | {"adam_beta2", "label_smoothing_factor"}


def test_every_plan_is_a_space_that_can_be_drawn_from():
    for trials in (2, 10, 25, 50):
        plan = plan_search(trials, FRESH)
        points = quasi_random(plan.space, trials, 0)
        assert all(1e-4 <= point["learning_rate"] <= 1e-2 for point in points)
        roles = {name: role for name, role, _ in plan.table()}
        assert all(roles[name] == "fixed" for name in NEVER)


def test_the_arguments_at_hand_shape_the_space():
    rate = plan_search(4, Known(2e-5, pretrained=True)).space["learning_rate"]
    assert (rate["min"], rate["max"]) == (4e-6, 1e-4)
    assert searched(60, Known(0.1, optimizer="sgd")).isdisjoint(
        {"adam_beta1", "adam_beta2", "adam_epsilon"}
    )
    assert "warmup_steps" not in searched(60, Known(1e-3, schedule="constant"))
    assert "warmup_steps" in searched(60, Known(1e-3, schedule="constant_with_warmup"))
    given = Known(1e-3, given=("weight_decay", "learning_rate"))
    assert "weight_decay" not in searched(60, given)
    assert "learning_rate" in searched(60, given)
    assert "dropout" not in searched(60, Known(1e-3))


def test_what_is_asked_is_searched_whatever_the_budget():
    plan = plan_search(4, FRESH, scientific=["weight_decay"], space={"width": {"values": [1, 2]}})
    assert set(plan.space) == {"learning_rate", "weight_decay", "width"}
    roles = {name: role for name, role, _ in plan.table()}
    assert roles["weight_decay"] == "scientific"
    assert roles["learning_rate"] == "nuisance"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scientific": ["max_steps"]}, "not tuned for quality"),
        ({"space": {"per_device_train_batch_size": {"values": [8]}}}, "not tuned for quality"),
        ({"scientific": ["weight_decy"]}, "did you mean 'weight_decay'"),
        ({"scientific": ["zzz"]}, "give its range"),
    ],
)
def test_what_makes_no_sense_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        plan_search(16, FRESH, **options)
    with pytest.raises(ValueError, match="at least 2"):
        plan_search(1, FRESH)
