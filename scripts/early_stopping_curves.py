"""Records the validation curves that early stopping is tuned and measured on.

    python scripts/early_stopping_curves.py tests/regularize/stopping_curves.npz

108 small multilayer perceptrons, trained for real (about two minutes on one core): digits, breast
cancer and a synthetic problem, under a constant, linear or cosine rate, with 0, 10 or 30 % of the
training labels flipped, at several widths, rates and optimizers. Each is evaluated 80 times on the
same validation rows. The file holds, for every run and evaluation, the mean validation loss, its
standard error, and the standard error of its paired difference to the best evaluation before it.
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits, make_classification
from torch import nn

EVALUATIONS = 80
SCHEDULES = ("constant", "linear", "cosine")
DATA_SETS = ("digits", "cancer", "synthetic")
FLIPPED = (0.0, 0.1, 0.3)
DRAWS = 4  # models and optimizers drawn for each combination of the above

Tensors = tuple[torch.Tensor, torch.Tensor]


def data(name: str, flipped: float, rng: np.random.Generator) -> tuple[Tensors, Tensors]:
    """Training and validation rows, standardised; labels of the training part are flipped."""
    if name == "digits":
        x, y = load_digits(return_X_y=True)
    elif name == "cancer":
        x, y = load_breast_cancer(return_X_y=True)
    else:
        x, y = make_classification(
            1200,
            30,
            n_informative=8,
            n_classes=4,
            class_sep=1.2,
            random_state=int(rng.integers(1e6)),
        )
    order = rng.permutation(len(x))
    train, validation = order[: len(x) * 6 // 10], order[len(x) * 6 // 10 :]
    mean, spread = x[train].mean(0), np.maximum(x[train].std(0), 0.1 * x[train].std())
    inputs = torch.tensor((x - mean) / spread, dtype=torch.float32)
    labels = torch.tensor(y, dtype=torch.long)
    noisy = labels[train].clone()
    flip = torch.tensor(rng.random(len(train)) < flipped)
    noisy[flip] = torch.tensor(rng.integers(0, int(labels.max()) + 1, int(flip.sum())))
    return (inputs[train], noisy), (inputs[validation], labels[validation])


def rate(schedule: str, progress: float) -> float:
    """Learning rate over its peak, at a share of the run."""
    if schedule == "linear":
        return 1 - progress
    return 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0


def record(name: str, schedule: str, flipped: float, seed: int) -> np.ndarray:
    """Train once; rows of losses: (evaluations, validation rows)."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    (inputs, labels), (held_out, truth) = data(name, flipped, rng)
    width = int(rng.choice([16, 64, 256]))
    adam = bool(rng.random() < 0.6)
    peak = float(10 ** rng.uniform(-3.2, -2.5) if adam else 10 ** rng.uniform(-1.6, -1.0))
    layers: list[nn.Module] = [nn.Linear(inputs.shape[1], width), nn.ReLU()]
    if rng.random() < 0.5:
        layers += [nn.Dropout(float(rng.choice([0.0, 0.2]))), nn.Linear(width, width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(width, int(labels.max()) + 1))
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(model.parameters(), lr=peak)
        if adam
        else torch.optim.SGD(model.parameters(), lr=peak, momentum=0.9)
    )
    every = int(rng.choice([10, 20, 40]))
    steps = EVALUATIONS * every
    rows = []
    for step in range(steps):
        chosen = torch.tensor(rng.integers(0, len(inputs), 128))
        for group in optimizer.param_groups:
            group["lr"] = peak * rate(schedule, step / steps)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[chosen]), labels[chosen]).backward()
        optimizer.step()
        if (step + 1) % every == 0:
            model.eval()
            with torch.no_grad():
                losses = nn.functional.cross_entropy(model(held_out), truth, reduction="none")
            rows.append(losses.numpy().astype(np.float64))
            model.train()
    return np.stack(rows)


def summarise(losses: np.ndarray) -> np.ndarray:
    """(3, evaluations): mean, its standard error, standard error of its difference to the best."""
    means, size = losses.mean(1), losses.shape[1]
    errors = losses.std(1, ddof=1) / math.sqrt(size)
    paired = np.zeros(len(losses))
    for i in range(1, len(losses)):
        best = int(means[:i].argmin())
        paired[i] = (losses[i] - losses[best]).std(ddof=1) / math.sqrt(size)
    return np.stack([means, errors, paired])


def main() -> None:
    """Record every run and write one compressed file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="another seed records other runs")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    cases = list(itertools.product(DATA_SETS, SCHEDULES, FLIPPED, range(DRAWS)))
    curves = []
    for number, (name, schedule, flipped, _) in enumerate(cases):
        curves.append(summarise(record(name, schedule, flipped, chosen.seed * 1000 + number)))
    values = np.stack(curves).astype(np.float32)
    np.savez_compressed(
        chosen.path,
        loss=values[:, 0],
        standard_error=values[:, 1],
        paired_error=values[:, 2],
        schedule=np.array([schedule for _, schedule, _, _ in cases]),
        data=np.array([name for name, _, _, _ in cases]),
    )
    print(f"{len(cases)} runs in {chosen.path}")


if __name__ == "__main__":
    main()
