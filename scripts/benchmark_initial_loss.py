"""Measure the expected initial loss on fresh and faulty models; exit 1 when a target is missed.

    python scripts/benchmark_initial_loss.py [--seeds 300]

Targets: no false alarm on fresh networks; the expectation within 1 % (median) and 3 % (worst) of
the loss of tiny models of every head; 95 % of the faults found whose effect exceeds 4 standard
errors.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hf_recipe.baselines.initial_loss import expected_initial_loss
from scripts.figures import OUT, Figures

Table = tuple[str, torch.Tensor, torch.Tensor, int]


def tables() -> Iterator[Table]:
    """(name, inputs, labels, rows per draw) of real data with 2, 3 and 10 classes."""
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16).float(), torch.tensor(digits.target)
    yield "digits, n = 256", x, y, 256
    yield "digits, n = 1797", x, y, 1797
    for classes in (2, 3, 5):
        yield f"digits, {classes} classes", x[y < classes], y[y < classes], int((y < classes).sum())
    rare = (y == 0) | (torch.rand(len(y), generator=torch.Generator().manual_seed(0)) < 0.05)
    yield "digits, imbalanced", x[rare], y[rare], int(rare.sum())
    for name, data in (("cancer, 2 classes", load_breast_cancer()), ("wine", load_wine())):
        inputs = torch.tensor((data.data - data.data.mean(0)) / data.data.std(0)).float()
        yield name, inputs, torch.tensor(data.target), len(data.target)


FAULTS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum": lambda z, y: functional.cross_entropy(z, y, reduction="sum"),
    "negated": lambda z, y: -functional.cross_entropy(z, y),
    "divided by 4": lambda z, y: functional.cross_entropy(z, y) / 4,
    "softmax twice": lambda z, y: functional.cross_entropy(z.softmax(-1), y),
    "wrong bias, expected without": lambda z, y: functional.cross_entropy(
        z + 5 * functional.one_hot(y[:1], z.shape[1]), y
    ),
    "logits x 50": lambda z, y: functional.cross_entropy(50 * z, y),
    "labels known": lambda z, y: functional.cross_entropy(
        z + 4 * functional.one_hot(y, z.shape[1]), y
    ),
}


def false_alarms(seeds: int) -> list[dict[str, float | str]]:
    """Fresh networks on real data: alarms at 4 standard errors with a floor of 0.5 %."""
    made: list[dict[str, float | str]] = []
    for name, x, y, rows in tables():
        for depth in (0, 1, 2):
            alarms, scores, found, beyond = 0, [], 0, 0
            for seed in range(seeds):
                torch.manual_seed(seed)
                chosen = torch.randperm(len(y))[:rows]
                with torch.no_grad():
                    z = network(x.shape[1], int(y.max()) + 1, depth)(x[chosen])
                expected, error = expected_initial_loss(z, y[chosen])
                limit = 4 * error + 0.005 * expected
                loss = float(functional.cross_entropy(z, y[chosen]))
                alarms += not abs(loss - expected) <= limit
                scores.append((loss - expected) / error)
                for fault in FAULTS.values():
                    seen = float(fault(z, y[chosen]))
                    beyond += abs(seen - loss) > limit
                    found += abs(seen - loss) > limit and not abs(seen - expected) <= limit
            made.append(
                {
                    "data": name,
                    "hidden layers": depth,
                    "false alarms": alarms / seeds,
                    "worst |z|": max(map(abs, scores)),
                    "sd of z": statistics.pstdev(scores),
                    "faults found": found / beyond,
                }
            )
    return made


def network(inputs: int, classes: int, depth: int) -> nn.Sequential:
    """A fresh multilayer perceptron with `depth` hidden layers of 64."""
    widths = [inputs, *[64] * depth]
    layers = [
        layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def head_errors() -> dict[str, float]:
    """Relative error of the expectation on a tiny fresh model of every softmax or BCE head."""
    import transformers

    from hf_recipe.baselines.initial_loss import PROBE, InitialLoss
    from tests.baselines.start_cases import CASES, examined, trainer_of

    transformers.logging.set_verbosity_error()
    errors = {}
    for name, build in CASES.items():
        torch.manual_seed(0)
        model, rows = build()
        examiner = examined(trainer_of(model, rows, remove_unused_columns=False), PROBE)
        start = examiner.latest["InitialLoss"]
        assert isinstance(start, InitialLoss)
        errors[name] = abs(start.observed - start.expected) / start.observed
        if start.problem_type == "regression":
            del errors[name]  # the scale of a target is not a head's to know
    return errors


def main() -> int:
    """Print the figures; 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=300)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    command = f"scripts/benchmark.py initial-loss --seeds {options.seeds}"
    figures = Figures(command, "The loss before the first step")
    rows = false_alarms(options.seeds)
    shares = [float(row["false alarms"]) for row in rows]
    note = f"{len(rows)} pairs of data and depth, {options.seeds} fresh networks each"
    figures.record("share of fresh networks flagged", statistics.mean(shares), most=0, note=note)
    least = min(rows, key=lambda row: float(row["faults found"]))
    note = f"{least['data']}, {least['hidden layers']} hidden layers"
    found = float(least["faults found"])
    figures.record("faults beyond 4 standard errors found, worst", found, least=0.95, note=note)
    errors = head_errors()
    figures.record("heads and models", len(errors), least=26)
    figures.record("expectation's error, median", statistics.median(errors.values()), most=0.01)
    worst = max(errors, key=lambda name: errors[name])
    figures.record("expectation's error, worst", errors[worst], most=0.03, note=worst)
    return figures.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())
