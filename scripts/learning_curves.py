"""Record the learning curves that `hf_recipe.regularize.learning_curve` is measured on.

Held-out log losses of scikit-learn models on its bundled and made-up data sets, at nested subsets
of growing size, three seeds each. Writes tests/regularize/learning_curves.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_breast_cancer, load_digits, load_wine, make_classification
from sklearn.ensemble import ExtraTreesClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

TARGET = Path(__file__).resolve().parents[1] / "tests" / "regularize" / "learning_curves.json"
SEEDS = 3


def data_sets() -> dict[str, tuple[Any, Any]]:
    """Name -> (rows, labels)."""
    easy = dict(n_features=20, n_informative=8, random_state=0)
    return {
        "digits": load_digits(return_X_y=True),
        "cancer": load_breast_cancer(return_X_y=True),
        "wine": load_wine(return_X_y=True),
        "made, 2 classes": make_classification(6000, flip_y=0.1, **easy),
        "made, 5 classes": make_classification(6000, n_classes=5, flip_y=0.02, **easy),
        "made, separable": make_classification(6000, class_sep=2.0, flip_y=0.0, **easy),
    }


def models(seed: int) -> dict[str, Any]:
    """Name -> unfitted model."""
    return {
        "logistic": make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000)),
        "mlp": make_pipeline(
            StandardScaler(),
            MLPClassifier(64, alpha=0.3, early_stopping=True, max_iter=300, random_state=seed),
        ),
        "forest": RandomForestClassifier(200, min_samples_leaf=2, random_state=seed),
        "extra trees": ExtraTreesClassifier(200, min_samples_leaf=2, random_state=seed),
    }


def main() -> int:
    """Record every curve; 0."""
    curves = []
    for data, (x, y) in data_sets().items():
        classes = np.unique(y)
        for name in models(0):
            points = []
            for seed in range(SEEDS):
                order = np.random.default_rng(seed).permutation(len(y))
                held, rest = order[: len(y) // 3], order[len(y) // 3 :]
                size = len(rest)
                while size >= 40:
                    rows = rest[:size]
                    if len(np.unique(y[rows])) == len(classes):
                        model = models(seed)[name].fit(x[rows], y[rows])
                        p = np.clip(model.predict_proba(x[held]), 1e-4, None)
                        loss = log_loss(y[held], p / p.sum(1, keepdims=True), labels=classes)
                        points.append((size, round(float(loss), 5)))
                    size //= 2
            curves.append({"name": f"{data}: {name}", "points": sorted(points)})
            print(curves[-1]["name"], len(points), flush=True)
    TARGET.write_text(json.dumps(curves, indent=0))
    return 0


if __name__ == "__main__":
    sys.exit(main())
