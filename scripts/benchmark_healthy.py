"""Healthy runs: how many raise an alarm, crash a check, or end on other weights than bare ones.

    python scripts/benchmark_healthy.py --seeds 3            # or: scripts/benchmark.py healthy
    python scripts/benchmark_healthy.py --only N05 --seeds 1

Every healthy run of the gallery over several seeds, watched by `hf_recipe.attach` alone, as its
author would; every other seed asks for `preflight()` too. The first seed is trained bare as well,
and weights, optimizer, random state and logged losses are compared bit by bit.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.figures import OUT, Figures  # noqa: E402


def seeded(seed: int) -> None:
    """Let a run whose author forgot to seed its model begin alike, watched and bare."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def watched(case: Any, seed: int) -> tuple[list[str], int, str]:
    """Alarms and notes of one watched run, and the signature of what it left."""
    import hf_recipe
    from tests.gallery.harness import alarms
    from tests.models import signature

    with tempfile.TemporaryDirectory() as folder:
        seeded(seed)
        trainer = case.build(Path(folder) / "run", seed)
        recipe = hf_recipe.attach(trainer)
        if seed % 2:
            recipe.preflight()
        trainer.train()
        report = recipe.report
        told = sorted(alarms(report) - set(case.may)) + [f"crashed: {n}" for n in report.crashed]
        notes = len({f.check for f in report.findings if f.severity == "note"})
        return told, notes, signature(trainer)


def bare(case: Any, seed: int) -> str:
    """The signature of the same run without the recipe."""
    from tests.models import signature

    with tempfile.TemporaryDirectory() as folder:
        seeded(seed)
        trainer = case.build(Path(folder) / "run", seed)
        trainer.train()
        return signature(trainer)


def main() -> int:
    """Run the list; 1 if any run raises an alarm, crashes a check or ends otherwise than bare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3, help="of each healthy run")
    parser.add_argument("--only", default="", help="runs whose name holds this")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON")
    options = parser.parse_args()
    from tests.gallery.healthy import HEALTHY
    from tests.gallery.healthy_heads import HEADS
    from tests.gallery.healthy_more import MORE
    from tests.gallery.healthy_scripts import SCRIPTS

    everything = (*HEALTHY, *MORE, *SCRIPTS, *HEADS)
    cases = [case for case in everything if options.only in case.name]
    figures = Figures(
        f"scripts/benchmark.py healthy --seeds {options.seeds}",
        "Healthy runs that raise an alarm",
        options.seed,
    )
    flagged = other = runs = 0
    notes: list[int] = []
    for case in cases:
        told: list[str] = []
        for seed in range(options.seed, options.seed + options.seeds):
            alarms, count, left = watched(case, seed)
            told += alarms
            notes.append(count)
            runs += 1
            if seed == options.seed and left != bare(case, seed):
                other += 1
                figures.record(f"{case.name}: other than bare", 1, most=0)
        if told:
            flagged += 1
            figures.record(case.name, len(told), most=0, note=", ".join(sorted(set(told))))
    figures.record("kinds of healthy run flagged", flagged, most=0, note=f"of {len(cases)}")
    figures.record("runs that end otherwise than bare", other, most=0, note=f"of {len(cases)}")
    figures.record("notes a run, mean", statistics.fmean(notes) if notes else 0.0, most=3)
    figures.record("runs in all", runs)
    return figures.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())
