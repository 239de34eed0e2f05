"""A metric, counted again: every value that its name may rightly stand for, and known mistakes.

"f1" may be macro, micro, weighted or one class's; "mse" may be in the target's own unit. So a
reported number is compared with all of these, and with the values that the well-known mistakes
give (padding counted, a missing shift, the last batch alone, shapes that broadcast, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from hf_recipe.instruments.answers import (
    ACROSS,
    IGNORED,
    POSITIONS,
    RIGHT,
    RIGHT_AHEAD,
    SUPERVISED,
    SUPERVISED_AHEAD,
    Answers,
)

Array = np.ndarray[Any, np.dtype[np.float64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]
Values = dict[str, float]

NAMES = {
    "accuracy": "accuracy",
    "acc": "accuracy",
    "token_accuracy": "accuracy",
    "f1": "f1",
    "f1_score": "f1",
    "macro_f1": "f1",
    "f1_macro": "f1",
    "micro_f1": "f1",
    "f1_micro": "f1",
    "f1_weighted": "f1",
    "weighted_f1": "f1",
    "precision": "precision",
    "recall": "recall",
    "matthews_correlation": "matthews",
    "matthews_corrcoef": "matthews",
    "matthews": "matthews",
    "mcc": "matthews",
    "mse": "mse",
    "mean_squared_error": "mse",
    "rmse": "rmse",
    "mae": "mae",
    "r2": "r2",
    "pearson": "pearson",
    "pearsonr": "pearson",
}
LOPSIDED = ("precision", "recall", "r2")  # other numbers where answers and labels change places
MOST_CLASSES = 64  # whose own scores are counted


def recount(answers: Answers, name: str, shifted: bool | None) -> tuple[Values, Values] | None:
    """(right values, values of known mistakes) of the metric `name`; None where it is not known.

    Args:
        name: one of the values of `NAMES`.
        shifted: whether answers stand one place before their labels (causal language models);
            None: not known.
    """
    if answers.kind == "token":
        return _tokens(answers, shifted) if name == "accuracy" else None
    if answers.kind == "class" and name in ("accuracy", "f1", "precision", "recall", "matthews"):
        return _views(answers, lambda rows: _classes(rows, name, answers.outputs), name)
    flags = answers.kind == "flags" or set(np.unique(answers.rows[:, 1:])) <= {0.0, 1.0}
    if flags and name in ("accuracy", "f1"):
        return _flags(answers, name)
    if answers.kind == "number" and name in ("mse", "rmse", "mae", "r2", "pearson"):
        return _views(answers, lambda rows: _numbers(rows, name), name)
    return None


def _views(answers: Answers, scores: Callable[[Array], Values], name: str) -> tuple[Values, Values]:
    """The scores of all rows, and those of the wrong rows."""
    rows = answers.rows
    labelled = rows[rows[:, 1] != IGNORED]
    wrong: Values = {}
    for cause, some in _wrong_rows(answers):
        kept = some[some[:, 1] != IGNORED]
        if len(kept):
            wrong |= {f"{cause}|{k}": v for k, v in scores(kept).items()}
    if len(labelled) < len(rows) and name == "accuracy":
        wrong["masked|"] = float(np.mean(rows[:, 0] == rows[:, 1]))
    answer, truth = labelled[:, 0], labelled[:, 1]
    if name == "accuracy":
        right, counted = rows[:, 0] == rows[:, 1], rows[:, 1] != IGNORED
        _add_batches(wrong, answers, right & counted, counted)
        seen, true = (
            dict(zip(*np.unique(x, return_counts=True), strict=True)) for x in (answer, truth)
        )
        pairs = sum(float(count) * float(true.get(k, 0)) for k, count in seen.items())
        wrong["broadcast|"] = pairs / max(len(labelled), 1) ** 2
    elif name in ("mse", "rmse"):
        spread = float(answer.var() + truth.var() + (answer.mean() - truth.mean()) ** 2)
        wrong["broadcast|"] = spread if name == "mse" else spread**0.5
        wrong["root|"] = float(np.mean((answer - truth) ** 2)) ** (1.0 if name == "rmse" else 0.5)
    if name in LOPSIDED and len(labelled):
        turned = labelled.copy()
        turned[:, [0, 1]] = labelled[:, [1, 0]]
        wrong |= {f"swapped|{k}": v for k, v in scores(turned).items() if not k.startswith("class")}
    return scores(labelled) if len(labelled) else {}, wrong


def _wrong_rows(answers: Answers) -> Iterator[tuple[str, Array]]:
    rows = answers.rows
    if len(answers.rounds) > 1:
        yield "last", rows[sum(answers.rounds[:-1]) :]
    if answers.repeated is not None:
        yield "repeated", answers.repeated
    for rank, own in enumerate(answers.ranks):
        yield f"rank{rank}", own


def _add_batches(
    wrong: Values, answers: Answers, right: Array, counted: Array, side: str = ""
) -> None:
    """The mean over batches of each one's own share."""
    ends = np.cumsum(answers.rounds)[:-1]
    parts = [
        (r.sum(), c.sum())
        for r, c in zip(np.split(right, ends), np.split(counted, ends), strict=True)
    ]
    shares = [r / c for r, c in parts if c]
    if len(shares) > 1:
        wrong[f"batches|{side}"] = float(np.mean(shares))


def _classes(rows: Array, name: str, outputs: int) -> Values:
    seen, true = rows[:, 0], rows[:, 1]
    if name == "accuracy":
        recalls = [float(np.mean(seen[true == k] == k)) for k in np.unique(true)]
        return {"": float(np.mean(seen == true)), "balanced": float(np.mean(recalls))}
    classes = np.arange(outputs) if outputs <= MOST_CLASSES else np.union1d(seen, true)
    hits = np.array([np.sum((seen == k) & (true == k)) for k in classes], dtype=float)
    p = np.array([np.sum(seen == k) for k in classes], dtype=float)
    t = np.array([np.sum(true == k) for k in classes], dtype=float)
    if name == "matthews":
        n = float(len(rows))
        scale = float(np.sqrt((n * n - p @ p) * (n * n - t @ t)))
        return {"": float(hits.sum() * n - p @ t) / scale if scale else 0.0}
    below = {"f1": (p + t) / 2, "precision": p, "recall": t}[name]
    each = np.where(below > 0, hits / np.where(below > 0, below, 1.0), 0.0)
    occurs = (p + t) > 0
    values = {
        "macro": float(each[occurs].mean()),
        "macro over all classes": float(each.mean()),
        "macro over labelled classes": float(each[t > 0].mean()),
        "micro": float(hits.sum() / len(rows)),
        "weighted": float(each @ t / t.sum()),
    }
    return values | {f"class {int(k)}": float(v) for k, v in zip(classes, each, strict=True)}


def _numbers(rows: Array, name: str) -> Values:
    seen, true = rows[:, 0], rows[:, 1]
    if name in ("mse", "rmse"):
        mean = float(np.mean((seen - true) ** 2))
        return {"": mean if name == "mse" else mean**0.5}
    if name == "mae":
        return {"": float(np.mean(np.abs(seen - true)))}
    if len(rows) < 2 or not true.std() > 0:
        return {}
    if name == "r2":
        return {"": 1 - float(np.sum((seen - true) ** 2) / np.sum((true - true.mean()) ** 2))}
    return {"": float(np.corrcoef(seen, true)[0, 1])} if seen.std() > 0 else {}


def _flags(answers: Answers, name: str) -> tuple[Values, Values]:
    """Yes-or-no outputs: at the threshold of a logit, 0, and at that of a probability."""
    half = answers.rows.shape[1] // 2
    logits, labels = answers.rows[:, :half], answers.rows[:, half:] > 0.5
    logit, probability = (_thresholded(logits > at, labels, name) for at in (0.0, 0.5))
    # Probabilities already; or one output, which a squared error may have taught 0 and 1.
    if answers.kind == "number" or (logits.min() >= 0 and logits.max() <= 1):
        return logit | {f"at 0.5, {k}": v for k, v in probability.items()}, {}
    return logit, {f"threshold|{k}": v for k, v in probability.items()}


def _thresholded(seen: Flags, labels: Flags, name: str) -> Values:
    if name == "accuracy":
        return {
            "of rows": float(np.mean((seen == labels).all(1))),
            "of outputs": float(np.mean(seen == labels)),
        }
    hits, total = (seen & labels).sum(0), seen.sum(0) + labels.sum(0)
    each = np.where(total > 0, 2 * hits / np.maximum(total, 1), 0.0)
    micro = 2 * hits.sum() / max(total.sum(), 1)
    weighted = each @ labels.sum(0) / max(labels.sum(), 1)
    rows = seen.sum(1) + labels.sum(1)
    samples = np.where(rows > 0, 2 * (seen & labels).sum(1) / np.maximum(rows, 1), 0.0)
    return {
        "macro": float(each.mean()),
        "micro": float(micro),
        "weighted": float(weighted),
        "samples": float(samples.mean()),
    }


def _tokens(answers: Answers, shifted: bool | None) -> tuple[Values, Values] | None:
    rows = answers.rows
    sides = {
        "in place": (rows[:, RIGHT], rows[:, SUPERVISED]),
        "shifted": (rows[:, RIGHT_AHEAD], rows[:, SUPERVISED_AHEAD]),
    }
    right_sides = {None: ("in place", "shifted"), True: ("shifted",), False: ("in place",)}[shifted]
    right: Values = {}
    wrong: Values = {}
    longest, count = float(rows[:, POSITIONS].max()), float(len(rows))
    for side, (hits, counted) in sides.items():
        if not counted.sum():
            continue
        rightly = side in right_sides
        cause = "masked" if rightly else "unshifted" if side == "in place" else "shifted"
        values = _side(hits, counted)
        lost = 1 if side == "shifted" else 0
        width = (longest - lost) * count
        padded = {
            "": hits.sum() / width,
            "in their batch": hits.sum() / (rows[:, POSITIONS] - lost).sum(),
            "filling counted as right": (hits.sum() + width + lost * count - _places(rows)) / width,
        }
        if rightly:
            right |= {f"{side}, {k}": v for k, v in values.items()}
            if counted.sum() < width:
                wrong |= {f"masked|{side} {k}": float(v) for k, v in padded.items()}
            for name, some in _wrong_rows(answers):
                own, all_ = (some[:, c] for c in _columns_of(side))
                if all_.sum():
                    wrong[f"{name}|{side}"] = float(own.sum() / all_.sum())
            _add_batches(wrong, answers, hits, counted, side)
        else:
            wrong |= {f"{cause}|{k}": float(v) for k, v in {**values, **padded}.items()}
    if (rows[:, ACROSS] >= 0).all() and rows[:, SUPERVISED].sum():
        wrong["axis|"] = float(rows[:, ACROSS].sum() / rows[:, SUPERVISED].sum())
    return right, wrong


def _columns_of(side: str) -> tuple[int, int]:
    return (RIGHT, SUPERVISED) if side == "in place" else (RIGHT_AHEAD, SUPERVISED_AHEAD)


def _places(rows: Array) -> float:
    return float(rows[:, POSITIONS].sum())


def _side(hits: Array, counted: Array) -> Values:
    has = counted > 0
    return {
        "of tokens": float(hits.sum() / counted.sum()),
        "mean of rows": float((hits[has] / counted[has]).mean()),
        "whole rows": float(np.mean(hits[has] == counted[has])),
    }
