"""The monitors of one run: their states, and the folding of windows into measurements."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hf_recipe.catalogue import MONITORS
from hf_recipe.examiner import Examiner
from hf_recipe.instruments.record import LATE
from hf_recipe.instruments.window import Step, Window

PATIENCE = 512  # steps that patient monitors are given together


class Watch:
    """Folds every window into the selected monitors; one that crashes is dropped, and said so.

    Attributes:
        states: each monitor's state by name; JSON, so that it rides in checkpoints.
    """

    def __init__(self, examiner: Examiner) -> None:
        self.examiner = examiner
        self.states: dict[str, dict[str, Any]] = {}
        self._dropped: set[str] = set()
        self._held: list[Step] = []  # what the patient monitors have not seen yet

    def begin(self, states: dict[str, dict[str, Any]]) -> None:
        """A run begins, afresh (no states) or resumed."""
        self.states, self._dropped, self._held = states, set(), []

    def fold(self, window: Window, step: int, *, settle: bool = False) -> None:
        """Fold `window`; what is measured is judged at once.

        Args:
            step: optimizer steps done.
            settle: whether the patient monitors, too, are to see all steps so far: an evaluation
                or a checkpoint is next.
        """
        split = window.evaluation.split if window.evaluation is not None else ""
        self._held += window.steps
        if not (self._held or window.ended or window.evaluation is not None):
            return
        settle |= step <= LATE or len(self._held) >= PATIENCE or window.ended
        together = None
        if settle and window.evaluation is None:
            together, self._held = replace(window, steps=tuple(self._held)), []
        for name, monitor in MONITORS.items():
            given = together if monitor.patient and window.evaluation is None else window
            if given is None or name in self._dropped:
                continue
            if not self.examiner.judging(monitor.measures):
                continue
            try:
                state, measured = monitor.fold(
                    self.states.get(name, {}), given, self.examiner.latest
                )
            except Exception as error:  # the probe border
                self.examiner.crash(monitor.measures, name, error)
                self._dropped.add(name)
                continue
            self.states[name] = state
            if measured is not None:
                self.examiner.judge(measured, monitor.moment, split=split, step=step)
