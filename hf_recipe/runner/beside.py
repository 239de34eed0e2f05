"""What one training gives beside its last weights: those of its best evaluation, and their average.

Stopping early changes nothing in a run until it stops, and averaging nothing at all. So both are
looked at in the training that is done anyway, and cost no other. A run that ends with its average
is stopped at the best evaluation of its averaged weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import TrainerCallback

from hf_recipe.instruments.batches import rows_of_trainer
from hf_recipe.instruments.compare import Outcome, Variant, read_outcome
from hf_recipe.instruments.distributed import from_rank_0
from hf_recipe.instruments.window import Evaluation
from hf_recipe.regularize.averaging import WeightAveraging
from hf_recipe.runner.setup import Setup

if TYPE_CHECKING:
    from hf_recipe.runner.experiment import Lab

STOPPED, AVERAGED, BOTH = "stopped", "averaged", "averaged and stopped"
SPAN = 0.05  # share of the steps that the average reaches back over
MOST_WEIGHTS = 50_000_000  # of models whose weights are kept twice more


class _Averaging(WeightAveraging):
    """An average over the last `SPAN` of the run; `stays`: the run ends with it."""

    stays = False

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Both weights are compared when the run is over."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.decay = 1 - 1 / max(10.0, SPAN * state.max_steps)
        super().on_train_begin(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stays and self.count:
            self.apply()


class Course:
    """The evaluations of a run's weights, raw or averaged, and the weights of the best of them."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.evaluations: list[Evaluation] = []
        self.best = np.inf
        self.weights: dict[str, torch.Tensor] = {}

    def take_in(self, seen: Evaluation) -> None:
        """One more evaluation, of the weights that the model has now."""
        self.evaluations.append(seen)
        loss = float(np.mean(seen.row_losses))
        if loss < self.best:
            state_dict = self.trainer.model.state_dict()
            self.weights = {name: value.detach().clone() for name, value in state_dict.items()}
            self.best = loss

    def stopped(self, end: Outcome, measure: Callable[[], Outcome]) -> dict[str, Any] | None:
        """The outcome at the best evaluation; empty: that is the end; None: not to be told.

        Which evaluation was best is seen on the rows that it is judged by. So its losses are
        taken cross-fitted: each half of the rows is judged where the other half was best.
        """
        rows = np.asarray(end.row_losses)
        course = [e for e in self.evaluations if len(e.row_losses) == len(rows)]
        if not course or len(course) < len(self.evaluations) or not np.isfinite(rows).all():
            return None
        table = np.asarray([rows, *(e.row_losses for e in reversed(course))])  # the latest first
        best = int(table.mean(1).argmin())
        last = np.asarray(course[-1].row_losses)
        if course[-1].step == end.facts["steps"] and not np.allclose(rows, last, 0.02, 0.02):
            return None  # this task's losses are not those of its evaluations
        if best == 0 or course[-best].step == end.facts["steps"]:
            return {}
        here = {name: value.clone() for name, value in self.trainer.model.state_dict().items()}
        _load(self.trainer.model, self.weights)
        try:
            found = measure()
        finally:
            _load(self.trainer.model, here)
        if not np.allclose(found.row_losses, course[-best].row_losses, 0.02, 0.02):
            return None
        losses = crossfitted(table).tolist()
        return {**_facts(found), "row_losses": losses, "steps": course[-best].step}


class Beside(TrainerCallback):  # type: ignore[misc]
    """Follows the evaluations of a run, with its own weights and with its averaged ones.

    Args:
        latest: gives the evaluation that has just been read.
    """

    def __init__(
        self,
        trainer: Any,
        setup: Setup,
        average: WeightAveraging,
        latest: Callable[[], Evaluation | None],
    ) -> None:
        self.trainer, self.setup, self.average, self.latest = trainer, setup, average, latest
        self.rows = rows_of_trainer(trainer, trainer.eval_dataset, "validation")
        self.raw, self.averaged = Course(trainer), Course(trainer)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take in one evaluation; all ranks have the same one."""
        seen = self.latest()
        if seen is None or seen.step != state.global_step or not seen.row_losses:
            return
        self.raw.take_in(seen)
        if self.average.count and self.rows is not None:
            with self.average.weights():
                losses = from_rank_0(self.average.losses(self.rows))
                self.averaged.take_in(replace(seen, row_losses=tuple(losses)))

    def add_to(
        self,
        end: Outcome,
        measure: Callable[[Any, Setup, float], Outcome],
    ) -> Outcome:
        """`end`, with what was looked at beside it among its facts."""

        def again() -> Outcome:
            return measure(self.trainer, self.setup, 0.0)

        found: dict[str, Any] = {}
        told = not self.setup.label_smoothing  # else the run's evaluations were smoothed too
        if told:
            own = self.averaged if self.setup.average else self.raw
            found[STOPPED] = own.stopped(end, again)
        if self.average.count and not self.setup.average:
            with self.average.weights():
                averaged = again()
                found[AVERAGED] = {**_facts(averaged), "row_losses": list(averaged.row_losses)}
                if told:
                    found[BOTH] = self.averaged.stopped(averaged, again)
            if found.get(BOTH) == {}:
                found[BOTH] = found[AVERAGED]
        seen = {name: facts for name, facts in found.items() if facts is not None}
        return replace(end, facts={**end.facts, "beside": seen})


def crossfitted(table: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Losses (rows,) of each half of the rows at the line of `table` that the other half likes.

    Args:
        table: (evaluations, rows); of equally good ones the first is taken.
    """
    half = np.random.default_rng(0).permutation(table.shape[1]) % 2
    losses = np.empty(table.shape[1])
    for side in (0, 1):
        chosen = int(table[:, half != side].mean(1).argmin())
        losses[half == side] = table[chosen, half == side]
    return losses


def _facts(found: Outcome) -> dict[str, Any]:
    return {
        "metric": found.metric,
        "train_losses": found.facts["train_losses"],
        "metrics": found.facts["metrics"],
    }


def _load(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(weights[name])


def look_beside(lab: Lab, trainer: Any, setup: Setup) -> Beside | None:
    """Put on a Trainer what looks on for the ladder: an average, and the best evaluation.

    Only where somebody may ask for it: in the stages up to the ladder.
    """
    whole = not (setup.rows or setup.teacher or setup.keep or setup.early_stopping)
    small = sum(p.numel() for p in trainer.model.parameters()) <= MOST_WEIGHTS
    asked = lab.stage in ("baselines", "complexify", "regularize")
    looks = whole and small and asked and setup.part == "train"
    if not (looks or setup.average):
        return None
    average = _Averaging(trainer, rows=lab.feed.count("validation"))
    trainer.add_callback(average)
    # a training that stops early ends with the weights of its best evaluation
    average.stays = setup.average and not setup.early_stopping
    if not looks:
        return None
    passing = Beside(trainer, setup, average, lambda: trainer.hf_recipe.evaluation.latest)
    trainer.add_callback(passing)
    return passing


def shared_outcome(lab: Lab, setup: Setup, variant: Variant) -> Outcome | None:
    """The outcome, where another training has had it on its way; None: it is to be trained."""
    for name, plain in shared_with(setup):
        path = lab.outcome_path(plain.variant(variant.change, variant.seed))
        known = from_rank_0(read_outcome(path) if lab.leads else None)
        found = None if known is None else outcome_beside(known, name)
        if found is not None:
            return found
    return None


def shared_with(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """What `setup` can take from another one's training, and that other one."""
    if setup.keep:
        return
    if setup.early_stopping:
        yield STOPPED, setup.change(early_stopping=False)
    plain = setup.change(early_stopping=False, average=False)
    if setup.average:
        yield (BOTH if setup.early_stopping else AVERAGED), plain


def outcome_beside(end: Outcome, name: str) -> Outcome | None:
    """The outcome that `end` was measured with beside it; None: it was not."""
    found = end.facts.get("beside", {}).get(name)
    if found is None:
        return None
    facts = {k: v for k, v in end.facts.items() if k != "beside"} | {"shared": True}
    if name in (AVERAGED, BOTH):
        facts["averaged"] = True
    if not found:  # the last weights are those of the best evaluation
        return replace(end, cost=0.0, facts=facts)
    kept = ("train_losses", "metrics", "steps")
    facts |= {key: found[key] for key in kept if key in found}
    return Outcome(tuple(found["row_losses"]), 0.0, found["metric"], facts)


def settled(outcome: Outcome) -> Outcome:
    """The outcome without the noise of a constant rate's last steps: that of the average beside it.

    Where there is none, as at the end of a decay, it is the outcome itself.
    """
    found = outcome_beside(outcome, AVERAGED)
    return outcome if found is None else found


def gains_beside(name: str, trainings: Sequence[Sequence[Outcome]]) -> list[np.ndarray[Any, Any]]:
    """Gains (seeds, rows) of what was looked at beside each training's own weights."""
    found = []
    for group in trainings:
        others = [outcome_beside(outcome, name) for outcome in group]
        if all(other is not None for other in others):
            own = np.asarray([outcome.row_losses for outcome in group])
            found.append(own - np.asarray([o.row_losses for o in others if o is not None]))
    return found
