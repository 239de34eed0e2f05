"""Closer looks inside a run: modes, updates by layer, leftover gradients, ranks, NaN origins."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_recipe.baselines import step_gradient as gradients
from hf_recipe.baselines.modes import ModeWatch, TrainingModes
from hf_recipe.baselines.optimizer_wiring import ParametersMoved, ParameterWatch
from hf_recipe.baselines.step_gradient import RETRACE_STEP, TRAIL, StepGradient, StepTrail
from hf_recipe.catalogue import PROBES
from hf_recipe.complexify.accumulates import GradientLeft, gradients_left
from hf_recipe.complexify.nonfinite_origin import FIND_ORIGIN, NonFiniteOrigin
from hf_recipe.complexify.ranks import RankWeights
from hf_recipe.complexify.resuming import CHECKPOINT, MEASURE_RESUMED, SAVED
from hf_recipe.data.suspect_label import LabelSuspects, weigh
from hf_recipe.examiner import Examiner
from hf_recipe.instruments.activations import ActivationUnits, ActivationWatch
from hf_recipe.instruments.answers import Answers
from hf_recipe.instruments.batches import has_rows, labels_in
from hf_recipe.instruments.distributed import from_rank_0, world_size
from hf_recipe.instruments.layers import (
    LayerSamples,
    LayerWatch,
    epsilon_of,
    interval_of,
    is_sharded,
    looks_after,
    looks_at,
    whole,
)
from hf_recipe.instruments.margins import EPOCHS, MarginWatch
from hf_recipe.instruments.record import Recorder
from hf_recipe.instruments.subject import Plan, Subject
from hf_recipe.instruments.window import Evaluation
from hf_recipe.regularize.metric_agreement import RecountedMetric, recounted, shift_of
from hf_recipe.trainer import preflight
from hf_recipe.trainer.rank_watch import RankWatch

WATCHED_STEPS = 3  # the first may have a rate of zero, and adapters move from the second on
LEFT_OVER_AT = (2, 3)  # steps before whose first backward pass there must be no gradient


class CloserLook:
    """What needs the step's own tensors, on a few steps of the run."""

    def __init__(self, examiner: Examiner, trainer: Any, recorder: Recorder) -> None:
        self.examiner = examiner
        self.trainer = trainer
        self.recorder = recorder
        self.planned = 0
        self.checkpoint: Path | None = None  # the folder that the Trainer resumes from
        self._parameters: ParameterWatch | None = None
        self._modes: ModeWatch | None = None
        self._layers: LayerWatch | None = None
        self._units: ActivationWatch | None = None
        self.margins: MarginWatch | None = None  # of each training row's label
        self.heard: list[torch.Tensor] = []  # logits of the forward passes, for the margins
        self._model: nn.Module | None = None
        self._searched = False
        self._trail: StepTrail | None = None
        self.ranks = RankWatch(examiner, trainer)
        self._step = self._nth = 0  # the run's step, and the steps since it began or resumed
        self.every = interval_of(examiner.settings.overhead)
        self.due = True  # whether this step is one to look at; most are not, and cost nothing
        self.next_due = 0  # the next such step that is known

    def begin(
        self, model: nn.Module, plan: Plan | None = None, margins: Mapping[str, Any] | None = None
    ) -> None:
        """A run begins: remember a few elements of every parameter, and forget the last run."""
        self.end()
        self._model, self._searched = model, False
        self.planned = plan.total_steps if plan is not None else 0
        self._nth, self.due = 0, True
        self.recorder.closely = True
        self._parameters = self._layers = self._units = self._modes = None
        self._trail = StepTrail() if self._retraces() else None
        if self.trainer is not None and self.examiner.judging((TrainingModes,)):
            self._modes = ModeWatch()
        self.margins = self._watch_margins(model, plan)
        if self.margins is not None:
            self.margins.restore(margins or {})
        self.ranks.begin(model)
        if self.trainer is not None and preflight.sharded(self.trainer):
            self._watch_shards(model)
            return
        if self.examiner.judging((ParametersMoved,)):
            self._parameters = ParameterWatch()
            self._parameters.start(model)
        if self.examiner.judging((LayerSamples,)):
            self._layers = LayerWatch()
        if self.examiner.judging((ActivationUnits,)):
            self._units = None if preflight.compiled(self.trainer) else ActivationWatch()

    def _watch_shards(self, model: nn.Module) -> None:
        """No process holds a parameter whole: sums by layer are what can be compared."""
        reason = "parameters are sharded"
        if self.trainer.is_deepspeed_enabled:
            reason = "DeepSpeed holds the parameters, and nobody has run this with it"
        self.examiner.skip((ParametersMoved, RankWeights, GradientLeft), reason)
        if not any(is_sharded(parameter) for parameter in model.parameters()):
            self.examiner.skip((LayerSamples,), reason)
        elif self.examiner.judging((LayerSamples,)):
            self._layers = LayerWatch()

    def end(self) -> None:
        """Take the hooks off."""
        if self._units is not None:
            self._units.disarm()
        self.ranks.end()
        if self.margins is not None:
            self.margins.disarm()

    def go_on(self) -> None:
        """Hear the model again, after an `end` in mid-run."""
        watch = self.margins
        if self._model is not None and watch is not None and watch.hears(self._step):
            watch.arm(self._model)

    def _watch_margins(self, model: nn.Module, plan: Plan | None) -> MarginWatch | None:
        if not self.examiner.judging((LabelSuspects,)):
            return None
        data: Any = getattr(self.trainer, "train_dataset", None)
        compiled = preflight.compiled(self.trainer)
        if compiled or not has_rows(data):
            reason = "the model is compiled" if compiled else "rows have no numbers here"
            self.examiner.skip((LabelSuspects,), reason)
            return None
        epoch = plan.steps_per_epoch if plan is not None else 0
        half = max(plan.total_steps // 2, EPOCHS * epoch) if plan is not None else 0
        watch = MarginWatch(len(data), half, self.heard, epoch)
        watch.arm(model)
        return watch

    def _retraces(self) -> bool:
        """Whether steps are taken by a training_step that nobody here knows."""
        if self.trainer is None or world_size() > 1 or self.trainer.args.n_gpu > 1:
            return False
        if not self.examiner.judging((StepGradient,)) or preflight.sharded(self.trainer):
            return False
        return not preflight.compiled(self.trainer) and gradients.touched(self.trainer)

    def finish(self, step: int) -> None:
        """The run is over: compare ranks once more, and say what was told of the labels."""
        self.ranks.compare_weights(step)
        watch = self.margins
        if watch is None:
            return
        watch.flush()
        if watch.reason or not watch.counts.any():
            reason = watch.reason or "no margin of any row was seen"
            self.examiner.skip((LabelSuspects,), reason)
            return
        names = self.trainer.label_names or ["labels"]
        seen = weigh(
            watch.scores(),
            watch.labels.astype("int64"),
            watch.others.astype("int64"),
            watch.row_numbers(),
            column=names[0],
            witness="training run",
        )
        self.examiner.judge(seen, "run", split="train", step=step)

    def resumed(self, subject: Subject, saved: Mapping[str, Any]) -> None:
        """The run was resumed; `saved` is what `resuming.state_of` kept."""
        subject.cache[CHECKPOINT], subject.cache[SAVED] = self.checkpoint, saved
        self.examiner.examine(PROBES[MEASURE_RESUMED.name], subject)
        self.checkpoint = None

    # ---------------------------------------------------------------- a step, in its order

    def step_begins(self, step: int) -> None:
        """Step `step`, the next one, is one to look at, or comes after one."""
        self._step, self._nth = step, self._nth + 1
        looks = looks_at(step, self.every)
        self.due = (
            looks
            or self.ranks.due(self._nth)
            or self._parameters is not None
            or self._trail is not None
        )
        self.next_due = looks_after(step, self.every)
        if self.margins is not None and self._model is not None:
            self.margins.step_begins(step, self._model)
            self.next_due = min(self.next_due, self.margins.changes_after(step) or self.next_due)
        if looks and self._units is not None and self._model is not None:
            self._units.arm(self._model, step)

    def before_backward(self, inputs: Mapping[str, Any]) -> None:
        """The first micro-batch of a step: nothing may be left of the step before."""
        self.ranks.before_backward(inputs, self._nth)
        if self._step not in LEFT_OVER_AT or self._model is None:
            return
        sharded = self.trainer is not None and preflight.sharded(self.trainer)
        if not sharded and self.examiner.judging((GradientLeft,)):
            left = from_rank_0(gradients_left(self._model, self._step))
            self.examiner.judge(left, "run", step=self._step)

    def before_update(self, optimizer: Any) -> None:
        """Gradients are complete and clipped."""
        if self._trail is not None:
            self._retrace(self._trail)
        if (
            self._layers is not None
            and looks_at(self._step, self.every)
            and self._model is not None
        ):
            self._layers.before(self._model, optimizer)

    def hear(self, inputs: Any, rows: tuple[int, ...]) -> None:
        """A micro-batch of these rows has run."""
        if self.margins is not None and self.margins.listening:
            self.margins.add(labels_in(inputs, self.trainer.label_names), rows)

    def micro_batch(self, inputs: Any) -> None:
        """A micro-batch is about to run."""
        if self._trail is not None and isinstance(inputs, Mapping):
            self._trail.add(inputs)

    def _retrace(self, trail: StepTrail) -> None:
        norm = math.nan if self.recorder.norm is None else float(self.recorder.norm)
        assert self._model is not None
        trail.take(self._model, self._left_by_clipping(norm))
        subject = preflight.subject_of_trainer(
            self.trainer, fresh=False, dataloader=self.trainer.callback_handler.train_dataloader
        )
        subject.cache[TRAIL] = trail
        guard = functools.partial(preflight.guard_of, subject)
        self.examiner.examine(RETRACE_STEP, subject, guard, step=self._step)
        self._trail = trail.next() if self._nth < gradients.STEPS[-1] else None

    def watching(self, model: Any) -> AbstractContextManager[None]:
        """A context around one micro-batch: reads the modules' modes in two of the first steps."""
        # A hook on a compiled model would have it compiled again.
        if self._modes is None or not self._modes.wanted(self._nth):
            return nullcontext()
        if preflight.compiled(self.trainer):
            return nullcontext()
        bare = self.trainer.accelerator.unwrap_model(model)
        return self._modes.watching(model, bare, self._nth)

    def _judge_modes(self) -> None:
        if self._modes is None:
            return
        seen = from_rank_0(self._modes.take())
        if seen is not None:
            self.examiner.judge(seen, "run", step=self._step)
        if self._nth >= WATCHED_STEPS:
            self._modes = None

    def updated(self, optimizer: Any) -> None:
        """The optimizer has stepped, and the gradients are still there."""
        self._judge_modes()
        if optimizer is None:
            return
        skipped = bool(getattr(optimizer, "step_was_skipped", False))
        if self._parameters is not None:
            moved = from_rank_0(self._parameters.measure(optimizer, skipped=skipped))
            if moved is not None:
                self.examiner.judge(moved, "run", step=moved.steps)
                if moved.steps >= WATCHED_STEPS:
                    self._parameters = None
        if self._layers is not None and looks_at(self._step, self.every):
            self._sample_layers(optimizer, skipped)

    def step_ends(self, step: int, *, flushed: bool) -> None:
        """The step is done; at a flush all ranks may talk."""
        if self._units is not None and looks_at(step, self.every):
            self._units.disarm()
            units = from_rank_0(self._units.measure())
            if units.layers:
                self.examiner.judge(units, "run", step=step)
        if self.margins is not None and flushed:
            self.margins.flush()
        if flushed:
            self.ranks.flushed(step)

    def recounts(self) -> bool:
        """Whether an evaluation's answers are wanted: there is a metric to count again."""
        computes = self.trainer is not None and self.trainer.compute_metrics is not None
        return computes and bool(self.examiner.judging((RecountedMetric,)))

    def evaluated(self, answers: Answers | None, evaluation: Evaluation) -> None:
        """An evaluation is over; `answers` are the same on all ranks."""
        if answers is None:
            return
        shifted = shift_of(self.trainer)
        for metric in recounted(answers, evaluation.metrics, evaluation.split, shifted):
            self.examiner.judge(metric, "eval", split=evaluation.split, step=evaluation.step)

    # ---------------------------------------------------------------- inside

    def _sample_layers(self, optimizer: Any, skipped: bool) -> None:
        assert self._layers is not None
        curve = self.recorder.curves.get("loss")
        losses = curve.y if curve is not None else []
        norm = self.recorder.norm
        norm = math.nan if norm is None else float(whole(norm) if torch.is_tensor(norm) else norm)
        loss = losses[-1] if losses else math.nan
        sample = self._layers.after(self._step, loss, norm, self._left_by_clipping(norm))
        if sample is None or skipped:
            return
        inner = getattr(optimizer, "optimizer", optimizer)
        samples = LayerSamples(
            first_loss=losses[0] if losses else math.nan,
            planned=self.planned,
            adam="adam" in type(inner).__name__.lower(),
            epsilon=epsilon_of(inner),
            samples=tuple(self._layers.samples),
        )
        self.examiner.judge(from_rank_0(samples), "run", step=self._step)

    def _left_by_clipping(self, norm: float) -> float:
        limit = float(self.trainer.args.max_grad_norm or 0) if self.trainer is not None else 0.0
        return min(1.0, limit / (norm + 1e-6)) if limit > 0 and math.isfinite(norm) else 1.0

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
