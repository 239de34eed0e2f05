"""The recipe's side of experiment tracking: what is told to W&B, and when. Rank 0 alone."""

from __future__ import annotations

from pathlib import Path

from hf_recipe.core.finding import Finding
from hf_recipe.core.report import Report


class Tracker:
    """Sends findings to the W&B run, where one exists; it never starts one."""

    def __init__(self, *, log_samples: bool) -> None:
        self.log_samples = log_samples

    def alert(self, finding: Finding) -> None:
        """Tell of an error at once."""

    def finish(self, report: Report, page: Path, step: int) -> None:
        """Log findings, summary and page."""
