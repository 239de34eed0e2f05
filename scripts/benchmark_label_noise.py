"""Wrong labels found by a training run's own margins: digits with planted flips, a real Trainer.

    python scripts/benchmark.py label-noise     # or this file; --seeds 1 --cells sym:0.1 for less

Symmetric and pair flips at 10 and 20 %: average precision of the ranking, beside the best that
out-of-sample probabilities of the same network give (5 folds: five more trainings). Clean labels
must raise no alarm. The margins' cost is measured in random blocks of 50 steps of one run.
Exits 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hf_recipe
from hf_recipe.data.suspect_label import rank
from scripts.figures import OUT, Figures

TARGET = {"sym": 0.985, "pair": 0.93}
BLOCK = 50  # steps between two switches
LIMIT = 1.02
EPOCHS = 40


class Network(nn.Module):
    """Two hidden layers over 64 pixels; `depth` more of `width` make its step as long as wanted."""

    def __init__(self, width: int = 128, depth: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(64, width), nn.ReLU()]
        for _ in range(depth):
            layers += [nn.Linear(width, width), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, 10))

    def forward(self, pixels: Any = None, labels: Any = None) -> dict[str, Any]:
        logits = self.net(pixels)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits} if loss is not None else {"logits": logits}


def flipped(labels: np.ndarray, kind: str, rate: float, seed: int) -> np.ndarray:
    """Labels of which `rate` are wrong: any other class ("sym") or the next one ("pair")."""
    draw = np.random.default_rng(seed)
    wrong = draw.random(len(labels)) < rate
    shift = 1 if kind == "pair" else draw.integers(1, 10, len(labels))
    return np.where(wrong, (labels + shift) % 10, labels)


def trainer(
    pixels: np.ndarray, labels: np.ndarray, folder: str, seed: int, **changes: Any
) -> Trainer:
    """A Trainer as a user would set it up, with its own defaults for all that matters."""
    torch.manual_seed(seed)
    model = changes.pop("model", None) or Network()
    chosen = {"num_train_epochs": EPOCHS, "per_device_train_batch_size": 32, "learning_rate": 1e-3}
    args = TrainingArguments(
        output_dir=folder,
        seed=seed,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        log_level="error",
        **{**chosen, **changes},
    )
    data = datasets.Dataset.from_dict({"pixels": pixels.tolist(), "labels": labels.tolist()})
    return Trainer(model=model, args=args, train_dataset=data)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Swallow what the Trainer and the recipe print."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def margins_of_run(pixels: np.ndarray, labels: np.ndarray, seed: int) -> tuple[np.ndarray, bool]:
    """How suspect each row is after one training run, and whether it raised an alarm."""
    with tempfile.TemporaryDirectory() as folder, quietly():
        run = trainer(pixels, labels, folder, seed)
        recipe = hf_recipe.attach(run, select=["suspect-label"])
        run.train()
    watch = recipe.closer_look.margins
    order = rank(watch.scores(), watch.labels.astype(int), watch.others.astype(int))
    suspicion = np.empty(len(order))
    suspicion[order] = -np.arange(len(order))
    return suspicion, bool(recipe.findings)


def by_folds(pixels: np.ndarray, labels: np.ndarray, wrong: np.ndarray, seed: int) -> float:
    """The best average precision of out-of-sample probabilities: self-confidence, or margin."""
    probabilities = np.zeros((len(labels), 10))
    for train, held in StratifiedKFold(5, shuffle=True, random_state=seed).split(pixels, labels):
        with tempfile.TemporaryDirectory() as folder, quietly():
            run = trainer(pixels[train], labels[train], folder, seed)
            run.train()
            with torch.no_grad():
                logits = run.model(torch.tensor(pixels[held], dtype=torch.float32))["logits"]
            probabilities[held] = logits.softmax(-1).numpy()
    own = probabilities[np.arange(len(labels)), labels]
    rest = probabilities.copy()
    rest[np.arange(len(labels)), labels] = -1
    return float(max(average_precision_score(wrong, -s) for s in (own, own - rest.max(1))))


class Toggle(TrainerCallback):
    """Pauses and resumes the recipe in random order within each pair of blocks."""

    def __init__(self, steps: int, seed: int) -> None:
        draw = random.Random(seed)
        self.order = [on for _ in range(steps // (2 * BLOCK)) for on in draw.sample([1, 0], 2)]
        self.cost: list[float] = []
        self.began = 0.0
        self.recipe: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % BLOCK:
            return
        now = time.process_time()
        if state.global_step:
            self.cost.append(now - self.began)
        block = state.global_step // BLOCK
        watch = self.recipe.closer_look.margins
        watch.last_step = 10**9
        if block < len(self.order):
            (self.recipe.resume if self.order[block] else self.recipe.pause)()
            (watch.arm(kwargs["model"]) if self.order[block] else watch.disarm())
        self.began = time.process_time()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.cost.append(time.process_time() - self.began)


def median_interval(values: list[float], seed: int) -> tuple[float, float, float]:
    """Median with its 95 % bootstrap interval, as ratios."""
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(1000))
    middle, low, high = (
        math.exp(v) for v in (statistics.median(values), medians[25], medians[974])
    )
    return middle, low, high


def cost(steps: int, seed: int) -> tuple[float, float, float]:
    """The step's cost with the margins on against off: median ratio and its interval."""
    pixels, labels = load_digits(return_X_y=True)
    toggle = Toggle(steps, seed)
    with tempfile.TemporaryDirectory() as folder, quietly():
        model = Network(512, 4)  # about 3 ms a step
        run = trainer(pixels / 16, labels, folder, seed, model=model, max_steps=steps)
        toggle.recipe = hf_recipe.attach(run, select=["suspect-label"])
        run.callback_handler.callbacks.insert(0, toggle)
        run.train()
    ratios = []
    for i in range(2, len(toggle.order) - 1, 2):  # the first pair warms up
        on, off = (i, i + 1) if toggle.order[i] else (i + 1, i)
        ratios.append(math.log(toggle.cost[on] / toggle.cost[off]))
    return median_interval(ratios, seed)


def main() -> int:
    """Print the table; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4000, help="of the run that measures the cost")
    parser.add_argument("--cells", nargs="*", default=["sym:.1", "sym:.2", "pair:.1", "pair:.2"])
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pixels, truth = load_digits(return_X_y=True)
    pixels = pixels / 16
    title = "Wrong labels found by a training run's own margins (digits, average precision)"
    figures = Figures(f"scripts/benchmark.py label-noise --seeds {options.seeds}", title)
    for cell in options.cells:
        kind, rate = cell.split(":")
        name, ours, theirs = f"{kind} flips of {float(rate):.0%}", [], []
        for seed in range(options.seeds):
            labels = flipped(truth, kind, float(rate), seed)
            wrong = labels != truth
            suspicion, told = margins_of_run(pixels, labels, seed)
            ours.append(float(average_precision_score(wrong, suspicion)))
            theirs.append(by_folds(pixels, labels, wrong, seed))
            figures.record(
                f"{name}, seed {seed}",
                ours[-1],
                least=TARGET[kind],
                note=f"5 folds of the same network {theirs[-1]:.4f}",
            )
            figures.record(f"{name}, seed {seed}: found", told, least=1)
        figures.record(
            f"{name}: mean, less that of 5 folds",
            statistics.fmean(ours) - statistics.fmean(theirs),
            least=0,
        )
    for seed in range(options.seeds):
        alarm = margins_of_run(pixels, truth, seed)[1]
        figures.record(f"clean labels, seed {seed}: alarms", alarm, most=0)
    ratio = cost(options.steps, 0)
    figures.record(
        "cost of the margins, ratio of the step", ratio[0], most=LIMIT, interval=ratio[1:]
    )
    return figures.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())
