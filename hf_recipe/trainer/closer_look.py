"""Two closer looks inside a run: do the first updates move every weight; where did a NaN begin."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import nn

from hf_recipe.baselines.optimizer_wiring import ParametersMoved, ParameterWatch
from hf_recipe.catalogue import PROBES
from hf_recipe.complexify.nonfinite_origin import FIND_ORIGIN, NonFiniteOrigin
from hf_recipe.examiner import Examiner
from hf_recipe.instruments.distributed import from_rank_0, world_size
from hf_recipe.trainer import preflight

WATCHED_STEPS = 3  # the first may have a rate of zero, and adapters move from the second on


class CloserLook:
    """What needs the step's own tensors, a few times in a run and then no more."""

    def __init__(self, examiner: Examiner, trainer: Any) -> None:
        self.examiner = examiner
        self.trainer = trainer
        self._parameters: ParameterWatch | None = None
        self._searched = False

    def begin(self, model: nn.Module) -> None:
        """Remember a few elements of every parameter: the optimizer must move them."""
        self._parameters, self._searched = None, False
        if self.trainer is not None and preflight.sharded(self.trainer):
            self.examiner.skip((ParametersMoved,), "parameters are sharded")
        elif self.examiner.judging((ParametersMoved,)):
            self._parameters = ParameterWatch()
            self._parameters.start(model)

    def updated(self, optimizer: Any) -> None:
        """The optimizer has stepped, and the gradients are still there."""
        if self._parameters is None or optimizer is None:
            return
        skipped = bool(getattr(optimizer, "step_was_skipped", False))
        moved = from_rank_0(self._parameters.measure(optimizer, skipped=skipped))
        if moved is not None:
            self.examiner.judge(moved, "run", step=moved.steps)
            if moved.steps >= WATCHED_STEPS:
                self._parameters = None

    def not_finite(self, inputs: Mapping[str, Any]) -> None:
        """A micro-batch's loss is not finite: look where it began, before the weights go too.

        One rank alone knows of it, and a probe is for all; so with several processes the step is
        named at the next flush, and the place is not looked for.
        """
        if self._searched or world_size() > 1 or not self.examiner.judging((NonFiniteOrigin,)):
            return
        self._searched = True
        subject = preflight.subject_of_trainer(
            self.trainer, fresh=False, dataloader=self.trainer.callback_handler.train_dataloader
        )
        subject.first_inputs, subject.step = inputs, self.trainer.state.global_step + 1
        guard = functools.partial(preflight.guard_of, subject)
        self.examiner.examine(PROBES[FIND_ORIGIN.name], subject, guard, step=subject.step)
