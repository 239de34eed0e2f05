"""The recipe's side of experiment tracking: what is told to trackers, and when. Rank 0 alone."""

from __future__ import annotations

from hf_recipe.core.finding import Finding
from hf_recipe.core.report import Report
from hf_recipe.report.tracking import TrackingSink


class Tracker:
    """Sends findings to the runs of W&B and trackio that exist; it never starts one."""

    def __init__(self, *, log_samples: bool) -> None:
        self.sink = TrackingSink(("wandb", "trackio"), log_samples=log_samples)

    def alert(self, finding: Finding) -> None:
        """Tell of an error at once."""
        self.sink.alert(finding)

    def update(self, report: Report, step: int) -> None:
        """Log the counts of findings, if they changed."""
        self.sink.update(report, step)

    def finish(self, report: Report, step: int) -> None:
        """Log findings, summary and page."""
        self.sink.close(report, step)
