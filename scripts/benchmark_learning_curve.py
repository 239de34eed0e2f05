"""How far off is the learning curve at twice and at four times the data?

    python scripts/benchmark.py learning-curve

Recorded held-out losses (scripts/learning_curves.py: logistic regressions, networks, forests) are
fitted up to a half or a quarter of their size and asked for the rest; made power laws say whether
the floor is found.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hf_recipe.regularize.learning_curve import fit  # noqa: E402
from scripts.figures import OUT, Figures  # noqa: E402

RECORDED = ROOT / "tests" / "regularize" / "learning_curves.json"
FEWEST = 4  # sizes that are fitted
Array = np.ndarray[Any, Any]


def extrapolations(times: int) -> tuple[Array, Array, Array]:
    """Relative errors at `times` the largest size fitted, hits of the interval, and the errors of
    whoever takes the last loss for granted."""
    errors, hits, blind = [], [], []
    for curve in json.loads(RECORDED.read_text()):
        points = np.array(curve["points"])
        for last in np.unique(points[:, 0])[-2:]:
            known = points[points[:, 0] <= last / times * 1.1]
            if len(np.unique(known[:, 0])) < FEWEST:
                continue
            truth = points[points[:, 0] == last, 1].mean()
            mean, low, high = fit(known[:, 0], known[:, 1]).predict(last)
            errors.append(abs(mean / truth - 1))
            hits.append(low <= truth <= high)
            blind.append(abs(known[known[:, 0] == known[:, 0].max(), 1].mean() / truth - 1))
    return np.array(errors), np.array(hits), np.array(blind)


def floors(count: int) -> Array:
    """Relative errors of the floors of made power laws with 2 % of noise."""
    errors = []
    for seed in range(count):
        draw = np.random.default_rng(seed)
        floor, scale, power = draw.uniform(0.1, 0.5), draw.uniform(0.5, 2), draw.uniform(0.4, 0.8)
        sizes = np.repeat(np.geomspace(100, 10_000, 7), 3)
        noise = 1 + 0.02 * draw.standard_normal(len(sizes))
        losses = (floor + scale * (sizes / 100) ** -power) * noise
        errors.append(abs(fit(sizes, losses).asymptote / floor - 1))
    return np.array(errors)


def main() -> int:
    """Measure, print and record; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON")
    options = parser.parse_args()
    figures = Figures("scripts/benchmark.py learning-curve", "Learning curves, extrapolated")
    hits = []
    for times, most in ((2, 6.5), (4, 8.4)):
        errors, inside, blind = extrapolations(times)
        figures.record(
            f"error at {times}x, median %",
            100 * float(np.median(errors)),
            most=most,
            note=f"{len(errors)} extrapolations; the last loss itself: "
            f"{100 * float(np.median(blind)):.1f}",
        )
        figures.record(f"80 % interval covers, at {times}x", inside.mean())
        hits += inside.tolist()
    figures.record("80 % interval covers", float(np.mean(hits)), least=0.7, most=0.9)
    figures.record("floor of made power laws: error, mean", floors(60).mean(), most=0.1)
    return figures.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())
