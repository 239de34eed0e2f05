"""Classes in another order, told from the answers: literal numbers and chance."""

import numpy as np
import pytest

from hf_recipe.tune.teacher_gain import TeacherGain, judge_gain
from hf_recipe.tune.teacher_spaces import (
    TeacherOrder,
    TeacherSpace,
    best_names,
    judge_order,
    judge_space,
    order_of,
)


def answers(order, accuracy, items=128, classes=4, seed=0):
    """Labels, and what a teacher says whose class `order[k]` is the labels' k."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, classes, items)
    said = np.where(draw.random(items) < accuracy, labels, draw.integers(0, classes, items))
    return labels, np.asarray(order)[said]


def fires(labels, said):
    return bool(list(judge_order(order_of(labels, said, "validation"))))


def test_names_are_chosen_one_to_one_and_stay_where_nothing_speaks_against_them():
    labels, said = np.array([0, 0, 1, 1, 2]), np.array([1, 1, 0, 0, 2])
    assert best_names(labels, said, 3).tolist() == [1, 0, 2, 3]
    assert best_names(labels, labels, 2).tolist() == [0, 1, 2]


def test_another_order_is_told_and_the_same_one_is_not():
    found = order_of(*answers([1, 2, 3, 0], 0.9), "validation")
    assert (found.first, found.name) == (0, 3)
    assert found.accuracy < 0.15
    assert found.renamed > 0.85
    (fault,) = judge_order(found)
    assert "its class 0 is what the labels call 3" in fault.message
    assert not fires(*answers([0, 1, 2, 3], 0.9))
    assert fires(*answers([1, 0, 2, 3], 0.95))  # two classes are swapped
    assert fires(*answers([1, 0], 0.9, classes=2))


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_who_knows_nothing_is_not_in_another_order(classes):
    """Guesses, one answer for all, and answers that lean on the labels a little."""
    alarms = 0
    for seed in range(60):
        draw = np.random.default_rng(seed)
        labels = np.where(draw.random(128) < 0.6, 0, draw.integers(0, classes, 128))
        guesses = draw.integers(0, classes, 128)
        alarms += fires(labels, guesses) + fires(labels, np.full(128, classes - 1))
        order = draw.permutation(classes)
        alarms += fires(labels, np.where(draw.random(128) < 0.2, order[labels], guesses))
    assert alarms == 0


def test_a_few_rows_prove_nothing():
    found = TeacherOrder(0.0, 1.0, 1.0, 0.0, 0.5, 0, 1, 4, "train")
    assert not list(judge_order(found))


def test_one_tokenizer_for_both_unless_the_sizes_are_padding():
    def read(ours, theirs):
        space = TeacherSpace(0, 3, 3, student_tokens=ours, teacher_tokens=theirs)
        return [f.severity for f in judge_space(space)]

    assert read(30_522, 50_265) == ["warning"]
    assert read(151_936, 152_064) == []
    assert read(30_522, 30_522) == read(None, 50_265) == []


def test_a_student_that_knows_as_much_is_undecided_on_a_few_rows():
    def told(gain, error, blind=0.9, loaded=True, rows=32):
        measured = TeacherGain(0.3, 0.3 + gain, gain, error, rows, "validation", blind, loaded)
        return bool(list(judge_gain(measured)))

    assert not told(0.02, 0.03)  # may be worth a fifth of the errors
    assert told(0.0, 0.005)  # is worth a thirtieth at most
    assert told(0.02, 0.03, loaded=False)  # no better than what was drawn at random
    assert not told(0.2, 0.03, loaded=False)
    assert told(0.2, 0.03, blind=0.34)  # better than a student that is worse than blind
