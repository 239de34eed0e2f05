"""How much does the same configuration vary? Trained n times, told apart by its seed alone.

The Tuning Playbook (2023) asks for this before two settings are compared: a difference that seeds
make by themselves is no improvement. Afterwards the Trainer is as it was before, weights, random
state and arguments included.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import DefaultFlowCallback, set_seed
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import SaveStrategy

from hf_recipe.core.check import Measurement
from hf_recipe.core.exhibit import Answer, Table
from hf_recipe.core.report import Report, Stored
from hf_recipe.instruments.quiet import quiet

NUMBERS = (int, float, np.integer, np.floating)


@dataclass(frozen=True)
class TrialVariance(Measurement):
    """The spread of one configuration's evaluations over seeds.

    Attributes:
        seeds: of the trainings.
        fresh: whether each began from weights drawn anew (``model_init``), or all from the same.
        metrics: {metric: its value at each seed}, the Trainer's own metrics ("eval_loss", ...).
    """

    seeds: tuple[int, ...]
    fresh: bool
    metrics: dict[str, tuple[float, ...]]

    def mean(self, metric: str = "eval_loss") -> float:
        """Over the seeds."""
        return float(np.mean(self.metrics[metric]))

    def spread(self, metric: str = "eval_loss") -> float:
        """Standard deviation between seeds."""
        return float(np.std(self.metrics[metric], ddof=1))

    def resolves(self, metric: str = "eval_loss") -> float:
        """The difference between two single runs that seeds exceed once in twenty times."""
        from scipy.special import stdtrit

        return float(stdtrit(len(self.seeds) - 1, 0.975)) * math.sqrt(2) * self.spread(metric)


def trial_variance(
    trainer: Any, n: int = 5, *, seeds: Sequence[int] | None = None
) -> TrialVariance:
    """Train `trainer`'s configuration with n seeds, evaluate each; put everything back.

    With ``model_init`` the weights are drawn anew for each seed; without it all runs begin from
    the weights at hand, and what varies is the order of the rows, dropout and a new head's noise.

    Args:
        n: trainings, at least 2.
        seeds: default: the Trainer's own seed and those after it.

    Raises:
        ValueError: fewer than two seeds, or nothing to evaluate on.
    """
    chosen = tuple(seeds) if seeds is not None else tuple(trainer.args.seed + k for k in range(n))
    if len(chosen) < 2:
        raise ValueError(f"a spread takes at least 2 trainings; got {len(chosen)}")
    if trainer.eval_dataset is None:
        raise ValueError("there is no eval_dataset to evaluate the trainings on")
    found: dict[str, list[float]] = {}
    fresh = trainer.model_init is not None
    with _as_before(trainer) as begin:
        for seed in chosen:
            begin(seed)
            trainer.train()
            for name, value in _one_set(trainer.evaluate()).items():
                found.setdefault(name, []).append(value)
    whole = {name: tuple(v) for name, v in found.items() if len(v) == len(chosen)}
    return TrialVariance(chosen, fresh, whole)


def _one_set(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that tell quality; times and counts are none."""
    speed = ("_runtime", "_per_second", "_time", "_memory")
    return {
        name: float(value)
        for name, value in metrics.items()
        if name.startswith("eval_") and not name.endswith(speed) and isinstance(value, NUMBERS)
    }


@contextmanager
def _as_before(trainer: Any) -> Iterator[Any]:
    """Yields ``begin(seed)``; on exit the Trainer is what it was, but for its log's silence."""
    model, args, handler = trainer.model, trainer.args, trainer.callback_handler
    names = ("model", "model_wrapped", "optimizer", "lr_scheduler", "state", "control")
    kept = {name: getattr(trainer, name) for name in names}
    weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
    said, callbacks = dict(vars(args)), handler.callbacks

    def begin(seed: int) -> None:
        args.seed = args.data_seed = seed
        set_seed(seed)
        model.load_state_dict(weights)
        trainer.model = trainer.model_wrapped = model
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.state = TrainerState()

    with quiet(model, trainer=trainer), tempfile.TemporaryDirectory() as folder:
        try:
            handler.callbacks = [c for c in callbacks if isinstance(c, DefaultFlowCallback)]
            trainer.control = copy.copy(trainer.control)
            args.output_dir, args.save_strategy = folder, SaveStrategy.NO
            args.load_best_model_at_end = False
            yield begin
        finally:
            vars(args).clear()
            vars(args).update(said)
            handler.callbacks = callbacks
            for name, value in kept.items():
                setattr(trainer, name, value)
            model.load_state_dict(weights)


def report_variance(found: TrialVariance, report: Report) -> None:
    """Put the spread into a report: an answer, a table, and the numbers themselves."""
    loss = "eval_loss" if "eval_loss" in found.metrics else next(iter(found.metrics))
    begun = "fresh weights" if found.fresh else "the same weights"
    report.answer(
        Answer(
            "How much does the same configuration vary?",
            "tune",
            f"{loss} {found.mean(loss):.4g} +- {found.spread(loss):.2g} over {len(found.seeds)} "
            f"seeds from {begun}: two single runs that differ by less than "
            f"{found.resolves(loss):.2g} are not told apart",
            {"seeds": len(found.seeds), "spread": found.spread(loss)},
        )
    )
    rows = tuple(
        (name, found.mean(name), found.spread(name), min(v), max(v), found.resolves(name))
        for name, v in found.metrics.items()
    )
    columns = ("metric", "mean", "standard deviation", "lowest", "highest", "resolved")
    report.exhibit(Table("The same configuration, again and again", "tune", columns, rows))
    report.store(Stored(found.kind(), found.version, "run", "", None, found.values()))


def measured_variance(recipe: Any, n: int) -> TrialVariance:
    """`trial_variance` of a recipe's Trainer, into its report; nothing else is looked at."""
    if recipe.trainer is None:
        raise ValueError("a callback alone cannot do this: use hf_recipe.attach(trainer)")
    paused = recipe.paused
    recipe.pause()
    try:
        found = trial_variance(recipe.trainer, n)
    finally:
        if not paused:
            recipe.resume()
    report_variance(found, recipe.report)
    recipe.closing.write()
    return found
