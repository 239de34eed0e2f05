import numpy as np
import pytest

from hf_recipe.data.suspects import confident_learning, margin_scores


def test_confident_learning_by_hand():
    p = np.array(
        [[0.9, 0.1], [0.8, 0.2], [0.05, 0.95], [0.1, 0.9], [0.2, 0.8], [0.3, 0.7], [0.5, 0.5]]
    )
    y = np.array([0, 0, 0, 1, 1, 1, -100])
    # thresholds: class 0 (.9 + .8 + .05) / 3 = .583, class 1 .8
    assert confident_learning(p, y).tolist() == [2]
    p[0] = np.nan
    assert confident_learning(p, y).tolist() == [2]
    with pytest.raises(ValueError, match=r"\(7, 2\) and \(3,\)"):
        confident_learning(p, [0, 1, 0])
    assert len(confident_learning(np.zeros((0, 3)), [])) == 0


@pytest.mark.parametrize("classes", [2, 5, 30])
def test_planted_flips_are_found_worst_first(classes):
    rng = np.random.default_rng(classes)
    truth = rng.integers(0, classes, 4000)
    logits = rng.normal(size=(4000, classes))
    logits[np.arange(4000), truth] += 4 + np.log(classes)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = truth.copy()
    flipped = rng.random(4000) < 0.05
    labels[flipped] = (truth[flipped] + 1 + rng.integers(0, classes - 1, flipped.sum())) % classes
    found = confident_learning(p, labels)
    assert flipped[found].mean() > 0.9
    assert flipped[found].sum() > 0.6 * flipped.sum()
    assert flipped[found[:20]].all()
    assert len(confident_learning(p, truth)) < 0.02 * 4000


def test_margin_scores_by_hand():
    margins = np.array(
        [[1.0, -3.0, np.nan], [3.0, -1.0, np.nan], [-9.0, 9.0, np.nan], [-9.0, 9.0, np.nan]]
    )
    scores = margin_scores(margins)
    assert scores[:2].tolist() == [-2.0, 2.0]
    assert np.isnan(scores[2])
    assert margin_scores([[np.nan], [np.nan], [2.0], [4.0]]).tolist() == [-3.0]  # seen late
    with pytest.raises(ValueError, match="epochs, rows"):
        margin_scores([1.0, 2.0])


def test_a_hard_class_is_not_suspect_as_a_whole():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [900, 100])
    margins = rng.normal(np.where(labels == 0, 6.0, 0.0), 1.0, (6, 1000))
    wrong = np.r_[:20]
    margins[:, wrong] -= 6.0
    assert (labels[np.argsort(-margin_scores(margins))[:60]] == 1).mean() > 0.5
    top = np.argsort(-margin_scores(margins, labels))[:20]
    assert set(top.tolist()) == set(wrong.tolist())


def test_a_rare_class_full_of_wrong_labels_stays_suspect():
    """Every tenth label of the large class is wrong and says the rare one, which is half theirs."""
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1], [900, 90])
    wrong = np.r_[:90]
    labels = truth.copy()
    labels[wrong] = 1
    margins = rng.normal(np.where(truth == 0, 6.0, 4.0), 2.0, (6, 990))
    margins[:, wrong] *= -0.5
    top = np.argsort(-margin_scores(margins, labels))[:90]
    assert np.isin(top, wrong).mean() > 0.95


def test_as_many_rows_are_listed_as_labels_are_wrong():
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 4, 6000)
    logits = rng.normal(size=(6000, 4))
    logits[np.arange(6000), truth] += 3
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for rate in (0.05, 0.2):
        wrong = rng.random(6000) < rate
        labels = np.where(wrong, (truth + rng.integers(1, 4, 6000)) % 4, truth)
        found = confident_learning(p, labels)
        assert 0.75 < len(found) / wrong.sum() < 1.25
        assert wrong[found].mean() > 0.85
        own = p[found, labels[found]]
        assert (np.diff(own - p[found].max(1)) >= 0).all()
