"""The fixed functions take numbers as people have them, and refuse what is none in a sentence."""

import math

import numpy as np
import pytest
import torch

from hf_recipe.baselines.initial_loss import expected_initial_loss
from hf_recipe.complexify import loss_law
from hf_recipe.complexify.schedule import judge_schedule
from hf_recipe.data.suspects import confident_learning, margin_scores
from hf_recipe.instruments.numbers import number_of, numbers_of, whole_of
from hf_recipe.regularize import learning_curve
from hf_recipe.regularize.early_stopping import StoppingRule
from hf_recipe.tune.analysis import analyse
from hf_recipe.tune.distillation_loss import chunked_divergence
from hf_recipe.tune.space import quasi_random

RATE = {"learning_rate": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-2}}


def short(values):
    """Numbers that bfloat16 holds exactly."""
    return torch.tensor(values).bfloat16().double().numpy()


DRAW = np.random.default_rng(0)
LOGITS, CLASSES = short(DRAW.normal(size=(60, 5))), DRAW.integers(0, 5, 60)
SHARES = short(np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True))
RATES = short(np.where(np.arange(200) < 160, 1.0, (200 - np.arange(200)) / 40))
STEPS = np.arange(10, 200, 5)
LOSSES = short(2 + (1 + STEPS) ** -0.5 - 0.1 * (1 - RATES[STEPS]))
SIZES, HELD_OUT = np.array([100, 200, 400, 800]), short([1.0, 0.8, 0.65, 0.55])


def law(rates, steps, losses):
    return loss_law.fit([(rates, steps, losses)]).predict(rates)[[0, -1]]


def stopped(values):
    rule = StoppingRule()
    return [rule.update(value, standard_error=value, schedule_fraction=value) for value in values]


def study(values, curve):
    trials = [
        {"params": params, "value": value, "curve": curve, "seed": value}
        for params, value in zip(quasi_random(RATE, 8, 0), values, strict=True)
    ]
    report = analyse(trials, RATE, "loss", False)
    return [report.answers[0].answer, *(finding.check for finding in report.findings)]


ASKED = {
    "expected_initial_loss": (expected_initial_loss, LOGITS, CLASSES),
    "judge_schedule": (lambda r: [f.check for f in judge_schedule(r, 10)], RATES[:150]),
    "loss_law": (law, RATES, STEPS, LOSSES),
    "learning_curve": (lambda n, y: learning_curve.fit(n, y).predict(1600), SIZES, HELD_OUT),
    "StoppingRule": (stopped, HELD_OUT),
    "confident_learning": (confident_learning, SHARES, CLASSES),
    "margin_scores": (margin_scores, LOGITS.T, CLASSES),
    "analyse": (study, short(np.linspace(1, 2, 8)), short(np.linspace(3, 1, 10))),
    "chunked_divergence": (
        lambda h, labels: [chunked_divergence(h, h, h, h, labels).item()],
        LOGITS,
        CLASSES,
    ),
}
DIALECTS = {
    "lists": lambda values: values.tolist(),
    "float64 tensors": torch.tensor,
    "tensors in a graph": lambda values: (
        torch.tensor(values, requires_grad=True) if values.dtype.kind == "f" else values
    ),
    "bfloat16": lambda values: (
        torch.tensor(values).bfloat16() if values.dtype.kind == "f" else torch.tensor(values)
    ),
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", ASKED)
def test_the_same_numbers_in_any_dialect_give_the_same_answer(name, dialect):
    function, *given = ASKED[name]
    expected, found = (list(function(*map(say, given))) for say in (np.copy, DIALECTS[dialect]))
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == theirs or mine == pytest.approx(theirs, rel=1e-9, abs=1e-9)


def test_iterators_and_lists_of_tensors_are_numbers_too():
    expected = numbers_of([1.0, 2.0], "x")
    for given in (iter([1, 2]), [torch.tensor(1.0, requires_grad=True), torch.tensor(2)], (1, 2)):
        assert numbers_of(given, "x").tolist() == expected.tolist()
    assert number_of(torch.tensor([2.5]), "x") == number_of(np.float32(2.5), "x") == 2.5
    assert [whole_of(n, "n") for n in (3, 3.0, np.int64(3), torch.tensor(3))] == [3] * 4
    assert whole_of(2**70, "seed") == 2**70


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: numbers_of(["a"], "rates"), "rates must be numbers"),
        (lambda: numbers_of([[1, 2], [3]], "rates"), "rates must be numbers"),
        (lambda: numbers_of([[1, 2]], "rates", axes=1), "a flat list of numbers; got shape"),
        (lambda: number_of([1, 2], "value"), "value must be one number"),
        (lambda: number_of(None, "value"), "value must be one number; got None"),
        (lambda: whole_of(2.5, "n"), "n must be a whole number"),
        (lambda: whole_of(-1, "n"), "n must be a whole number"),
        (lambda: whole_of("3", "n"), "n must be a whole number"),
        (lambda: judge_schedule([[1e-3, 0.0]], 10), "learning_rates must be a flat list"),
        (lambda: judge_schedule([1e-3], math.nan), "steps_per_epoch must be finite"),
        (lambda: judge_schedule([1e-3], 1, continuation=[math.inf]), "continuation must be"),
        (lambda: loss_law.fit([(RATES, STEPS)]), "run 0 must be"),
        (lambda: loss_law.fit((RATES, STEPS, LOSSES)), "run 0 must be"),
        (lambda: StoppingRule().update("good"), "value must be numbers"),
        (lambda: learning_curve.fit(SIZES, HELD_OUT).predict([1, 2]), "size must be one number"),
        (lambda: confident_learning(SHARES, ["a"] * 60), "labels must be numbers"),
        (lambda: margin_scores(LOGITS[0]), "numbers along 2 axes"),
        (lambda: quasi_random(RATE, 2, -1), "seed must be a whole number"),
        (lambda: expected_initial_loss(LOGITS, CLASSES, groups=[1, 2]), "do not fit 60 rows"),
        (lambda: expected_initial_loss(LOGITS, CLASSES, problem_type="binary"), "one of single"),
        (lambda: expected_initial_loss(LOGITS, LOGITS[:, :4]), "do not fit logits"),
    ],
)
def test_what_is_no_number_is_named(ask, words):
    with pytest.raises(ValueError, match=words) as caught:
        ask()
    assert len(str(caught.value)) < 200


def test_rates_past_the_end_may_be_negative():
    line = [1 - step / 100 for step in range(150)]  # nobody told it to stop at 0
    assert judge_schedule(line[:100], 10, continuation=line[100:]) == []
    assert judge_schedule([1.0] * 50, 0) == []


@pytest.mark.parametrize("losses", [np.zeros(38), np.full(38, 2.0)])
def test_losses_that_stand_still_are_predicted_to_stand(losses):
    assert law(RATES, STEPS, losses) == pytest.approx(losses[:2], abs=1e-6)
