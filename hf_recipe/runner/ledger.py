"""What was tried: one line per experiment in `experiments.csv`, one W&B run each, in one group."""

from __future__ import annotations

import contextlib
import csv
import json
import netrc
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from hf_recipe.instruments.compare import Outcome, Variant

COLUMNS = (
    "number",
    "time",
    "stage",
    "change",
    "seed",
    "note",
    "validation_loss",
    "standard_error",
    "metric",
    "best_validation_loss",
    "seconds",
    "config",
    "command",
    "git",
    "key",
)


SEEN_BEFORE = "validation was learned from: not a score"


@dataclass
class Ledger:
    """Appends to a csv; a line that is there already is not written again.

    Attributes:
        path: of the csv.
        command: the exact command line.
        git: commit and whether the tree was changed; "" outside a repository.
    """

    path: Path
    command: str
    git: str

    def record(self, stage: str, variant: Variant, outcome: Outcome, note: str) -> int:
        """Write one experiment; returns its number, from 1."""
        known = self.read()
        for line in known:
            if line["key"] == variant.key:
                return int(line["number"])
        fair = [float(line["validation_loss"]) for line in known if line["note"] != SEEN_BEFORE]
        fair += [outcome.loss] if note != SEEN_BEFORE else []
        finite = [loss for loss in fair if loss == loss]
        row: dict[str, Any] = {
            "number": len(known) + 1,
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
            "stage": stage,
            "change": variant.change,
            "seed": variant.seed,
            "note": note,
            "validation_loss": f"{outcome.loss:.6f}",
            "standard_error": f"{outcome.standard_error:.6f}",
            "metric": "" if outcome.metric is None else f"{outcome.metric:.6f}",
            "best_validation_loss": f"{min(finite):.6f}" if finite else "",
            "seconds": f"{outcome.cost:.2f}",
            "config": json.dumps(dict(variant.settings), sort_keys=True),
            "command": self.command,
            "git": self.git,
            "key": variant.key,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if fresh:
                writer.writeheader()
            writer.writerow(row)
        return len(known) + 1

    def read(self) -> list[dict[str, str]]:
        """The experiments so far."""
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file) if row.get("key")]


def git_state() -> str:
    """The commit of the working folder, with "+changes" where files differ from it; or ""."""
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        return commit + ("+changes" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return ""


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def command_line() -> str:
    """The command as it was typed, as far as a process can know."""
    return " ".join([Path(sys.executable).name, *sys.argv])


@contextlib.contextmanager
def tracked(
    *, project: str, group: str, name: str, folder: Path, config: Mapping[str, Any]
) -> Iterator[Any]:
    """One W&B run; offline where there is no key, and never a question.

    Left open, the next Trainer of this process would log into it.
    """
    import wandb

    mode: Any = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
    folder.mkdir(parents=True, exist_ok=True)
    # A sweep's agent has given the run its project and name; saying others is a warning.
    named: Any = (
        {} if "WANDB_SWEEP_ID" in os.environ else dict(project=project, group=group, name=name)
    )
    run = wandb.init(
        **named,
        dir=str(folder),
        mode=mode,
        config=dict(config),
        reinit="finish_previous",
        settings=wandb.Settings(silent=True, console="off"),
    )
    try:
        yield run
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
