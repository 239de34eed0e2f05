"""The task's metrics as `evaluate.Metric` subclasses: no hub, no script, right on many processes.

The Trainer gathers predictions of all processes before `compute_metrics` is called, so a metric
is computed once, on everything; `add_batch` works as in any other `evaluate` metric.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import datasets
import evaluate
import numpy as np

CLASSES = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
NUMBERS = {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}


class Metric(evaluate.Metric):  # type: ignore[misc]
    """A metric of this project: it says its summary and columns, and computes."""

    summary = ""
    inputs = "predictions, references: sequences of the same length"
    columns = CLASSES

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.summary,
            citation="",
            inputs_description=self.inputs,
            features=datasets.Features(self.columns),
        )

    def of(self, predictions: Any, references: Any) -> dict[str, float]:
        """What `compute` gives, of arrays that the Trainer has gathered: no Arrow file between."""
        measured: dict[str, float] = self._compute(predictions, references)
        return measured


class Accuracy(Metric):
    """Share of predictions that equal their reference, in 0..1."""

    summary = "Share of predictions that equal their reference."

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class F1(Metric):
    """Macro F1 over the classes that occur in predictions or references, in 0..1.

    ``average="binary"`` gives that of class 1.
    """

    summary = "Harmonic mean of precision and recall."

    def _compute(
        self, predictions: Any, references: Any, average: str = "macro"
    ) -> dict[str, float]:
        seen, true = np.asarray(predictions), np.asarray(references)
        classes = [1] if average == "binary" else np.union1d(seen, true).tolist()
        scores = []
        for k in classes:
            hits = float(np.sum((seen == k) & (true == k)))
            total = float(np.sum(seen == k) + np.sum(true == k))
            scores.append(2 * hits / total if total else 0.0)
        return {"f1": float(np.mean(scores)) if scores else 0.0}


class Matthews(Metric):
    """Matthews' correlation, for any number of classes, in -1..1; 0 for a constant answer.

    Gorodkin 2004.
    """

    summary = "Correlation between predicted and true classes."

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        seen, true = np.asarray(predictions), np.asarray(references)
        classes, n = np.union1d(seen, true), len(true)
        p = np.array([np.sum(seen == k) for k in classes], dtype=float)
        t = np.array([np.sum(true == k) for k in classes], dtype=float)
        cover = float(np.sum(seen == true)) * n - float(p @ t)
        scale = float(np.sqrt((n * n - p @ p) * (n * n - t @ t)))
        return {"matthews": cover / scale if scale else 0.0}


class MeanSquaredError(Metric):
    """Mean squared error, in the target's unit squared."""

    summary = "Mean of the squared differences."
    columns = NUMBERS

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"mse": float(np.mean((np.asarray(predictions) - np.asarray(references)) ** 2))}


class RSquared(Metric):
    """Share of the references' variance that is explained; NaN where they do not vary."""

    summary = "1 minus the residual over the total sum of squares."
    columns = NUMBERS

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        seen, true = np.asarray(predictions, float), np.asarray(references, float)
        total = float(np.sum((true - true.mean()) ** 2))
        return {"r2": 1 - float(np.sum((true - seen) ** 2)) / total if total else float("nan")}


class MultiLabelF1(Metric):
    """F1 over all yes-or-no answers, and its mean over the labels; and rows wholly right.

    Predictions and references are 0 and 1, (rows, labels). A label that neither holds is left out
    of the mean.
    """

    summary = "Micro and macro F1, and the share of rows whose labels are all right."
    columns = {
        "predictions": datasets.List(datasets.Value("int64")),
        "references": datasets.List(datasets.Value("int64")),
    }

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        seen, true = np.asarray(predictions, int), np.asarray(references, int)
        hits = (seen & true).sum(0).astype(float)
        total = (seen.sum(0) + true.sum(0)).astype(float)
        each = 2 * hits[total > 0] / total[total > 0]
        return {
            "f1_micro": float(2 * hits.sum() / total.sum()) if total.sum() else 0.0,
            "f1_macro": float(each.mean()) if len(each) else 0.0,
            "rows_right": float((seen == true).all(1).mean()),
        }


class MeanIoU(Metric):
    """Mean over classes of intersection over union, and the share of pixels that are right.

    A class that neither holds is left out of the mean.
    """

    summary = "Mean over classes of intersection over union, and accuracy."

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        seen, true = np.asarray(predictions), np.asarray(references)
        each = []
        for k in np.union1d(seen, true):
            shared = float(np.sum((seen == k) & (true == k)))
            each.append(shared / float(np.sum((seen == k) | (true == k))))
        return {
            "mean_iou": float(np.mean(each)) if each else 0.0,
            "accuracy": float(np.mean(seen == true)) if len(true) else 0.0,
        }


METRICS: Mapping[str, tuple[type[Metric], ...]] = {
    "image-classification": (Accuracy, F1, Matthews),
    "sequence-classification": (Accuracy, F1, Matthews),
    "multiple-choice": (Accuracy,),
    "regression": (MeanSquaredError, RSquared),
}


def compute_metrics_for(task: str, *, scale: float = 1.0) -> Callable[[Any], dict[str, float]]:
    """A `compute_metrics` for the Trainer.

    Args:
        task: which metrics; classification takes the class of the highest logit.
        scale: standard deviation by which regression targets were divided; errors are reported
            in the target's own unit.

    Raises:
        ValueError: an unknown task.
    """
    if task not in METRICS:
        raise ValueError(f"task must be one of {', '.join(METRICS)}; got {task!r}")
    metrics = [kind() for kind in METRICS[task]]

    def compute(prediction: Any) -> dict[str, float]:
        outputs = prediction.predictions
        logits = np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs)
        labels = np.asarray(prediction.label_ids).reshape(-1)
        if task == "regression":
            seen, labels = logits.reshape(-1) * scale, labels * scale
        else:
            seen = logits.argmax(-1).reshape(-1)
            seen, labels = seen[labels != -100], labels[labels != -100]
        results: dict[str, float] = {}
        for metric in metrics:
            results |= metric.of(seen, labels)
        return results

    return compute
