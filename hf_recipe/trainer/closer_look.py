"""Closer looks inside a run: modules' modes, weights that do not move, where a NaN began."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from hf_recipe.baselines.modes import ModeWatch, TrainingModes
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
        self._modes: ModeWatch | None = None
        self._steps = 0
        self._searched = False

    def begin(self, model: nn.Module) -> None:
        """Remember a few elements of every parameter: the optimizer must move them."""
        self._parameters, self._searched = None, False
        self._steps, self._modes = 0, None
        if self.trainer is not None and self.examiner.judging((TrainingModes,)):
            self._modes = ModeWatch()
        if self.trainer is not None and preflight.sharded(self.trainer):
            self.examiner.skip((ParametersMoved,), "parameters are sharded")
        elif self.examiner.judging((ParametersMoved,)):
            self._parameters = ParameterWatch()
            self._parameters.start(model)

    def watching(self, model: Any) -> AbstractContextManager[None]:
        """A context around one micro-batch: reads the modules' modes in two of the first steps."""
        # A hook on a compiled model would have it compiled again.
        if self._modes is None or self.trainer.args.torch_compile:
            return nullcontext()
        if not self._modes.wanted(self._steps + 1):
            return nullcontext()
        bare = self.trainer.accelerator.unwrap_model(model)
        return self._modes.watching(model, bare, self._steps + 1)

    def _judge_modes(self) -> None:
        if self._modes is None:
            return
        seen = from_rank_0(self._modes.take())
        if seen is not None:
            self.examiner.judge(seen, "run", step=self.trainer.state.global_step + 1)
        if self._steps >= WATCHED_STEPS:
            self._modes = None

    def updated(self, optimizer: Any) -> None:
        """The optimizer has stepped, and the gradients are still there."""
        self._steps += 1
        self._judge_modes()
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
