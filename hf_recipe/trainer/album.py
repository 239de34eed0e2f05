"""What the report draws of a run: first-layer weights, predictions, worst examples.

No check hangs on it. It looks before step 1, at evaluations and at the end, never at a step; where
checks were selected by name it does not look at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf_recipe.baselines.first_layer import FirstLayerAlbum
from hf_recipe.baselines.predictions import CHANGES, SAMPLES, PredictionsFollowed
from hf_recipe.baselines.worst_examples import exhibits, judge_rows
from hf_recipe.core.check import Skip
from hf_recipe.core.config import Settings
from hf_recipe.core.exhibit import Answer
from hf_recipe.core.report import Report
from hf_recipe.examiner import UNRUNNABLE, excused
from hf_recipe.instruments.subject import Subject
from hf_recipe.trainer import preflight

TABLES = (CHANGES, SAMPLES)  # what a tracker is sent at the end


class Album:
    """Keeps what is drawn at the end of a run."""

    def __init__(self, settings: Settings, report: Report) -> None:
        self.report = report
        self.wanted = settings.select is None and "baselines" not in settings.ignore
        self.subject: Subject | None = None
        self.first_layer: FirstLayerAlbum | None = None
        self.predictions: PredictionsFollowed | None = None

    def begin(self, subject: Subject) -> None:
        """A run begins: remember the first layer, run the fixed rows for the first time."""
        self.subject = self.first_layer = self.predictions = None
        trainer = subject.trainer
        fatal = any(finding.check in UNRUNNABLE for finding in self.report.flat)
        if not self.wanted or fatal or (trainer is not None and preflight.sharded(trainer)):
            return
        self.subject = subject
        self.first_layer = FirstLayerAlbum()
        if not subject.resumed:
            self._try("first_layer", lambda: self._first_layer(subject))
        self._try("predictions", lambda: self._follow(subject))

    def evaluated(self, step: int) -> None:
        """An evaluation is over: run the fixed rows once more."""
        subject, followed = self.subject, self.predictions
        if subject is None or followed is None:
            return

        def look() -> None:
            with preflight.guard_of(subject):
                followed.look(subject, step)

        self._try("predictions", look)

    def numbers(self) -> dict[str, float]:
        """The fixed rows' predictions at the last evaluation, by name."""
        followed = self.predictions
        if followed is None:
            return {}
        return {f"predictions/{name}": value for name, value in followed.numbers().items()}

    def end(self, step: int) -> None:
        """The run is over: draw, and let go of model and rows."""
        self.evaluated(step)
        subject, self.subject = self.subject, None
        if subject is None:
            return
        if self.predictions is not None:
            for exhibit in self.predictions.exhibits():
                self.report.exhibit(exhibit)
        self._try("predictions", lambda: self._worst(subject))
        layer = self.first_layer
        if layer is not None:
            self._try("first_layer", lambda: self._draw(layer, subject))
        self.first_layer = self.predictions = None

    # ---------------------------------------------------------------- inside

    def _first_layer(self, subject: Subject) -> None:
        assert self.first_layer is not None
        with preflight.guard_of(subject):  # a weight may be computed when it is read
            self.first_layer.begin(subject.model)

    def _follow(self, subject: Subject) -> None:
        with preflight.guard_of(subject):
            self.predictions = PredictionsFollowed.begin(subject)

    def _worst(self, subject: Subject) -> None:
        split = next(iter(subject.evaluation), "train")
        with preflight.guard_of(subject):
            seen = judge_rows(subject, split)
        for item in exhibits(seen, split):
            self.report.exhibit(item)

    def _draw(self, layer: FirstLayerAlbum, subject: Subject) -> None:
        with preflight.guard_of(subject):
            exhibits = list(layer.exhibits(subject.model))
        for item in exhibits:
            if isinstance(item, Answer):
                self.report.answer(item)
            else:
                self.report.exhibit(item)

    def _try(self, name: str, look: Callable[[], Any]) -> None:
        """Do without what cannot be looked at; a crash of ours is a line in the report."""
        try:
            look()
        except Skip:
            setattr(self, name, None)
        except Exception as error:  # the border: an observer does no harm
            if not excused(error):
                self.report.crashed[f"album ({name})"] = f"{type(error).__name__}: {error}"
            setattr(self, name, None)
