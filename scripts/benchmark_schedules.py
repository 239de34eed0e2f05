"""Verdicts on schedules: F1 over a hundred generated ones a seed, healthy and faulty.

Linear, cosine, WSD, restarts, cycles, steps, polynomial, inverse root, exponential and plateau
schedules, over runs of 20 to 1,500 steps; faulty ones never decay, decay early (also by stepping
once per process), or warm up too long. Exits 1 where F1 is under its target.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.figures import OUT, Figures

F1 = 0.95


def main() -> int:
    """Print F1 of every seed; 1 if one is under its target."""
    from tests.complexify.schedules import score

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=100, help="the first; the tests use 0 and 1")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch.optim")
    figures = Figures("scripts/benchmark.py schedules", "Verdicts on schedules", options.seed)
    for seed in range(options.seed, options.seed + options.seeds):
        f1, missed, wrong = score(seed)
        note = "; ".join(
            f"{what}: {', '.join(f'{name} of {steps}' for name, steps, _ in found)}"
            for what, found in (("missed", missed), ("wrong", wrong))
            if found
        )
        figures.record(f"seed {seed}: F1 on 100 schedules", f1, least=F1, note=note)
    return figures.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())
