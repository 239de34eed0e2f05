"""`hf_recipe.attach(trainer)`: one line in an existing script."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hf_recipe.core.config import Settings
from hf_recipe.explanation import stored_checks
from hf_recipe.trainer.callback import Attached, RecipeCallback, share
from hf_recipe.trainer.recipe import Recipe


def attach(
    trainer: Any,
    *,
    select: Collection[str] | None = None,
    ignore: Collection[str] = (),
    expect: Collection[str] = (),
    severity: Mapping[str, str] | None = None,
    thresholds: Mapping[str, Mapping[str, Any]] | None = None,
    on_error: str | None = None,
    baseline: str | Path | None = None,
    report_dir: str | Path | None = None,
    overhead: float | None = None,
    log_samples: bool | None = None,
) -> Recipe:
    """Watch `trainer`: probes before step 1, monitors while it trains, a report at the end.

    The run's weights, optimizer, random state and data order are bit-identical with and without.
    Again on the same Trainer replaces the earlier attachment.

    Args:
        trainer: a `transformers.Trainer` or a subclass, trained yet or not.
        select: check names or stages to run; None: all.
        ignore: check names or stages not to run.
        expect: checks meant to fire: silent if they do, a finding if they do not.
        severity: severity by check: "error", "warning" or "note".
        thresholds: keyword arguments of checks, by check; see ``hf-recipe explain NAME``.
        on_error: on findings of severity error: "warn" (the default), "stop" the training, or
            "raise". Before step 1 both raise, on all processes: a stop would still take a step.
        baseline: an earlier report's JSON; what stands in it is not reported again.
        report_dir: folder of the report; None: ``<output_dir>/recipe``.
        overhead: share of a step's time that monitors may use (0.01); looks at weights and
            activations, each 512th step at 0.01, come oftener or seldomer in proportion.
        log_samples: whether rows of the data may leave this machine (False).

    Returns:
        The recipe: ``findings``, ``report``, ``preflight()``, ``pause()``, ``detach()``, ...

    Raises:
        ValueError: an unknown check, stage or threshold, with the nearest known name.
        TypeError: `trainer` is not a Trainer.
    """
    from transformers import Trainer

    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"attach() takes a transformers.Trainer; got {type(trainer).__name__}. "
            "In a loop of your own, use hf_recipe.inspect_dataset and the checks themselves."
        )
    arguments = {
        "select": select,
        "ignore": ignore or None,
        "expect": expect or None,
        "severity": severity,
        "thresholds": thresholds,
        "on_error": on_error,
        "baseline": baseline,
        "report_dir": report_dir,
        "overhead": overhead,
        "log_samples": log_samples,
    }
    settings = Settings.resolve(arguments, checks=known_thresholds())
    earlier = vars(trainer).get("hf_recipe")
    if earlier is not None:
        earlier.detach()
    recipe = Recipe(settings, trainer=trainer)
    share(trainer.args, recipe)  # callbacks that are there already, or come later, join it
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, RecipeCallback):
            callback.join(recipe)
    member = RecipeCallback() if recipe.by_events else Attached()
    member.join(recipe)
    trainer.add_callback(member)
    trainer.hf_recipe = recipe
    recipe.on_detach = lambda: _let_go(trainer, member)
    recipe.install()
    return recipe


def _let_go(trainer: Any, member: RecipeCallback) -> None:
    callbacks = trainer.callback_handler.callbacks
    callbacks[:] = [callback for callback in callbacks if callback is not member]
    vars(trainer).pop("hf_recipe", None)


def known_thresholds() -> dict[str, Collection[str]]:
    """Every check of the catalogue with the names of its thresholds, without importing it."""
    return {name: tuple(entry["thresholds"]) for name, entry in stored_checks().items()}
