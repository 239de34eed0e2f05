"""Figures and their targets, each from a command; exits 1 when a target is missed.

    python scripts/benchmark.py overhead       # what attach() costs a step
    python scripts/benchmark.py healthy        # how many healthy runs raise an alarm
    python scripts/benchmark.py --help         # the rest: each benchmark_NAME.py is a command NAME

Speeds are ratios within one run, paired and interleaved: machines are shared and noisy. Every
command prints its figures and writes them as JSON, with commit, versions and seeds, to --out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.figures import OUT, Figures  # noqa: E402

# ---------------------------------------------------------------------------- healthy


def healthy(options: argparse.Namespace) -> int:
    """Every healthy run of the gallery over several seeds: how many raise an alarm."""
    from tests.gallery.harness import alarms, run
    from tests.gallery.healthy import HEALTHY

    figures = Figures(
        f"scripts/benchmark.py healthy --seeds {options.seeds}",
        "Healthy runs that raise an alarm",
        options.seed,
    )
    runs = flagged = 0
    for case in HEALTHY:
        told: list[str] = []
        for seed in range(options.seed, options.seed + options.seeds):
            with tempfile.TemporaryDirectory() as folder:
                told += sorted(alarms(run(case.build(Path(folder), seed))) - set(case.may))
            runs += 1
        if told:
            flagged += 1
            figures.record(case.name, len(told), most=0, note=", ".join(sorted(set(told))))
    figures.record("kinds of healthy run flagged", flagged, most=0, note=f"of {len(HEALTHY)}")
    figures.record("runs in all", runs)
    return figures.finish(options.out)


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "healthy": healthy,
}
SCRIPTS = {  # benchmark_loss_law.py is the command loss-law
    path.stem.removeprefix("benchmark_").replace("_", "-"): path
    for path in sorted(Path(__file__).parent.glob("benchmark_*.py"))
}


def main() -> int:
    """Run one command; 1 if one of its targets is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=sorted([*COMMANDS, *SCRIPTS]))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each healthy run")
    if sys.argv[1:2] and sys.argv[1] in SCRIPTS:  # a script of its own, with flags of its own
        command = [sys.executable, str(SCRIPTS[sys.argv[1]]), *sys.argv[2:]]
        return subprocess.run(command, cwd=ROOT).returncode
    options = parser.parse_args()
    return COMMANDS[options.command](options)


if __name__ == "__main__":
    sys.exit(main())
