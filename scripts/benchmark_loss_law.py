"""How well the loss law predicts the final loss under schedules that it has not seen.

Prints a table for recorded curves (columns model, schedule, step, learning_rate, loss) and exits
1 when a target is missed. By default the curves are those of the tests, thinned from the public
repository MultiPowerLaw (MIT licence, Copyright (c) 2025 Kairong Luo).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_recipe.complexify.loss_law import fit
from scripts.figures import OUT, Figures

CURVES = Path(__file__).resolve().parents[1] / "tests" / "complexify" / "lr_curves.npz"
WARM_UP = 2160
FITS = {
    "one WSD run": (("wsd_20000_24000",),),
    "one WSD run, linear decay": (("wsdld_20000_24000",),),
    "constant and two-stage": tuple(("constant_24000", f"wsdcon_{k}") for k in (3, 9, 18)),
    "lone cosine": (("cosine_24000",),),
    "lone constant": (("constant_24000",),),
}
ERROR = {"one WSD run": 0.18, "constant and two-stage": 0.23}  # percent of the final loss
BETTER = 6.0
COVERAGE = (0.7, 0.9)  # of 80 % intervals, on a few dozen predictions: 0.8 and chance

Run = tuple[Any, Any, Any]


def read_curves(path: Path) -> dict[str, dict[str, Run]]:
    """Model -> schedule -> (rates of every step, observed steps, losses)."""
    found: dict[str, dict[str, Run]] = {}
    stored = np.load(path)
    for key in stored.files:
        model, schedule = key.split("/")
        steps, rates, losses = stored[key].astype(float)
        every = np.interp(np.arange(int(steps[-1]) + 1), steps, rates)
        every[:WARM_UP] = rates[0] * np.arange(1, WARM_UP + 1) / WARM_UP
        found.setdefault(model, {})[schedule] = (every, steps, losses)
    return found


def blind(runs: list[Run], steps: int) -> float:
    """The final loss by a power law in steps, that knows no schedule.

    Fitted as scaling laws usually are: Huber's loss on the logarithm (Hoffmann et al. 2022).
    """
    at = np.concatenate([run[1] for run in runs]) / 1e4
    losses = np.concatenate([run[2] for run in runs])

    def residuals(law: Any) -> Any:
        return np.log(law[0] + law[1] * at ** -law[2]) - np.log(losses)

    start, bounds = (losses.min() * 0.9, 0.3, 0.5), (0, [np.inf, np.inf, 5])
    found = least_squares(residuals, start, bounds=bounds, loss="huber", f_scale=1e-3).x
    return float(found[0] + found[1] * (steps / 1e4) ** -found[2])


def measure(curves: dict[str, dict[str, Run]], fitted: tuple[tuple[str, ...], ...]) -> Any:
    """Relative errors of law and blind fit, hits of the interval, and the undecided."""
    errors, others, hits, undecided = [], [], [], []
    for schedules in curves.values():
        for names in fitted:
            runs = [schedules[name] for name in names]
            law = fit(runs)
            undecided.append(law.undecided)
            for name, (rates, steps, losses) in schedules.items():
                if name in names:
                    continue
                low, high = law.interval(rates)
                errors.append(abs(law.predict(rates)[-1] / losses[-1] - 1) * 100)
                others.append(abs(blind(runs, steps[-1]) / losses[-1] - 1) * 100)
                hits.append(low <= losses[-1] <= high)
    return map(np.array, (errors, others, hits, undecided))


def main() -> int:
    """Print the table; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--curves", type=Path, default=CURVES)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON")
    options = parser.parse_args()
    curves = read_curves(options.curves)
    figures = Figures("scripts/benchmark.py loss-law", "Final loss under schedules not seen")
    for what, fitted in FITS.items():
        errors, others, hits, undecided = measure(curves, fitted)
        aimed = what in ERROR
        note = f"worst {errors.max():.3f}, blind to the schedule {others.mean():.3f}"
        figures.record(f"{what}: error, %", errors.mean(), most=ERROR.get(what), note=note)
        ratio = others.mean() / errors.mean()
        figures.record(f"{what}: times better than blind", ratio, least=BETTER if aimed else None)
        low, high = COVERAGE
        figures.record(
            f"{what}: 80 % interval covers",
            hits.mean(),
            least=low if aimed or what.startswith("lone") else None,
            most=high if aimed else None,
        )
        if aimed or what.startswith("lone"):
            figures.record(
                f"{what}: undecided",
                undecided.mean(),
                most=0 if aimed else None,
                least=None if aimed else 1,
            )
    return figures.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())
