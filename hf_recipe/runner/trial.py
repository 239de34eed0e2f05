"""``recipe.py --trial``: one training with these flags, as a sweep runs it.

One run, one W&B run, one ``metrics.json``. The data were looked at before the sweep began, so
nothing but the training is watched; a loss that is not finite ends it as infeasible.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from hf_recipe.core.check import plain
from hf_recipe.core.report import write_atomically
from hf_recipe.instruments.compare import Outcome, Variant
from hf_recipe.instruments.distributed import from_rank_0
from hf_recipe.runner.experiment import Lab
from hf_recipe.runner.options import Options, split_list
from hf_recipe.runner.setup import Setup
from hf_recipe.trainer.attach import attach
from hf_recipe.tune.results import CURVE, FOLDER_VARIABLE, METRICS

INFEASIBLE = "loss-not-finite"


def trial_folder(options: Options) -> Path:
    """Where a trial writes: what its worker says; else a folder per W&B run; else as it was told.

    Agents on one machine share the command line, and must not share the folder.
    """
    told = "output_dir" in options.given
    if not told and FOLDER_VARIABLE in os.environ:
        return Path(os.environ[FOLDER_VARIABLE])
    base = Path(str(options.training.output_dir))
    run = os.environ.get("WANDB_RUN_ID")
    return base / "trials" / run if run else base


class TrialLab(Lab):
    """A lab for a single experiment."""

    KEPT = 0  # a sweep would keep the weights of all its trials

    def _watch(self, trainer: Trainer, setup: Setup, variant: Variant) -> Any:
        recipe = attach(
            trainer,
            select=split_list(self.options.recipe.select) or None,
            ignore=["data", "baselines", "overfitting", *split_list(self.options.recipe.ignore)],
            report_dir=self._report_folder(variant),
            log_samples=self.options.recipe.log_samples,
        )
        recipe.closing.console = self.show.silent_sink()
        trainer.add_callback(_Ends(recipe))
        trainer.add_callback(_Curve(self.folder / CURVE))
        return recipe

    def _measure(self, trainer: Trainer, setup: Setup, seconds: float) -> Outcome:
        seen = [h["step"] for h in trainer.state.log_history if "eval_loss" in h]
        if seen[-1:] != [trainer.state.global_step]:
            trainer.evaluate()  # so that the tracker's last eval/loss is that of the last weights
        return super()._measure(trainer, setup, seconds)

    @property
    def trackers(self) -> list[str]:
        if "report_to" in self.options.given:
            return super().trackers
        return ["wandb"] if "WANDB_SWEEP_ID" in os.environ else []


class _Ends(TrainerCallback):  # type: ignore[misc]
    """A run that cannot come back need not go on; all ranks hear of findings alike."""

    def __init__(self, recipe: Any) -> None:
        self.recipe = recipe

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if any(finding.check == INFEASIBLE for finding in self.recipe.report.flat):
            control.should_training_stop = True

    on_evaluate = on_step_end


class _Curve(TrainerCallback):  # type: ignore[misc]
    """One line per evaluation, for whoever decides whether the run is worth going on."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.path.unlink(missing_ok=True)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        value = (metrics or {}).get("eval_loss")
        if state.is_world_process_zero and value is not None and math.isfinite(value):
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([state.global_step, float(value)]) + "\n")


def run_trial(lab: TrialLab) -> int:
    """Train once, leave ``metrics.json``; 0 also where the run diverged: that is an answer."""
    setup = lab.start
    seed = int(lab.options.training.seed)
    began = time.time()
    outcome = lab.train(setup.variant("trial", seed))
    if lab.leads:
        told = _told(lab, outcome, seed) | {"began": began}
        write_atomically(lab.folder / METRICS, json.dumps(plain(told), allow_nan=False))
        lab.show.say(f"metrics: {lab.folder / METRICS}")
    return from_rank_0(0)


def _given(options: Options) -> dict[str, Any]:
    """What this trial was told, so that a folder of trials can be analysed by itself."""
    parts = (options.model, options.data, options.recipe, options.training)
    known = {name: value for part in parts for name, value in vars(part).items()}
    return {n: known[n] for n in sorted(options.given & known.keys())}


def _told(lab: Lab, outcome: Outcome, seed: int) -> dict[str, Any]:
    findings = sorted({f.check for f in lab.report.flat if f.severity == "error"})
    diverged = not math.isfinite(outcome.loss) or INFEASIBLE in findings
    metrics = {
        f"eval_{name.removeprefix('validation_')}": value
        for name, value in outcome.facts["metrics"].items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }
    return {
        "state": "infeasible" if diverged else "complete",
        "reason": "the loss is not finite" if diverged else "",
        "metrics": metrics if diverged else metrics | {"eval_loss": outcome.loss},
        "params": _given(lab.options),
        "curve": [[s, v if math.isfinite(v) else None] for s, v in outcome.facts["curve"]],
        "seed": seed,
        "seconds": outcome.cost,
        "facts": {
            "processes": outcome.facts["processes"],
            "steps": outcome.facts["steps"],
            "findings": findings,
        },
    }
