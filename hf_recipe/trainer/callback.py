"""`Trainer(callbacks=[RecipeCallback()])`: the recipe with what a callback alone can reach.

Several on one Trainer share one engine: the first to come forwards the events, the others widen
what is selected, and nothing is printed twice. `hf_recipe.attach(trainer)` upgrades them all.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from time import perf_counter
from typing import Any, ClassVar

from transformers import TrainerCallback

from hf_recipe.core.config import Settings
from hf_recipe.explanation import stored_checks
from hf_recipe.trainer.recipe import Recipe

_SHARED: dict[int, tuple[weakref.ref[Any], weakref.ref[Recipe]]] = {}


def share(args: Any, recipe: Recipe) -> None:
    """Let every `RecipeCallback` of the Trainer that owns `args` find this recipe."""
    key = id(args)
    _SHARED[key] = (weakref.ref(args, lambda _: _SHARED.pop(key, None)), weakref.ref(recipe))


def shared(args: Any) -> Recipe | None:
    """The recipe of the Trainer that owns `args`, or None."""
    found = _SHARED.get(id(args))
    if found is None or found[0]() is not args:
        return None
    recipe = found[1]()
    return recipe if recipe is not None and not recipe.detached else None


class RecipeCallback(TrainerCallback):  # type: ignore[misc]
    """Runs the recipe's checks from inside a Trainer.

    Alone it reaches the model, the data, the optimizer and the schedule; what needs the Trainer
    itself (a loss of one's own, norms before clipping) is listed as skipped, with the reason.

    Args:
        select: check names or stages to run; None: all.
        ignore: check names or stages not to run.
        settings: any further argument of `hf_recipe.attach`.
    """

    preset: ClassVar[tuple[str, ...] | None] = None

    def __init__(
        self,
        select: Collection[str] | None = None,
        ignore: Collection[str] = (),
        **settings: Any,
    ) -> None:
        chosen = tuple(select) if select is not None else self.preset
        thresholds = {n: tuple(e["thresholds"]) for n, e in stored_checks().items()}
        self._settings = Settings.resolve(
            {"select": chosen, "ignore": tuple(ignore) or None, **settings}, checks=thresholds
        )
        self._recipe: Recipe | None = None
        self._leading: Recipe | None = None  # as of the last epoch: steps must cost nothing

    @property
    def findings(self) -> list[Any]:
        """What was found so far; roots, cause first."""
        return self._recipe.findings if self._recipe is not None else []

    @property
    def report(self) -> Any:
        """The report of the recipe that this callback shares; None before the Trainer is made."""
        return self._recipe.report if self._recipe is not None else None

    def join(self, recipe: Recipe) -> None:
        """Share `recipe` from now on; it then also runs what this callback selects."""
        if self._recipe is not recipe:
            self._recipe = recipe
            recipe.admit(self, self._settings)

    def _lead(self, args: Any) -> Recipe | None:
        """The recipe, if this callback is the one that forwards events to it."""
        recipe = self._recipe
        if recipe is None or recipe.detached:
            recipe = shared(args)
            if recipe is None:
                recipe = Recipe(self._settings)
                recipe.closing.place(args)
                share(args, recipe)
            self._recipe = None
            self.join(recipe)
        self._leading = recipe if recipe.leader() is self else None
        return self._leading

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._lead(args)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if recipe := self._lead(args):
            recipe.train_begin(args, state, control, kwargs)
        elif self._recipe is not None:
            self._recipe.run_newly_selected(args, state, kwargs)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if recipe := self._lead(args):
            recipe.epoch_begin()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        recipe = self._leading or self._lead(args)
        if recipe and recipe.by_events:  # else a seam tells it
            if recipe.recorder.closely:
                recipe.step_begin(state.global_step + 1)
            recipe.recorder.began = perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        recipe = self._leading or self._lead(args)
        if recipe and recipe.by_events and recipe.recorder.closely:
            recipe.before_update(kwargs.get("optimizer"))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if recipe := self._leading or self._lead(args):
            recorder = recipe.recorder
            recorder.take_rate(kwargs.get("optimizer"))
            if recorder.closely:
                recipe.updated(kwargs.get("optimizer"))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if recipe := self._leading or self._lead(args):
            kept = recipe.recorder.end_step(state.global_step)  # of most steps that is all
            if not kept or control.should_save or control.should_evaluate:
                known = kwargs.get("model"), kwargs.get("optimizer")
                recipe.step_end(state.global_step, control, *known)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if recipe := self._lead(args):
            recipe.evaluated(state, control, kwargs.get("metrics") or {})

    def on_predict(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if recipe := self._lead(args):
            recipe.predicted()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if recipe := self._lead(args):
            recipe.saved(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if recipe := self._lead(args):
            recipe.train_end(state, control)


class Attached(RecipeCallback):
    """What `attach` adds: with the Trainer at hand its seams tell what two events would."""

    on_step_begin = TrainerCallback.on_step_begin
    on_pre_optimizer_step = TrainerCallback.on_pre_optimizer_step


class InitialLossCallback(RecipeCallback):
    """`RecipeCallback` for the recipe's lines "verify loss @ init" and "init well"."""

    preset = ("initial-loss-unexpected", "output-bias-unset")


class HockeyStickCallback(RecipeCallback):
    """`RecipeCallback` for the first steps that only learn the prior."""

    preset = ("hockey-stick",)


class LRDecayCallback(RecipeCallback):
    """`RecipeCallback` for the recipe's "do not trust learning rate decay defaults".

    The schedule is judged before step 1; at half of a run of 1,000 steps or more, and at the
    end, its report answers which decay suits the data set, with a picture of the predictions.
    """

    preset = (
        "schedule-never-decays",
        "schedule-decays-early",
        "warmup-too-long",
        "still-improving",
        "saturated-early",
    )
