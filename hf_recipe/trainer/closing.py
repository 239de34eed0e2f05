"""What becomes of the findings: the console at once, files while the run goes on, W&B at the end.

Everything here happens on rank 0 alone, and nothing of it is a collective.
"""

from __future__ import annotations

import dataclasses
import logging
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import accelerate
import datasets
import torch
import transformers

from hf_recipe.complexify.schedule_advice import Outlook, advise, picture
from hf_recipe.core.check import plain, typed
from hf_recipe.core.exhibit import Curve, Line, Series
from hf_recipe.core.finding import Finding
from hf_recipe.instruments.distributed import rank, world_size
from hf_recipe.instruments.window import Evaluation
from hf_recipe.report.console import ConsoleSink
from hf_recipe.report.tracking import TrackingSink
from hf_recipe.trainer.album import TABLES

if TYPE_CHECKING:
    from hf_recipe.trainer.recipe import Recipe


logger = logging.getLogger(__name__)

STATE_KEY = "hf_recipe"
WRITE_EVERY = 5.0  # seconds between two reports of a run in which nothing is found


class Closing:
    """Renders one recipe's report: console, files, tracker; and keeps what rides in checkpoints."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.console = ConsoleSink(enabled=rank() == 0)
        self.tracking = TrackingSink(log_samples=recipe.settings.log_samples)
        self.folder = Path(recipe.settings.report_dir or "recipe")
        self.evaluations: dict[str, Series] = {}
        self.state: dict[str, Any] = {}
        self.saved_state: dict[str, Any] = {}  # rate and step, to compare with after a resume
        self.margins: dict[str, Any] = {}  # of each row's label, as of the last checkpoint
        self._summarised = 0
        self._untold = False
        self._outlook: Outlook | None = None
        self._kept: list[Finding] = []  # the findings that `_plain` holds, as JSON
        self._plain: list[Any] = []
        self._written = -WRITE_EVERY
        trainer = recipe.trainer
        if trainer is not None:
            self.place(trainer.args)

    def place(self, args: Any) -> None:
        """Choose the report's folder."""
        chosen = self.recipe.settings.report_dir
        self.folder = Path(chosen) if chosen else Path(args.output_dir or ".") / "recipe"

    # ---------------------------------------------------------------- moments

    def started(self, args: Any, state: Any) -> None:
        """A run begins (or begins again)."""
        self.place(args)
        if rank() == 0 and "trackio" in args.report_to:
            self.tracking.trackers = ("wandb", "trackio")
        report = self.recipe.report
        report.status = "running"
        report.environment.update(environment(args))
        if not report.title:
            report.title = str(getattr(args, "run_name", None) or args.output_dir or "training")

    def heard(self, finding: Finding) -> None:
        """A finding is new."""
        self.console.finding(finding)
        self._untold = True

    def after_preflight(self) -> None:
        """The probes have run."""
        self.write()
        self.tell(self.recipe.recorder.last_step)

    def evaluated(self, evaluation: Evaluation) -> None:
        """An evaluation is over: draw its loss, write the report."""
        loss = next((v for k, v in evaluation.metrics.items() if k.endswith("_loss")), None)
        if evaluation.row_losses:
            finite = [value for value in evaluation.row_losses if value == value]
            loss = sum(finite) / len(finite) if finite else loss
        if loss is not None:
            self.evaluations.setdefault(evaluation.split, Series()).add(evaluation.step, loss)
        if self._untold or time.monotonic() - self._written > WRITE_EVERY:
            self.write()
        self.tell(evaluation.step)

    def finished(self, state: Any) -> None:
        """The run is over: say why what did not run did not, then render everything."""
        recipe = self.recipe
        recipe.report.status = "finished"
        recipe.examiner.close()
        self.tell(state.global_step)
        self._draw()
        self.write(page=True)
        if rank() == 0:
            self.tracking.close(recipe.report, state.global_step, tables=TABLES)
        found = sum(f.count for f in recipe.report.flat) + len(recipe.report.crashed)
        if found != self._summarised or not self._summarised:
            self._summarised = found
            self.console.summary(recipe.report, path=self.folder / "report.html")

    def tell(self, step: int) -> None:
        """Bring the trackers up to date, if anything was found since they last were."""
        outlook = self.recipe.examiner.latest.get(Outlook.kind())
        if isinstance(outlook, Outlook) and outlook is not self._outlook:
            self._outlook = outlook
            self.recipe.report.answer(advise(outlook))
            self.recipe.report.exhibit(picture(outlook))
        if self._untold and rank() == 0:
            self.tracking.update(self.recipe.report, step)
            self._untold = False

    def follow(self, numbers: Mapping[str, float], step: int) -> None:
        """Numbers of this moment, for a tracker that draws them over the run."""
        if rank() == 0 and numbers:
            self.tracking.follow(numbers, step)

    def crashed(self, where: str, error: Exception) -> None:
        """Something of ours broke outside of a check."""
        logger.warning(
            "hf_recipe stopped watching: %s in %s: %s", type(error).__name__, where, error
        )

    # ---------------------------------------------------------------- files

    def write(self, *, page: bool = False) -> None:
        """Write the report as it stands, atomically; the page too where asked for."""
        if rank() != 0:
            return
        self._written = time.monotonic()
        report = self.recipe.report
        try:
            report.to_json(self.folder / "report.json")
            if page:
                report.to_html(self.folder / "report.html")
        except (
            OSError
        ) as error:  # a full disk, a folder that cannot be: looking on is still worth it
            report.crashed["report"] = f"{type(error).__name__}: {error}"

    def _draw(self) -> None:
        curves = self.recipe.recorder.curves
        report = self.recipe.report
        losses = [curves["loss"].line("training")] if "loss" in curves else []
        losses += [series.line(name) for name, series in self.evaluations.items()]
        if losses:
            report.exhibit(_curve("Loss", "nats, in the model's own unit", losses))
        for name, unit in (("learning rate", "per step"), ("gradient norm", "before clipping")):
            if name in curves:
                report.exhibit(_curve(name.capitalize(), unit, [curves[name].line(name)]))

    # ---------------------------------------------------------------- resume

    def live_state(self) -> dict[str, Any]:
        """The dict that rides in TrainerState; kept up to date in place."""
        self.state.clear()
        self.state["saved"] = self.saved_state
        self.state["monitors"] = self.recipe.watch.states
        if self.margins:
            self.state["margins"] = self.margins
        # Checkpoints are pushed to hubs and trackers: rows of the data stay out of them.
        report = self.recipe.examiner.report
        if report.flat != self._kept:
            self._kept = list(report.flat)
            kept = report.flat if self.recipe.settings.log_samples else report.without_rows()
            self._plain = [plain(finding) for finding in kept]
        self.state["findings"] = self._plain
        return self.state

    def refresh_state(self, *, saving: bool) -> None:
        """Bring the dict in TrainerState up to date; margins only where a checkpoint is next."""
        watch = self.recipe.closer_look.margins
        if saving and watch is not None:
            self.margins = watch.state()
        self.live_state()

    def take_up(self, state: Any) -> Mapping[str, Any]:
        """Ride in the TrainerState as a plain dict: saved with every checkpoint, read on resume.

        Returns:
            What `resuming.state_of` kept of the run that is resumed.
        """
        recipe = self.recipe
        kept = state.stateful_callbacks.get(STATE_KEY) if state.global_step > 0 else None
        if isinstance(kept, dict) and state.global_step != recipe.recorder.last_step:
            recipe.watch.begin(dict(kept.get("monitors", {})))
            self.restore(kept)
        elif state.global_step == 0:
            recipe.watch.begin({})
            self.margins = {}
        saved = dict(kept.get("saved", {})) if isinstance(kept, dict) else {}
        state.stateful_callbacks[STATE_KEY] = self.live_state()
        return saved

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Findings, and the labels' margins, of the run that is resumed."""
        self.margins = dict(kept.get("margins", {}))
        for item in kept.get("findings", ()):
            finding = typed(Finding, item)
            if finding.identity not in {f.identity for f in self.recipe.report.flat}:
                self.recipe.report.flat.append(finding)


def _curve(title: str, unit: str, lines: list[Line]) -> Curve:
    return Curve(title, "complexify", "step", unit, tuple(lines), log_y=title == "Loss")


def environment(args: Any = None) -> dict[str, Any]:
    """Versions, processes and the command: what another person needs to run it again."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "datasets": datasets.__version__,
        "platform": platform.platform(),
        "processes": world_size(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    if args is not None:
        found["device"] = str(args.device)
        found["seed"] = args.seed
        if dataclasses.is_dataclass(args):
            found["arguments"] = type(args).__name__
    return found
