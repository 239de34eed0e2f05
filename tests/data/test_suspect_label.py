"""Suspect labels: the verdict on literal numbers, on planted noise, and on hard but clean data."""

from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, make_classification, make_moons

import hf_recipe
from hf_recipe.data.suspect_label import (
    SUSPECT_LABEL,
    LabelSuspects,
    estimated_rate,
    overlap_mistakes,
    rank,
    weigh,
)
from hf_recipe.data.suspects import by_confusion
from hf_recipe.instruments.margins import MarginWatch
from tests.data.worlds import classified

NOISY = LabelSuspects(
    column="label",
    witness="training run",
    rows=1797,
    classes=10,
    unlearnt=0,
    contradicted=0.13,
    sure=359,
    sure_contradicted=105,
    sure_expected=2.0,
    rate=0.12,
    suspects=246,
    worst=(7, 3, 9),
)


def judged(seen):
    return list(SUSPECT_LABEL.judge(seen))


def test_the_verdict_on_literal_numbers():
    fault = judged(NOISY)[0]
    assert fault.severity is None
    assert fault.examples == (7, 3, 9)
    assert "12%" in fault.message
    assert "105 of the 359" in fault.message
    assert not judged(replace(NOISY, sure_contradicted=8, contradicted=0.146, sure_expected=2.8))
    assert not judged(replace(NOISY, contradicted=0.45, sure_expected=90.0))
    assert not judged(replace(NOISY, rows=100))
    few = replace(
        NOISY, sure=62, sure_contradicted=11, sure_expected=0.7, sure_pairs=(5, 2, 2, 1, 1)
    )
    assert not judged(few)  # 9 for 1, and 1 for 2: clean digits, early
    assert judged(replace(few, sure_pairs=(1,) * 11))  # as many pairs as rows
    assert judged(replace(few, classes=3))  # three classes have no pairs to tell by
    assert judged(replace(NOISY, sure_pairs=(53, 52)))  # two classes for each other, by far
    many = replace(NOISY, rows=50_000, sure=10_000, sure_contradicted=500)
    assert judged(replace(many, sure_pairs=(50,) * 10))  # each class for its neighbour
    assert not judged(replace(many, sure_pairs=(450, 50)))
    assert not judged(replace(NOISY, contradicted=float("nan")))
    assert judged(replace(NOISY, rate=0.37))[0].severity == "note"
    again = LabelSuspects.from_values(NOISY.values())
    assert again == NOISY


def test_overlapping_bells_by_simulation():
    draw = np.random.default_rng(0)
    for distance in (1.0, 1.5, 2.5):
        truth = draw.integers(0, 2, 400_000)
        x = draw.normal(size=400_000) + distance * (truth - 0.5)
        wrong = (x > 0) != truth
        surest = np.argsort(-np.abs(x))[:80_000]
        assert overlap_mistakes(wrong.mean()) == pytest.approx(wrong[surest].mean(), abs=0.003)
    assert overlap_mistakes(0.0) < 1e-6
    assert estimated_rate(np.array([-3.0, 3.0, 3.0, 3.0, -0.1])) == 0.25
    assert estimated_rate(np.array([-1.0])) == 0.0


def test_classes_that_are_not_learnt_and_priors_are_no_evidence():
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    margins = np.where(labels == 2, -4.0, 4.0) + np.linspace(0, 0.1, 1000)
    seen = weigh(
        margins, labels, np.zeros(1000, int), np.arange(1000), column="y", witness="training run"
    )
    assert seen.unlearnt == 1
    assert seen.contradicted == 0.1  # of all rows: this witness is as young in the other classes
    assert seen.sure_contradicted == 0
    rare = np.where(np.arange(1000) < 950, 0, 1)
    margins = np.full(1000, 3.0)
    margins[950:970] = -5.0  # a rare class, partly taken for the common one
    seen = weigh(margins, rare, 1 - rare, np.arange(1000), column="y", witness="training run")
    assert seen.sure_contradicted == 0
    margins[:20] = -5.0  # the common one, taken for the rare one: no prior explains that
    seen = weigh(margins, rare, 1 - rare, np.arange(1000), column="y", witness="training run")
    assert seen.sure_contradicted == 20


def test_a_witness_that_has_not_learnt_a_class_yet_is_no_better_elsewhere():
    labels = np.repeat(np.arange(10), 120)
    margins = np.linspace(0.1, 3.0, 1200)[np.random.default_rng(0).permutation(1200)]
    margins[labels == 8] = -1.0
    known = np.flatnonzero(labels != 8)
    margins[known[::10]], margins[known[5::72]] = -0.2, -2.9
    seen = weigh(margins, labels, (labels + 1) % 10, np.arange(1200), column="y", witness="t")
    assert (seen.unlearnt, seen.sure_contradicted) == (1, 15)
    assert seen.contradicted == pytest.approx((120 + 108 + 15) / 1200)
    assert not judged(seen)
    elsewhere = (108 + 15) / 1080
    expected = seen.sure * overlap_mistakes(elsewhere)
    assert judged(replace(seen, contradicted=elsewhere, sure_expected=expected))


def test_habits_of_confusion_raise_a_score():
    labels = np.repeat([0, 1, 2, 3], 50)
    others = (labels + 1) % 4
    others[0] = 2
    wrong = np.arange(200) % 50 < 20
    scores = by_confusion(np.zeros(200), labels, others, wrong)
    assert scores[1] > 0.5 > scores[0]
    assert by_confusion([1.0, 2.0], [0, 1], [1, 0], [True, False]).tolist() == [1.0, 2.0]
    assert rank(np.array([3.0, -1.0, 2.0]), np.array([0, 1, 0]), np.array([1, 0, 1]))[0] == 1


# ---------------------------------------------------------------- the data set's own witness


def told(data, **columns):
    report = hf_recipe.inspect_dataset(data, label="label", **columns)
    assert not report.crashed
    assert "suspect-label" in report.ran, report.skipped
    return next((f for f in report.flat if f.check == "suspect-label"), None)


def table(pixels, labels):
    return datasets.Dataset.from_dict({"pixels": pixels.tolist(), "label": labels.tolist()})


def flip(labels, share, seed=0):
    draw = np.random.default_rng(seed)
    classes = int(labels.max()) + 1
    wrong = draw.random(len(labels)) < share
    return np.where(wrong, (labels + draw.integers(1, classes, len(labels))) % classes, labels)


def test_flipped_digits_are_found_and_clean_ones_are_not():
    pixels, truth = load_digits(return_X_y=True)
    labels = flip(truth, 0.1)
    found = told(table(pixels, labels))
    assert found.severity == "warning"
    assert found.evidence["rate"] == pytest.approx(0.1, abs=0.03)
    assert (labels != truth)[list(found.examples)].mean() > 0.95
    assert told(table(pixels, truth)) is None


def test_flipped_text_is_found_and_clean_text_is_not():
    clean = classified(1500, 0)
    labels = np.asarray(clean["label"])
    noisy = flip(labels, 0.1)
    assert told(clean) is None
    found = told(clean.remove_columns("label").add_column("label", noisy))
    assert (labels != noisy)[list(found.examples)].mean() > 0.9


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("world", ["clusters", "rare", "overlap", "moons"])
def test_hard_but_clean_data_is_silent(world, seed):
    if world == "overlap":
        draw = np.random.default_rng(seed)
        labels = draw.integers(0, 2, 1000)
        pixels = draw.normal(size=(1000, 6)) + labels[:, None] * 0.5
    elif world == "moons":
        pixels, labels = make_moons(1000, noise=0.3, random_state=seed)
    else:
        weights = [0.93] if world == "rare" else None
        pixels, labels = make_classification(
            1000, 20, n_informative=5, weights=weights, flip_y=0, random_state=seed
        )
    assert told(table(pixels, labels)) is None


def test_labels_without_classes_are_skipped_with_the_reason():
    draw = np.random.default_rng(0)
    data = datasets.Dataset.from_dict(
        {"x": draw.normal(size=(200, 3)).tolist(), "label": draw.normal(size=200).tolist()}
    )
    report = hf_recipe.inspect_dataset(data, label="label")
    assert "number" in report.skipped["suspect-label"]
    data = datasets.Dataset.from_dict({"x": [1.0] * 30, "label": [0] * 29 + [1]})
    assert "classes" in hf_recipe.inspect_dataset(data, label="label").skipped["suspect-label"]


# ---------------------------------------------------------------- the run's own witness


class Fixed(torch.nn.Module):
    def forward(self, logits):
        return {"logits": logits * 1.0}


def test_margins_are_kept_by_row_over_the_first_half():
    model, watch = Fixed().train(), MarginWatch(4, 2)
    watch.restore({**watch.state(), "contradicted": 0.0})  # a run that knows by now
    watch.arm(model)
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 5.0]], requires_grad=True)
    for step, rows in ((1, (3, 1)), (2, (3, 1)), (3, (0, 2))):
        watch.step_begins(step, model)
        model(logits)
        watch.add(torch.tensor([0, 1]), rows)
    watch.flush()
    assert watch.scores().tolist()[1::2] == [-5.0, 1.0]
    assert np.isnan(watch.scores()[[0, 2]]).all()
    assert watch.others.tolist() == [0, 2, 0, 2]
    later = MarginWatch(4, 2)
    later.restore(watch.state())
    assert later.scores().tolist()[1::2] == [-5.0, 1.0]
    other = MarginWatch(5, 2)
    other.restore(watch.state())
    assert not other.counts.any()


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_the_first_passes_are_heard_and_then_every_second(epoch):
    watch = MarginWatch(4, 60, epoch=epoch)
    heard = [step for step in range(1, 100) if watch.hears(step)]
    if epoch == 7:
        passes = (0, 1, 2, 4, 6, 8)
        assert heard == [s for s in range(1, 61) if (s - 1) // 7 in passes]
    elif not epoch:
        assert heard == list(range(1, 61))
    model, told, due = Fixed(), [], 1
    for step in range(1, 100):
        if due is not None and step >= due:
            watch.step_begins(step, model)
            due = watch.changes_after(step)
        told += [step] if watch.listening else []
    assert told == heard
    assert due is None


def test_row_numbers_that_drift_are_not_believed():
    model, watch = Fixed().train(), MarginWatch(8, 100)
    watch.arm(model)
    draw = np.random.default_rng(0)
    for _ in range(20):
        model(torch.randn(8, 3, requires_grad=True))
        watch.add(torch.arange(8) % 3, tuple(int(i) for i in draw.permutation(8)))
        watch.flush()
    assert "row numbers" in watch.reason


@pytest.mark.parametrize(
    ("logits", "labels", "rows", "word"),
    [
        (torch.zeros(2, 3), torch.zeros(2), (0, 1), "class numbers"),
        (torch.zeros(2, 1), torch.zeros(2).long(), (0, 1), "two classes"),
        (torch.zeros(2, 5, 3), torch.zeros(2, 5).long(), (0, 1), "one label"),
        (torch.zeros(2, 3), torch.zeros(2).long(), (), "not known"),
    ],
)
def test_what_has_no_margin_is_named(logits, labels, rows, word):
    model, watch = Fixed().train(), MarginWatch(8, 100)
    watch.arm(model)
    model(logits.requires_grad_())
    watch.add(labels, rows)
    assert word in watch.reason
