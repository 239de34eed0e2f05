"""The monitors of one run: their states, and the folding of windows into measurements."""

from __future__ import annotations

from typing import Any

from hf_recipe.catalogue import MONITORS
from hf_recipe.examiner import Examiner
from hf_recipe.instruments.window import Window


class Watch:
    """Folds every window into the selected monitors; one that crashes is dropped, and said so.

    Attributes:
        states: each monitor's state by name; JSON, so that it rides in checkpoints.
    """

    def __init__(self, examiner: Examiner) -> None:
        self.examiner = examiner
        self.states: dict[str, dict[str, Any]] = {}
        self._dropped: set[str] = set()

    def begin(self, states: dict[str, dict[str, Any]]) -> None:
        """A run begins, afresh (no states) or resumed."""
        self.states, self._dropped = states, set()

    def fold(self, window: Window, step: int) -> None:
        """Fold `window`; what is measured is judged at once."""
        split = window.evaluation.split if window.evaluation is not None else ""
        for name, monitor in MONITORS.items():
            if name in self._dropped or not self.examiner.judging(monitor.measures):
                continue
            try:
                state, measured = monitor.fold(
                    self.states.get(name, {}), window, self.examiner.latest
                )
            except Exception as error:  # the probe border
                self.examiner.crash(monitor.measures, name, error)
                self._dropped.add(name)
                continue
            self.states[name] = state
            if measured is not None:
                self.examiner.judge(measured, monitor.moment, split=split, step=step)
