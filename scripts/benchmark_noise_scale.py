"""The gradient noise scale out of micro-batches, against the truth from every row's own gradient.

A small network on scikit-learn's digits, trained; at several steps of several runs the estimate of
`find_batch_size` (20 large batches of 8 micro-batches) is held against tr(Sigma) / |G|^2 over all
rows. Exits 1 where the median is more than a tenth off, or the 80 % interval covers too few.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from hf_recipe.baselines.batch_search import GROUPS, MICRO
from hf_recipe.instruments.fitting import noise_scale
from scripts.figures import OUT, Figures

LOOKS = (0, 20, 100, 300)  # steps at which it is measured
OFF = 0.10  # of the truth, in the median over runs and steps
LARGEST = 300.0  # rows; above, the gradient is hardly told from noise in so few batches
ROWS = 8  # of a micro-batch
DRAWS = 3  # of the batches, at every look


def network(seed: int) -> nn.Module:
    """64 pixels, one hidden layer with LayerNorm, ten classes."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 10))


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The first 1,076 digits, standardised together."""
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(values[:1076], dtype=torch.float32)
    return (pixels - pixels.mean()) / pixels.std(), torch.tensor(labels[:1076])


def rows_gradients(model: nn.Module, values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(rows, parameters): every row's gradient."""
    parameters = dict(model.named_parameters())

    def loss(weights: Any, value: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        logits = torch.func.functional_call(model, weights, (value[None],))
        return nn.functional.cross_entropy(logits, label[None])

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, values, labels)
    return torch.cat([g.flatten(1) for g in found.values()], dim=1).double()


def measured(gradients: torch.Tensor, seed: int) -> tuple[float, float, float, float]:
    """(truth, estimate, low, high), the latter out of micro-batches drawn as the search does."""
    mean = gradients.mean(0)
    truth = float((gradients - mean).square().sum() / (len(gradients) - 1) / mean.square().sum())
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(len(gradients), generator=draw)[: MICRO * ROWS] for _ in range(GROUPS)]
    micro = gradients[torch.cat(rows)].view(GROUPS, MICRO, ROWS, -1).mean(2)
    few = micro.square().sum(-1).mean(1).tolist()
    many = micro.mean(1).square().sum(-1).tolist()
    return truth, *noise_scale(few, many, small=ROWS, large=ROWS * MICRO, population=len(gradients))


def runs(seeds: int) -> list[tuple[int, int, float, float, float, float]]:
    """(seed, step, truth, estimate, low, high) of every look."""
    values, labels = digits()
    found = []
    for seed in range(seeds):
        model = network(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        draw = torch.Generator().manual_seed(seed)
        for step in range(max(LOOKS) + 1):
            if step in LOOKS:
                each = rows_gradients(model, values, labels).detach()
                found += [(seed, step, *measured(each, DRAWS * seed + k)) for k in range(DRAWS)]
            rows = torch.randperm(len(values), generator=draw)[:64]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(values[rows]), labels[rows]).backward()
            optimizer.step()
    return found


def main() -> int:
    """Print the table; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON")
    options = parser.parse_args()
    figures = Figures(
        "scripts/benchmark.py noise-scale", "Gradient noise scale against every row's gradient"
    )
    found = runs(options.seeds)
    for step in LOOKS:
        here = [f for f in found if f[1] == step]
        truth = statistics.median(f[2] for f in here)
        told = [f for f in here if f[3] == f[3]]
        ratio = statistics.median(f[3] / f[2] for f in told) if told else float("nan")
        aimed = truth <= LARGEST
        figures.record(
            f"step {step}: estimate over truth",
            ratio,
            most=1 + OFF if aimed else None,
            least=1 - OFF if aimed else None,
            note=f"median of {len(told)} of {len(here)} looks; the truth is {truth:.0f} rows",
        )
    small = [f for f in found if f[2] <= LARGEST and f[3] == f[3]]
    figures.record(
        "80 % interval covers the truth",
        statistics.fmean(f[4] <= f[2] <= f[5] for f in small),
        least=0.65,
        note=f"{len(small)} looks",
    )
    return figures.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())
