"""Which labels do the data, or the run's own margins, contradict?

Two scores that anyone may use on own numbers. `confident_learning` needs out-of-sample
probabilities (cross-validated). `margin_scores` needs none: the margin of each row's label,
recorded while training, before memorisation sets in.

Rank and look at the top; never delete by the score alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hf_recipe.instruments.numbers import numbers_of, plain

CHUNK = 65_536
HABIT = 3.0  # Poisson deviations beyond an even spread from which a confusion is a habit
FEWEST = 10  # confirmed rows of a class whose median is known well enough to centre by

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def confident_learning(probabilities: Any, labels: Any) -> Integers:
    """Rows whose label another class contradicts, worst first: as many as seem to be wrong.

    A class's threshold is its mean probability among the rows that carry it, and a row is counted
    for the likeliest of the classes at or above their own. The share of a class's counted rows
    that go to another class, times all of its rows, is its number of wrong labels (Northcutt et
    al. 2021, arXiv:1911.00068). Of the rows whose label is not the likeliest class, so many are
    suspects.

    Args:
        probabilities: (rows, classes), out of sample; rows that hold NaN are left out.
        labels: (rows,) class numbers; those outside 0..classes - 1 (such as -100) are left out.

    Returns:
        Row indices, by the label's probability minus that of the likeliest other class.

    Raises:
        ValueError: shapes that do not fit.
    """
    p, y = _probabilities(probabilities, labels)
    rows, classes = p.shape
    usable = (y >= 0) & (y < classes)
    own = np.full(rows, np.nan)
    own[usable] = p[usable, y[usable]]
    usable &= ~np.isnan(p).any(axis=1)
    counts = np.bincount(y[usable], minlength=classes)
    sums = np.bincount(y[usable], weights=own[usable], minlength=classes)
    # a class that no row carries has no threshold: nothing is confidently in it
    thresholds = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
    kept, moved = np.zeros(classes), np.zeros(classes)  # rows counted for their label, for another
    contradicted, margins = [], []
    for start in range(0, rows, CHUNK):
        good = start + np.flatnonzero(usable[start : start + CHUNK])
        if not len(good):
            continue
        part, label = p[good], y[good]
        confident = np.where(part >= thresholds - 1e-12, part, -np.inf)
        guess = confident.argmax(axis=1)
        there = np.isfinite(confident[np.arange(len(part)), guess])
        kept += np.bincount(label[there & (guess == label)], minlength=classes)
        moved += np.bincount(label[there & (guess != label)], minlength=classes)
        against = np.flatnonzero(part.argmax(axis=1) != label)
        contradicted.append(good[against])
        margins.append(own[good[against]] - part[against].max(axis=1, initial=-np.inf))
    if not contradicted:
        return np.zeros(0, dtype=np.int64)
    wrong = round(float((counts * moved / (np.maximum(kept, 1) + moved)).sum()))
    suspects = np.concatenate(contradicted)
    return suspects[np.argsort(np.concatenate(margins), kind="stable")[:wrong]].astype(np.int64)


def _probabilities(probabilities: Any, labels: Any) -> tuple[Any, Integers]:
    """Both as arrays; -1 stands for a label that is none."""
    p, given = np.asarray(plain(probabilities)), numbers_of(labels, "labels", axes=1)
    if p.ndim != 2 and not given.size and not p.size:
        p = p.reshape(0, 1)
    if p.ndim != 2 or given.shape != (len(p),) or p.dtype.kind not in "fiub":
        raise ValueError(
            "expected probabilities (rows, classes) and labels (rows,); got shapes "
            f"{p.shape} and {given.shape}"
        )
    return p, np.where(np.isfinite(given), given, -1).astype(np.int64)


def margin_scores(margins: Any, labels: Any = None) -> Floats:
    """How suspect each row's label is, from its margins while training: high is suspect.

    The mean margin over the first half of the epochs, negated (area under the margin, Pleiss et
    al. 2020, arXiv:2001.10528; the first half because memorisation comes later).

    Args:
        margins: (epochs, rows): logit of the row's label minus the largest other logit, when the
            row was trained on in that epoch; NaN where it was not seen.
        labels: (rows,) class numbers; with them, a rare or hard class, whose confirmed rows have
            smaller margins too, is not suspect as a whole.

    Returns:
        (rows,) scores; NaN for a row that was never seen.

    Raises:
        ValueError: shapes that do not fit.
    """
    m = numbers_of(margins, "margins (epochs, rows)", axes=2)
    half = m[: max(1, -(-len(m) // 2))]
    seen = ~np.isnan(half)
    half_scores = _mean(half, seen)
    late = np.isnan(half_scores)
    if late.any():  # seen in the second half alone
        half_scores[late] = _mean(m[:, late], ~np.isnan(m[:, late]))
    scores = -half_scores
    if labels is not None:
        y = np.asarray(plain(labels))
        if y.shape != scores.shape:
            raise ValueError(f"expected labels ({len(scores)},); got {y.shape}")
        scores = _within_class(scores, y)
    return scores


def by_confusion(scores: Any, labels: Any, others: Any, wrong: Any) -> Floats:
    """Scores that also know which classes are taken for which.

    Labels go wrong by habit: where many rows of one class are contradicted by the same other
    class, the next such row is the likelier to be wrong. Where significantly more of the
    contradicted rows with this label name this other class than an even spread would, the log of
    that ratio is added; noise without a habit stays as it was ranked.

    Args:
        scores: (rows,) in nats, high is suspect.
        labels, others: (rows,) class numbers: the label, and the best other class.
        wrong: (rows,) whether the other class is ahead.
    """
    names, places = np.unique(np.concatenate([labels, others]), return_inverse=True)
    mine, rivals = places[: len(labels)], places[len(labels) :]
    if len(names) < 3:
        return np.asarray(scores, dtype=np.float64)
    pairs, where = np.unique(mine * len(names) + rivals, return_inverse=True)
    counted = np.bincount(where, weights=np.asarray(wrong, dtype=np.float64), minlength=len(pairs))
    of_label = np.bincount(mine, weights=np.asarray(wrong, dtype=np.float64), minlength=len(names))
    even = of_label[pairs // len(names)] / (len(names) - 1)
    habit: Floats = np.log((counted + 1) / (even + 1))
    habit[counted - even <= HABIT * np.sqrt(even + 1)] = 0.0
    return np.asarray(scores, dtype=np.float64) + habit[where]


def _mean(values: Floats, seen: npt.NDArray[np.bool_]) -> Floats:
    counts = seen.sum(axis=0)
    sums = np.where(seen, values, 0.0).sum(axis=0)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _within_class(scores: Floats, labels: npt.NDArray[Any]) -> Floats:
    """Scores as if all classes were as hard, halfway.

    How hard a class is, the margins of its confirmed rows tell. Halfway, since a class with more
    wrong labels is learnt worse, too: its rows are rightly the likelier to be wrong.
    """
    centred = scores.copy()
    confirmed = scores < 0
    usual = np.median(scores[confirmed]) if confirmed.any() else 0.0
    for label in np.unique(labels):
        inside = labels == label
        if (inside & confirmed).sum() >= FEWEST:
            centred[inside] += (usual - np.median(scores[inside & confirmed])) / 2
    return centred
