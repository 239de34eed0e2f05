"""Each gate on numbers that pass, that warn and that fail."""

import math

import pytest

from hf_recipe.instruments.compare import Gain
from hf_recipe.runner.gates import (
    baselines_gate,
    complexify_gate,
    data_gate,
    regularize_gate,
    tune_gate,
    wilson,
)

BETTER, WORSE, EITHER = Gain(0.1, 0.05, 0.15, 3), Gain(-0.1, -0.15, -0.05, 3), Gain(0, -0.1, 0.1, 3)
LOST = Gain(-math.inf, -math.inf, -math.inf, 3)


@pytest.mark.parametrize(
    ("errors", "warnings", "unanswered", "verdict"),
    [
        ([], [], [], "pass"),
        ([], ["split-drift"], [], "warn"),
        ([], [], ["how far?: crashed"], "warn"),
        (["split-leak"], ["split-drift"], [], "fail"),
    ],
)
def test_data(errors, warnings, unanswered, verdict):
    gate = data_gate(errors, warnings, ["how many?"], unanswered)
    assert gate.verdict == verdict
    assert any("1 question answered" in reason for reason in gate.reasons)


@pytest.mark.parametrize(
    ("one_batch", "blind", "simplest", "leak", "verdict"),
    [
        (True, BETTER, BETTER, False, "pass"),
        (True, BETTER, EITHER, False, "warn"),
        (True, BETTER, WORSE, False, "warn"),
        (None, BETTER, BETTER, False, "warn"),
        (False, BETTER, BETTER, False, "fail"),
        (True, WORSE, BETTER, False, "fail"),
        (True, LOST, BETTER, False, "fail"),
        (True, BETTER, BETTER, True, "fail"),
    ],
)
def test_baselines(one_batch, blind, simplest, leak, verdict):
    gate = baselines_gate(one_batch, "loss 2.3 -> 0.0", blind, simplest, leak)
    assert gate.verdict == verdict
    if verdict != "pass":
        assert gate.reasons[0].startswith(verdict)


@pytest.mark.parametrize(
    ("train", "validation", "verdict"),
    [
        (0.01, 0.2, "pass"),
        (0.19, 0.2, "warn"),
        (0.21, 0.2, "warn"),
        (0.3, 0.2, "fail"),
        (math.nan, 0.2, "fail"),
    ],
)
def test_complexify(train, validation, verdict):
    assert complexify_gate(train, 0.02, validation, 0.03).verdict == verdict


@pytest.mark.parametrize(
    ("gain", "after", "verdict"),
    [(BETTER, 0.1, "pass"), (BETTER, 0.3, "warn"), (EITHER, 0.1, "warn"), (WORSE, 0.1, "fail")],
)
def test_regularize(gain, after, verdict):
    assert regularize_gate(gain, 0.2, after).verdict == verdict


def test_what_is_undecided_says_what_could_have_been_told():
    gate = regularize_gate(Gain(0, 0, 0, 2), 0.2, 0.1, ("augmentation", Gain(0.02, -0.01, 0.05, 2)))
    assert gate.verdict == "warn"
    assert gate.reasons[0] == (
        "warn: nothing was kept; augmentation came closest: undecided, +0.0200 [-0.0100, +0.0500]; "
        "2 seeds on these rows tell gains from 0.0300 on (--seeds 4, or more validation rows)"
    )
    for gate in (
        baselines_gate(True, "", BETTER, EITHER),
        tune_gate(EITHER, 1.0, 6, 6),
        regularize_gate(EITHER, 0.2, 0.1),
    ):
        assert "beats the stage before" in tune_gate(EITHER, 0.0, 6, 6, adopted=False).reasons[0]
        assert "undecided, +0.0000 [-0.1000, +0.1000]; 3 seeds on these rows" in gate.reasons[0]


@pytest.mark.parametrize(
    ("gain", "improved", "feasible", "target", "reached", "verdict"),
    [
        (BETTER, 1.0, 6, None, None, "pass"),
        (BETTER, 0.5, 6, None, None, "warn"),
        (EITHER, 1.0, 6, None, None, "warn"),
        (BETTER, 1.0, 5, None, None, "warn"),
        (BETTER, 1.0, 0, None, None, "fail"),
        (BETTER, 1.0, 6, ("accuracy", 0.98), 0.981, "pass"),
        (BETTER, 1.0, 6, ("accuracy", 0.98), 0.979, "fail"),
        (BETTER, 1.0, 6, ("accuracy", 0.98), None, "fail"),
    ],
)
def test_tune(gain, improved, feasible, target, reached, verdict):
    assert tune_gate(gain, improved, feasible, 6, target, reached).verdict == verdict


def test_wilson_is_the_textbook_interval():
    assert wilson(90, 100) == pytest.approx((0.8256, 0.9448), abs=2e-4)
    assert wilson(10, 10)[1] == pytest.approx(1.0)
    assert wilson(0, 0) == (0.0, 1.0)
