"""Cheap probes and the tests that judge them.

A probe learns from one half of a sample and is judged on the other. Two probes are compared on
the same rows by McNemar's test; whether one beats chance is asked of shuffled labels. Each
comparison says the largest loss that it leaves open: "no loss" is worth as much as that.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_recipe.data.words import Keys

Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

ALPHA = 0.01  # of one comparison; at most five are made for an answer, which leaves 5 %
ONE_SIDED = 1.645  # standard errors of a 95 % bound
POWER = 0.84  # standard errors beyond its threshold at which an effect is seen 4 times in 5
MOST_FEATURES = 2_048
BUCKET_BITS = 20


@dataclass(frozen=True)
class Trial:
    """One probe, judged on the held-out rows.

    Attributes:
        name: what it looked at, in words.
        scores: (held-out rows, classes).
        truth: (held-out rows,) their classes.
    """

    name: str
    scores: Floats
    truth: Integers

    @property
    def right(self) -> Flags:
        return np.asarray(self.scores.argmax(axis=1) == self.truth)

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())

    @property
    def error(self) -> float:
        """Standard error of the accuracy."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / len(self.truth))

    @property
    def p_chance(self) -> float:
        """Chance of as many hits under shuffled labels."""
        guess = np.eye(self.scores.shape[1])[self.scores.argmax(axis=1)]
        return chance_of(guess, self.truth)

    @property
    def auc(self) -> float:
        """Area under the ROC curve, one class against the rest, mean over classes."""
        areas = [
            auc(self.scores[:, k], self.truth == k)
            for k in range(self.scores.shape[1])
            if 0 < (self.truth == k).sum() < len(self.truth)
        ]
        return float(np.mean(areas)) if areas else 0.5


@dataclass(frozen=True)
class Paired:
    """Two trials on the same rows.

    Attributes:
        lost, won: rows that only the first, only the second got right.
        rows: rows compared.
        p_loss, p_gain: one-sided McNemar: chance of as many lost (won) if neither were better.
        most_loss, most_gain: the largest loss and gain of accuracy that the rows leave open (the
            upper end of a one-sided 95 % interval).
    """

    lost: int
    won: int
    rows: int
    p_loss: float
    p_gain: float
    most_loss: float
    most_gain: float


def paired(reference: Trial, candidate: Trial) -> Paired:
    """McNemar's exact test of `candidate` against `reference`."""
    from scipy.special import bdtrc

    lost = int((reference.right & ~candidate.right).sum())
    won = int((~reference.right & candidate.right).sum())
    apart = lost + won
    rows = len(reference.truth)
    lead, width = (lost - won) / rows, ONE_SIDED * math.sqrt(max(apart, 4)) / rows
    return Paired(
        lost=lost,
        won=won,
        rows=rows,
        p_loss=float(bdtrc(lost - 1, apart, 0.5)),
        p_gain=float(bdtrc(won - 1, apart, 0.5)),
        most_loss=max(0.0, lead + width),
        most_gain=max(0.0, width - lead),
    )


def chance_of(scores: Floats, truth: Integers) -> float:
    """One-sided p of the sum of each row's score for its class, under shuffled classes.

    The permutation distribution's exact mean and variance (Hoeffding 1951), its tail as normal.
    """
    from scipy.special import ndtr

    rows, classes = scores.shape
    counts = np.bincount(truth, minlength=classes)
    share = counts / rows
    centred = scores - (scores @ share)[:, None]
    centred -= centred.mean(axis=0)
    variance = float((centred**2 @ counts).sum()) / max(rows - 1, 1)
    if not variance > 0:
        return 1.0
    total = float(centred[np.arange(rows), truth].sum())
    return float(ndtr(-total / math.sqrt(variance)))


def average_ranks(values: npt.NDArray[Any]) -> Floats:
    """From 1; equal values share the mean of their places."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[place])


def auc(scores: npt.NDArray[Any], positive: Flags) -> float:
    """Area under the ROC curve; ties count half."""
    wins = int(positive.sum())
    rest = len(positive) - wins
    if not wins or not rest:
        return 0.5
    ranks = average_ranks(scores)
    return float((ranks[positive].sum() - wins * (wins + 1) / 2) / (wins * rest))


def auc_error(positive: int, rest: int) -> float:
    """Standard deviation of the AUC when nothing can be told (Mann and Whitney 1947)."""
    return math.sqrt((positive + rest + 1) / (12 * positive * rest))


# ---------------------------------------------------------------- probes


def linear(name: str, keys: Keys, labels: Integers, held: Flags) -> Trial:
    """Logistic regression on the features of `keys` that tell most on the teaching half."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    matrix = sparse(keys, labels, held)
    model = LogisticRegression(C=10.0, max_iter=60, tol=1e-3)
    with threadpool_limits(1):
        fit_quietly(model, matrix[~held], labels[~held])
        return Trial(name, spread(model, matrix[held], labels), labels[held])


def fit_quietly(model: Any, matrix: Any, labels: Integers) -> None:
    """Fit it; that it has not converged is no news to the user: a cheap probe need not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(matrix, labels)


def spread(model: Any, matrix: Any, labels: Integers) -> Floats:
    """(rows, classes): a fitted classifier's probabilities, with 0 for classes it never saw."""
    scores = np.zeros((matrix.shape[0], int(labels.max()) + 1))
    scores[:, model.classes_.astype(int)] = model.predict_proba(matrix)
    return scores


def sparse(keys: Keys, labels: Integers, held: Flags, most: int = MOST_FEATURES) -> Any:
    """The rows' features as a sparse matrix: weighed by what they tell, rows of about 1.

    Keys are hashed to a million buckets, of which those with the largest chi-squared against the
    teaching half's classes are kept.
    """
    from scipy.sparse import csr_matrix

    buckets = (keys.keys >> np.uint64(64 - BUCKET_BITS)).astype(np.int64)
    classes, size = int(labels.max()) + 1, 1 << BUCKET_BITS
    teaching = ~held[keys.rows]
    share = np.bincount(labels[~held], minlength=classes) / max(int((~held).sum()), 1)
    seen = np.bincount(buckets[teaching], minlength=size)
    telling = np.zeros(size)
    for k in range(classes):
        mine = teaching & (labels[keys.rows] == k)
        there = np.bincount(buckets[mine], minlength=size)
        telling += (there - seen * share[k]) ** 2 / np.maximum(seen * share[k], 1e-9)
    telling[seen < 2] = -1.0
    kept = np.argpartition(-telling, min(most, size - 1))[:most]
    kept = np.sort(kept[telling[kept] >= 0])
    column = np.full(size, -1)
    column[kept] = np.arange(len(kept))
    inside = column[buckets] >= 0
    width = max(len(kept), 1)
    cells = np.unique(keys.rows[inside] * width + column[buckets[inside]])
    rows, columns = cells // width, cells % width
    strength = np.sqrt(np.maximum(telling[kept], 1e-9) / max(classes - 1, 1))
    weight = strength[columns] if len(kept) else np.zeros(0)
    weight = weight / math.sqrt(max(float((weight**2).sum()) / len(labels), 1e-12))
    return csr_matrix((weight, (rows, columns)), shape=(len(labels), width))


def kernel(name: str, features: npt.NDArray[Any], labels: Integers, held: Flags) -> Trial:
    """Ridge regression on the classes with a Gaussian kernel of the data's own width."""
    from scipy.linalg import solve
    from threadpoolctl import threadpool_limits

    flat = features.reshape(len(features), -1).astype(np.float64)
    flat = flat - flat[~held].mean(axis=0)
    taught, judged = flat[~held], flat[held]
    with threadpool_limits(1):
        apart = _distances(taught, taught)
        width = float(np.median(apart)) or 1.0
        target = np.eye(int(labels.max()) + 1)[labels[~held]]
        mean = target.mean(axis=0)
        close = np.exp(-apart / width)
        close.flat[:: len(close) + 1] += 0.03
        weights = solve(close, target - mean, assume_a="pos", overwrite_a=True)
        scores = np.exp(-_distances(judged, taught) / width) @ weights + mean
    return Trial(name, scores, labels[held])


def _distances(left: Floats, right: Floats) -> Floats:
    squares = (left**2).sum(axis=1)[:, None] + (right**2).sum(axis=1) - 2 * left @ right.T
    return np.asarray(np.maximum(squares, 0.0))


def trees(name: str, features: Floats, labels: Integers, held: Flags) -> Trial:
    """Boosted trees on a few columns; NaN is a value of its own."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from threadpoolctl import threadpool_limits

    model = HistGradientBoostingClassifier(
        max_iter=30, learning_rate=0.15, max_leaf_nodes=8, min_samples_leaf=20,
        l2_regularization=1.0, early_stopping=False, random_state=0,
    )  # fmt: skip
    with threadpool_limits(1):
        model.fit(features[~held], labels[~held])
        return Trial(name, spread(model, features[held], labels), labels[held])


# ---------------------------------------------------------------- single columns

BINS = 16


def binned(values: Floats, held: Flags, bins: int = BINS) -> Integers:
    """A column as bin numbers: its values where they are few, else quantiles; NaN is the last.

    The edges are the teaching half's.
    """
    taught = values[~held]
    taught = taught[np.isfinite(taught)]
    edges = np.unique(taught)
    if len(edges) > bins:
        edges = np.unique(np.quantile(taught, np.linspace(0, 1, bins + 1)[1:-1]))
        codes = np.searchsorted(edges, values, side="right")
    else:
        codes = np.searchsorted((edges[1:] + edges[:-1]) / 2, values, side="right")
    return np.where(np.isfinite(values), codes, len(edges) + 1).astype(np.int64)


def looked_up(name: str, codes: Integers, labels: Integers, held: Flags) -> Trial:
    """Each row's class shares by its code's on the teaching half."""
    classes, size = int(labels.max()) + 1, int(codes.max()) + 1
    table = np.bincount(codes[~held] * classes + labels[~held], minlength=size * classes)
    share = np.bincount(labels[~held], minlength=classes) / max(int((~held).sum()), 1)
    counts = table.reshape(size, classes) + share
    scores = counts / counts.sum(axis=1, keepdims=True)
    return Trial(name, scores[codes[held]], labels[held])


def additive(name: str, columns: list[Integers], labels: Integers, held: Flags) -> Trial:
    """Logistic regression on the bins of several columns."""
    from scipy.sparse import csr_matrix
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    widths = np.array([int(codes.max()) + 1 for codes in columns])
    starts = np.concatenate([[0], np.cumsum(widths)])
    places = np.stack(columns, axis=1) + starts[:-1]
    rows = np.repeat(np.arange(len(labels)), len(columns))
    shape = (len(labels), int(starts[-1]))
    matrix = csr_matrix((np.ones(places.size), (rows, places.reshape(-1))), shape=shape)
    model = LogisticRegression(C=0.3, max_iter=60, tol=1e-3)
    with threadpool_limits(1):
        fit_quietly(model, matrix[~held], labels[~held])
        return Trial(name, spread(model, matrix[held], labels), labels[held])
