"""Early stopping on recorded runs, beside the Trainer's patience and Prechelt's criteria.

    python scripts/benchmark.py early-stopping
    python scripts/benchmark.py early-stopping --half tune    # the runs that defaults are chosen on

Each half is 108 small trainings, recorded by scripts/early_stopping_curves.py (seeds 0: report,
1: tune). Cost is the share of a run that is trained; regret how far the best loss before the stop
lies above the run's best. The others' settings are chosen with hindsight, on the very runs they
are measured on (and on each bootstrap draw anew); ours are its defaults.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hf_recipe.instruments.rates import decay_done  # noqa: E402
from hf_recipe.regularize.early_stopping import StoppingRule  # noqa: E402
from scripts.figures import OUT, Figures  # noqa: E402

FOLDER = ROOT / "tests" / "regularize"
FILES = {"report": "stopping_curves.npz", "tune": "stopping_curves_tune.npz"}
Array = np.ndarray[Any, Any]
Rule = Callable[..., int]


def ours(values: Array, errors: Array | None = None, shares: list[float] | None = None) -> int:
    """Index of the evaluation at which our rule stops; the last one where it does not."""
    rule = StoppingRule()
    for place, value in enumerate(values):
        error = None if errors is None else float(errors[place])
        if rule.update(float(value), error, None if shares is None else shares[place]):
            return place
    return len(values) - 1


def patience(values: Array, most: int) -> int:
    """The Trainer's own callback, with a threshold of 0."""
    best, waited = math.inf, 0
    for place, value in enumerate(values):
        best, waited = (value, 0) if value < best else (best, waited + 1)
        if waited >= most:
            return place
    return len(values) - 1


def generalisation_loss(values: Array, limit: float) -> int:
    """Prechelt's GL: so many percent above the best."""
    best = math.inf
    for place, value in enumerate(values):
        best = min(best, value)
        if value > best * (1 + limit / 100):
            return place
    return len(values) - 1


def successive_rises(values: Array, strips: int, length: int) -> int:
    """Prechelt's UP: higher at the end of so many strips in a row."""
    count = 0
    for place in range(2 * length - 1, len(values), length):
        count = count + 1 if values[place] > values[place - length] else 0
        if count >= strips:
            return place
    return len(values) - 1


def quotient(values: Array, limit: float, strip: int = 5) -> int:
    """Prechelt's PQ: the loss above the best over how much the last strip still moved.

    Validation stands in for the training loss of the strip, which was not recorded.
    """
    best = math.inf
    for place, value in enumerate(values):
        best = min(best, value)
        if place + 1 < strip or (place + 1) % strip:
            continue
        last = values[place + 1 - strip : place + 1]
        progress = 1000 * (last.mean() / last.min() - 1)
        if 100 * (value / best - 1) > limit * max(progress, 1e-9):
            return place
    return len(values) - 1


OTHERS: dict[str, tuple[Rule, list[tuple[float, ...]]]] = {
    "the Trainer's patience": (patience, [(p,) for p in range(1, 31)]),
    "Prechelt's GL": (generalisation_loss, [(a,) for a in (0.5, 1, 2, 3, 5, 8, 12, 20, 40)]),
    "Prechelt's UP": (successive_rises, [(s, k) for s in (1, 2, 3, 4) for k in (1, 2, 3, 4, 5)]),
    "Prechelt's PQ": (quotient, [(a,) for a in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)]),
}


def outcome(stops: Array, loss: Array) -> tuple[Array, Array]:
    """Regret and cost of each run."""
    best = np.minimum.accumulate(loss, axis=1)[np.arange(len(loss)), stops]
    return best / loss.min(1) - 1, (stops + 1) / loss.shape[1]


def cheapest(grid: list[tuple[Array, Array]], rows: Array, budget: float) -> float:
    """Least mean cost on `rows` among settings whose mean regret stays in the budget; else 1."""
    fitting = [cost[rows].mean() for regret, cost in grid if regret[rows].mean() <= budget]
    return float(min(fitting, default=1.0))


def ratios(
    mine: tuple[Array, Array], grid: list[tuple[Array, Array]], budget: float | None, seed: int
) -> Iterator[float]:
    """Our cost over theirs at no more regret than ours (or than `budget`): all runs, then draws."""
    draw = np.random.default_rng(seed)
    count = len(mine[0])
    for number in range(501):
        rows = draw.integers(0, count, count) if number else np.arange(count)
        allowed = float(mine[0][rows].mean()) if budget is None else budget
        yield float(mine[1][rows].mean()) / cheapest(grid, rows, allowed)


def undone_decays(loss: Array) -> int:
    """How many of these curves are stopped before a decay of the rate that has not begun."""
    early = 0
    for share in (0.1, 0.2, 0.3):
        length = max(2, int(share * loss.shape[1]))
        rates = [1.0] * (loss.shape[1] - length) + [1 - (i + 1) / length for i in range(length)]
        shares = list(decay_done(rates) or [])
        early += sum(shares[ours(curve, shares=shares)] < 0.5 for curve in loss)
    return early


def main() -> int:
    """Measure, print and record; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--half", choices=sorted(FILES), default="report")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON")
    options = parser.parse_args()
    stored = np.load(FOLDER / FILES[options.half])
    loss = stored["loss"].astype(float)
    command = "scripts/benchmark.py early-stopping"
    command += f" --half {options.half}" if options.half != "report" else ""
    figures = Figures(command, "Early stopping on recorded runs", options.seed)
    figures.record("recorded runs", len(loss), least=54)
    mine = outcome(
        np.array([ours(c, e) for c, e in zip(loss, stored["paired_error"], strict=True)]), loss
    )
    figures.record("mean regret", mine[0].mean(), most=0.01)
    figures.record("95th percentile of regret", np.percentile(mine[0], 95), most=0.03)
    figures.record("cost, share of the run", mine[1].mean())
    for name, (rule, settings) in OTHERS.items():
        grid = [outcome(np.array([rule(c, *s) for c in loss]), loss) for s in settings]
        here, *draws = ratios(mine, grid, None, options.seed)
        low, high = np.quantile(draws, [0.025, 0.975])
        most = 0.95 if rule is patience else 1.0
        figures.record(
            f"cost / {name} at equal regret", here, most=most, interval=(float(low), float(high))
        )
        figures.record(f"the same, upper end, {name}", float(high), most=1.0)
        loose = next(ratios(mine, grid, 0.01, options.seed))
        figures.record(f"cost / {name}, which may lose 1 %", loose)
    regret, cost = outcome(np.array([patience(c, 1) for c in loss]), loss)
    figures.record(
        "patience 1, as it stands: regret", regret.mean(), note=f"cost {cost.mean():.3f}"
    )
    figures.record("stops before a decay to come", undone_decays(loss), most=0)
    return figures.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())
