"""Figures and their targets, each from a command; exits 1 when a target is missed.

    python scripts/benchmark.py overhead       # what attach() costs a step
    python scripts/benchmark.py healthy        # how many healthy runs raise an alarm
    python scripts/benchmark.py --help         # the rest: each benchmark_NAME.py is a command NAME

Speeds are ratios within one run, paired and interleaved: machines are shared and noisy. Every
command prints its figures and writes them as JSON, with commit, versions and seeds, to --out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {  # benchmark_loss_law.py is the command loss-law
    path.stem.removeprefix("benchmark_").replace("_", "-"): path
    for path in sorted(Path(__file__).parent.glob("benchmark_*.py"))
}


def main() -> int:
    """Run one command; 1 if one of its targets is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=sorted(SCRIPTS), help="the rest is its own: --help")
    chosen = parser.parse_args(sys.argv[1:2]).command
    command = [sys.executable, str(SCRIPTS[chosen]), *sys.argv[2:]]
    return subprocess.run(command, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
