"""The recipe on one Trainer: probes before step 1, monitors while training, one report.

Its events come from a `RecipeCallback`; its seams, where there is a Trainer to put them on, from
`attach`. An error of ours never stops the training: it is listed as crashed, and the recipe
goes quiet.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from hf_recipe.baselines.save_rehearsal import look_at_saved
from hf_recipe.complexify.resuming import state_of
from hf_recipe.core.check import Probe
from hf_recipe.core.config import Settings
from hf_recipe.core.finding import Finding
from hf_recipe.core.report import Report
from hf_recipe.examiner import Examiner
from hf_recipe.instruments.distributed import from_rank_0, rank, world_size
from hf_recipe.instruments.record import Recorder, flushes_after, flushes_at
from hf_recipe.instruments.subject import Plan, Subject
from hf_recipe.instruments.window import Window
from hf_recipe.regularize.paired_error import listen_to_rows
from hf_recipe.trainer import preflight
from hf_recipe.trainer.album import Album
from hf_recipe.trainer.border import RecipeError, event
from hf_recipe.trainer.closer_look import CloserLook
from hf_recipe.trainer.closing import Closing
from hf_recipe.trainer.model_hook import ModelHook
from hf_recipe.trainer.own_calls import OwnCalls
from hf_recipe.trainer.seams import EvaluationRecorder, Seams, has_a_loop_of_its_own
from hf_recipe.trainer.units import Units
from hf_recipe.trainer.variance import TrialVariance, measured_variance
from hf_recipe.trainer.watch import Watch


class Recipe(OwnCalls):
    """What `hf_recipe.attach` returns.

    Attributes:
        report: everything that was seen so far.
        detached: whether `detach` was called.
    """

    def __init__(self, settings: Settings, *, trainer: Any = None) -> None:
        self.trainer = trainer
        self.settings = settings
        self.paused = False
        self.detached = False
        self.on_detach: Callable[[], None] = lambda: None
        self.recorder = Recorder()
        self.evaluation = EvaluationRecorder()
        self.examiner = Examiner(settings, hear=self._hear, agree=from_rank_0, leads=rank() == 0)
        self.examiner.patient = True
        self.closing = Closing(self)
        self.album = Album(settings, self.examiner.report)
        self.units = Units()
        self.watch = Watch(self.examiner)
        self.closer_look = CloserLook(self.examiner, trainer, self.recorder)
        self.plan: Plan | None = None
        self._members: list[weakref.ref[Any]] = []
        self.by_events = trainer is None or has_a_loop_of_its_own(trainer)
        self._seams = None if trainer is None else Seams(trainer, self)
        self._hook = ModelHook(self.recorder, self.evaluation) if trainer is None else None
        self._taken_for: weakref.ref[Any] | None = None
        self._moved: weakref.ref[Any] | None = None
        self._errors: list[Finding] = []
        self._training = False

    # ---------------------------------------------------------------- for the user

    @property
    def report(self) -> Report:
        """The report as it stands."""
        self.examiner.settle()
        return self.examiner.report

    @property
    def findings(self) -> list[Finding]:
        """Roots, causes first; after `preflight()`, and growing while training."""
        return self.report.findings

    def preflight(self) -> list[Finding]:
        """Run the probes now, before ``train()``; nothing of it is left in the run.

        Raises:
            RecipeError: on findings of severity error, where ``on_error`` is "stop" or "raise".
        """
        with self._before_training() as subject:
            self._examine(subject)
        self.closing.after_preflight()
        self._stop_before_step_1()
        return self.findings

    def trial_variance(self, n: int = 5) -> TrialVariance:
        """Train this configuration n times, put all back, report the spread over seeds."""
        return measured_variance(self, n)

    def pause(self) -> None:
        """Stop looking on until `resume`; costs nothing while paused."""
        self.paused = True
        self.recorder.stop()
        self.closer_look.end()

    def resume(self) -> None:
        """Look on again."""
        self.paused = False
        self.recorder.start()
        if self._training:
            self.closer_look.go_on()

    def detach(self) -> None:
        """Take everything off the Trainer again; the report stays readable."""
        if self.detached:
            return
        self.detached = True
        self.recorder.stop()
        self.closer_look.end()
        if self._seams is not None:
            self._seams.remove()
        if self._hook is not None:
            self._hook.remove()
        self.on_detach()

    # ---------------------------------------------------------------- members

    def install(self) -> None:
        """Put the seams on the Trainer; again is the same as once."""
        if self._seams is not None:
            self._seams.install()

    def admit(self, member: Any, settings: Settings) -> None:
        """Let a callback share this recipe; what it selects is run too."""
        if any(known() is member for known in self._members):
            return
        first = not any(known() is not None for known in self._members)
        self._members.append(weakref.ref(member))
        if first or self.trainer is not None:
            return
        mine, theirs = self.settings, settings
        if mine.select is not None:
            union = None if theirs.select is None else (*mine.select, *theirs.select)
            self.settings = replace(mine, select=union)
            self.examiner.select(self.settings)

    def leader(self) -> Any:
        """The callback that forwards events: the first that is still alive."""
        for known in self._members:
            member = known()
            if member is not None:
                return member
        return None

    # ---------------------------------------------------------------- events

    @event
    def train_begin(self, args: Any, state: Any, control: Any, seen: Mapping[str, Any]) -> None:
        """Everything is prepared or resumed; no step is taken yet."""
        model = seen["model"]
        fresh = state.global_step == 0 and not self._is_moved(model)
        self.recorder.drop()
        self._training, self.recorder.attends = True, 0
        self.closing.started(args, state)
        saved = self.closing.take_up(state)
        self.install()
        if self.trainer is not None:
            callbacks = self.trainer.callback_handler.callbacks
            listen_to_rows(callbacks, args, lambda: self.evaluation.latest)
        if self._seams is not None:
            self._seams.watch_rows(seen.get("train_dataloader"))
            self._seams.before_first = True
        if self._hook is not None:
            self._hook.install(model)
        subject = self._subject(args, state, fresh, seen)
        self.plan = preflight.with_update(subject)
        self._examine(subject)
        self._measure_units(subject)
        self.album.begin(subject)
        self.closer_look.begin(model, self.plan, self.closing.margins)
        self.closer_look.ranks.compare_noise(subject, seen.get("train_dataloader"))
        if subject.resumed:
            self.closer_look.resumed(subject, saved)
        subject.cache.clear()  # the album keeps the subject, and rows and logits weigh
        self.closing.after_preflight()
        self._stop_before_step_1()

    @event
    def run_newly_selected(self, args: Any, state: Any, seen: Mapping[str, Any]) -> None:
        """A callback joined after the others had begun: run what it alone selects."""
        fresh = state.global_step == 0 and not self._is_moved(seen["model"])
        self._examine(self._subject(args, state, fresh, seen))

    @event
    def epoch_begin(self) -> None:
        """A new pass over the data: rows drawn for the last one are not this one's."""
        self.recorder.drawn.clear()

    @event
    def step_begin(self, step: int) -> None:
        """The micro-batches of step `step` are fetched, and it may be one to look at."""
        look = self.closer_look
        if look.due or step >= look.next_due:
            look.step_begins(step)
        self.recorder.closely = look.due or (self._seams is not None and self._seams.before_first)

    @event
    def before_backward(self, inputs: Mapping[str, Any]) -> None:
        """The first micro-batch of a step is about to run."""
        self.closer_look.before_backward(inputs)

    @event
    def before_update(self, optimizer: Any) -> None:
        """Gradients are clipped, and the optimizer steps next."""
        if optimizer is not None and self.closer_look.due:
            self.closer_look.before_update(optimizer)

    @event
    def updated(self, optimizer: Any) -> None:
        """The optimizer has stepped; gradients are still there."""
        if self.closer_look.due:
            self.closer_look.updated(optimizer)

    @event
    def step_end(self, step: int, control: Any, model: Any, optimizer: Any) -> None:
        """A step that is read out, was looked at or went wrong, or before one to look at."""
        look, flushed = self.closer_look, flushes_at(step)
        if flushed or look.due:
            self._moved = weakref.ref(model)
            look.step_ends(step, flushed=flushed)
        broken = not self.recorder.finite and world_size() == 1
        if flushed or broken or control.should_save or control.should_evaluate:
            self._flush(settle=control.should_save)
            if optimizer is not None:
                self.closing.saved_state = state_of(optimizer, step)
            self.closing.refresh_state(saving=control.should_save)
            self.closing.tell(step)
            self._act(control)
        self.recorder.attends = min(flushes_after(step), look.next_due - 1)
        self.recorder.closely = look.due or step + 1 >= look.next_due

    @event
    def evaluated(self, state: Any, control: Any, metrics: Mapping[str, Any]) -> None:
        """One evaluation set has been passed over."""
        self._flush(settle=True)
        evaluation = self.evaluation.read(state.global_step, metrics, self.units.evaluation())
        self._fold(Window(evaluation=evaluation, plan=self.plan))
        self.album.evaluated(state.global_step)
        self.closing.follow(self.album.numbers(), state.global_step)
        self.closer_look.evaluated(self.evaluation.answers, evaluation)
        self.closing.evaluated(evaluation)
        self._act(control)

    @event
    def predicted(self) -> None:
        """A prediction has run through the evaluation's seam; it is none."""
        self.evaluation.start(None)

    @event
    def saved(self, state: Any) -> None:
        """A checkpoint is on disk: so is the report."""
        step, seen = state.global_step, self.examiner.latest
        found = from_rank_0(look_at_saved(self.trainer, step, seen))
        if found is not None:
            self.examiner.judge(found, "run", step=step)
        self.closing.write()

    @event
    def train_end(self, state: Any, control: Any) -> None:
        """The run is over, the best model loaded."""
        self._flush(ended=True)
        self._training = False
        self.closer_look.finish(state.global_step)
        self.closer_look.end()
        if self._seams is not None:
            self._seams.unwatch_rows()
        if self._hook is not None:
            self._hook.remove()
        self.album.end(state.global_step)
        self.closing.finished(state)
        self._act(control)

    def fail(self, where: str, error: Exception) -> None:
        """Note a crash of ours and stop looking on."""
        self.report.crashed[f"recipe ({where})"] = f"{type(error).__name__}: {error}"
        self.pause()
        self.closing.crashed(where, error)

    # ---------------------------------------------------------------- inside

    def _before_training(self) -> AbstractContextManager[Subject]:
        if self.trainer is None:
            raise ValueError("a callback alone cannot do this: use hf_recipe.attach(trainer)")
        fresh = self.trainer.state.global_step == 0 and not self._is_moved(self.trainer.model)
        return preflight.before_training(self.trainer, fresh=fresh)

    def _subject(self, args: Any, state: Any, fresh: bool, seen: Mapping[str, Any]) -> Subject:
        if self.trainer is None:
            return preflight.subject_of_callback(args, state, fresh, seen)
        dataloader = seen.get("train_dataloader")
        return preflight.subject_of_trainer(self.trainer, fresh=fresh, dataloader=dataloader)

    def _examine(self, subject: Subject) -> None:
        """Run the probes that have not run on these weights; static ones, cheap, always."""
        model = subject.model
        if self._taken_for is None or self._taken_for() is not model:
            self.examiner.outcomes.clear()
            self._taken_for = weakref.ref(model)

        def due(probe: Probe) -> bool:
            taken = self.examiner.outcomes.get(probe.name) == "taken"
            return probe.moment == "static" or not taken

        preflight.run_probes(self.examiner, subject, again=due)

    def _measure_units(self, subject: Subject) -> None:
        self.units.measure(self.examiner, subject, lambda: preflight.guard_of(subject))

    def first_step(self, inputs: Mapping[str, Any]) -> None:
        """Inside the first training step: probe streams on its real inputs."""
        if self.trainer is None or not preflight.seen_only_while_training(self.trainer):
            return
        state = self.trainer.state
        fresh = state.global_step == 0 and not self._is_moved(self.trainer.model)
        subject = preflight.subject_of_trainer(
            self.trainer, fresh=fresh, dataloader=self.trainer.callback_handler.train_dataloader
        )
        subject.first_inputs = inputs
        try:
            self._examine(subject)
            self._measure_units(subject)
            self.closing.after_preflight()
        except Exception as error:  # the border, as in `event`
            self.fail("first step", error)
        self._stop_before_step_1()

    def _flush(self, *, settle: bool = False, ended: bool = False) -> None:
        steps = self.recorder.flush(self.units.step)
        if steps or settle or ended:
            self._fold(Window(steps=steps, plan=self.plan, ended=ended), settle=settle)

    def _fold(self, window: Window, *, settle: bool = False) -> None:
        self.watch.fold(window, self.recorder.last_step, settle=settle)

    def _is_moved(self, model: Any) -> bool:
        return self._moved is not None and self._moved() is model

    def _hear(self, finding: Finding) -> None:
        if finding.severity == "error":
            self._errors.append(finding)
        self.closing.heard(finding)

    def _act(self, control: Any) -> None:
        """Stop or raise on errors, on all ranks alike: findings are agreed between them."""
        if not self._errors or self.settings.on_error == "warn":
            return
        errors, self._errors = self._errors, []
        self.closing.write()
        if self.settings.on_error == "raise":
            raise RecipeError(errors)
        control.should_training_stop = True

    def _stop_before_step_1(self) -> None:
        """A stop asked for at train begin still takes a step; so "stop" raises here too."""
        if self._errors and self.settings.on_error != "warn":
            errors, self._errors = self._errors, []
            raise RecipeError(errors)
