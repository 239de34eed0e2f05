"""The search engine: which point to try next, what came of it, and what a dead worker left.

One adapter, four verbs: `suggest`, `tell`, `resume`, `report`. Behind `OptunaEngine` stands a study
in a storage that any number of workers share: a file (JournalStorage, also on a network file
system) or a database URL. Points are quasi-random by default (`tune.space.quasi_random`); after
`explore` of them Optuna's TPE may exploit what they showed. One process needs no Optuna for these
points: `tune.points_engine`. A trial is a process of its own (`tune.worker`), or a call:

    engine = OptunaEngine(space, storage="sweep.journal")
    search(engine, lambda point: Result("complete", train(**point.params)), trials=16)

Nothing that was told is lost: a storage is written before `tell` returns. A trial that diverged is
infeasible, and stays in the study as such; a trial whose worker died is run again by another.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from hf_recipe.tune.optuna_points import (
    distributions_of,
    import_optuna,
    open_storage,
    quasi_random_sampler,
    value_of,
)
from hf_recipe.tune.space import parameters_of
from hf_recipe.tune.study import name_of

State = Literal["complete", "infeasible", "failed", "pruned"]
SEARCHES = ("quasi_random", "bayes")
LOST = "lost"  # the trial's worker died; another trial has taken its point up


@dataclass(frozen=True)
class Suggestion:
    """A point to try.

    Attributes:
        number: of the trial.
        params: values by dotted name, constants included.
    """

    number: int
    params: dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What a trial gave.

    Attributes:
        state: "complete"; "infeasible": it ran and diverged; "pruned": stopped as hopeless;
            "failed": it did not run to its end.
        value: of the metric; a value that is not finite makes a complete trial infeasible.
        curve: the metric over the run.
        reason: why it is not complete.
        facts: anything else worth keeping, JSON-able.
    """

    state: State
    value: float | None = None
    seed: int | None = None
    curve: tuple[float, ...] = ()
    seconds: float | None = None
    reason: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def checked(self) -> Result:
        """Itself, or infeasible where it claims to be complete without a finite value."""
        if self.state != "complete" or (self.value is not None and math.isfinite(self.value)):
            return self
        reason = self.reason or f"the metric is {self.value}"
        return Result("infeasible", None, self.seed, self.curve, self.seconds, reason, self.facts)


class Engine(Protocol):
    """What a worker needs of whatever searches."""

    def suggest(self, trials: int) -> Suggestion | None:
        """The next point; None once `trials` of them are finished or at work."""

    def tell(self, number: int, result: Result) -> bool:
        """Keep what a trial gave; False where it had been told before."""

    def report(self, number: int, step: int, value: float) -> bool:
        """Note the metric in the middle of a run; True: the trial may be stopped."""

    def resume(self, left: Callable[[int, Mapping[str, Any]], Result | None]) -> list[int]:
        """Take up the trials of dead workers; their numbers."""

    def trials(self) -> list[dict[str, Any]]:
        """The finished trials, as `tune.analysis.analyse` takes them."""


def search(
    engine: Engine, train: Callable[[Suggestion], Result], trials: int
) -> list[dict[str, Any]]:
    """Run trials in this process until the study has `trials`; all that are finished.

    No other process may be at work on the study: what it left unfinished is taken up.

    Args:
        train: runs one trial; what it raises ends the search, and the trial is run again by the
            next one.
    """
    engine.resume(lambda number, notes: Result("failed", reason=LOST))
    while (suggestion := engine.suggest(trials)) is not None:
        engine.tell(suggestion.number, train(suggestion))
    return engine.trials()


class OptunaEngine:
    """An Optuna study as an `Engine`.

    Args:
        space: as in a W&B sweep's ``parameters``.
        storage: a file's path, or the URL of a database ("sqlite:///...", "postgresql://...").
        name: of the study.
        metric, greater_is_better: what is searched for.
        search: "quasi_random", or "bayes": quasi-random first, then TPE.
        explore: quasi-random trials before "bayes" begins.
        halving: stop runs that are worse than two thirds of their like (successive halving).
        seed: of the points; all workers of a study must agree.

    Raises:
        ValueError: a space that makes no sense, or another one than the study has.
        ImportError: without optuna.
    """

    def __init__(
        self,
        space: Mapping[str, Any],
        *,
        storage: str | Path,
        name: str = "study",
        metric: str = "eval/loss",
        greater_is_better: bool = False,
        search: str = "quasi_random",
        explore: int = 16,
        halving: bool = False,
        seed: int = 0,
    ) -> None:
        optuna = import_optuna()
        if search not in SEARCHES:
            raise ValueError(f"search must be one of {', '.join(SEARCHES)}; got {search!r}")
        self.space, self.metric, self.greater_is_better = dict(space), metric, greater_is_better
        self.parameters = {name_of(p): p for p in parameters_of(space)}
        tpe = optuna.samplers.TPESampler(
            seed=None, multivariate=True, constant_liar=True, n_startup_trials=1
        )
        self.study = optuna.create_study(
            study_name=name,
            storage=open_storage(storage),
            sampler=quasi_random_sampler(
                space, seed, then=(tpe if search == "bayes" else None), explore=explore
            ),
            pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
            if halving
            else optuna.pruners.NopPruner(),
            direction="maximize" if greater_is_better else "minimize",
            load_if_exists=True,
        )
        self._agree(seed)
        self._live: dict[int, Any] = {}

    def _agree(self, seed: int) -> None:
        """All workers of a study search the same space for the same metric."""
        mine = json.loads(json.dumps({"space": self.space, "metric": self.metric, "seed": seed}))
        known = self.study.user_attrs.get("asked")
        if known is None:
            self.study.set_user_attr("asked", mine)
        elif known != mine:
            other = next(key for key in mine if known.get(key) != mine[key])
            raise ValueError(
                f"study {self.study.study_name!r} was begun with another {other}; give the new "
                "search another name or storage"
            )

    # ---------------------------------------------------------------- the four verbs

    def suggest(self, trials: int) -> Suggestion | None:
        """The next point; None once `trials` of them are finished or at work."""
        if self._counted() >= trials:
            return None
        trial = self.study.ask(distributions_of(self.space))
        earlier = self.study.get_trials(deepcopy=False)
        if sum(counts(t) for t in earlier if t.number < trial.number) >= trials:
            self._drop(trial.number, "another worker took the last place")
            return None
        self._live[trial.number] = trial
        params = {
            name: value_of(p, trial.params[name]) if p.varies else p.at(0.0)
            for name, p in self.parameters.items()
        }
        self.note(trial.number, params=params)
        return Suggestion(trial.number, params)

    def tell(self, number: int, result: Result) -> bool:
        """Keep what a trial gave; False where it had been told before."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        result = result.checked()
        state, value = {
            "complete": (TrialState.COMPLETE, result.value),
            "failed": (TrialState.FAIL, None),
        }.get(result.state, (TrialState.PRUNED, None))
        try:
            self.note(number, result=asdict(result))
            self.study.tell(number, value, state=state)
        except (ValueError, UpdateFinishedTrialError):
            if self._trial(number).state.is_finished():
                return False
            raise
        finally:
            self._live.pop(number, None)
        return True

    def report(self, number: int, step: int, value: float) -> bool:
        """Note the metric in the middle of a run; True: the trial may be stopped."""
        if not math.isfinite(value):
            return False
        trial = self._live[number]
        trial.report(value, step)
        return bool(trial.should_prune())

    def resume(self, left: Callable[[int, Mapping[str, Any]], Result | None]) -> list[int]:
        """Take up the trials of dead workers.

        Args:
            left: (number, notes of the trial) -> None while somebody works on it; else what the
                dead worker left: a result, or "failed" with the reason `LOST`.

        Returns:
            Numbers of the trials that were told, or whose points wait to be tried again.
        """
        from optuna.trial import TrialState

        taken = []
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.number in self._live:
                continue
            result = left(trial.number, trial.user_attrs)
            if result is None:
                continue
            if result.reason == LOST:
                if self._drop(trial.number, LOST):
                    self.study.enqueue_trial(trial.params, user_attrs={"again": trial.number})
                    taken.append(trial.number)
            elif self.tell(trial.number, result):
                taken.append(trial.number)
        return taken

    # ---------------------------------------------------------------- the study

    def note(self, number: int, **notes: Any) -> None:
        """Keep JSON-able notes with a trial that is at work."""
        trial_id = self._trial(number)._trial_id
        for key, value in notes.items():
            self.study._storage.set_trial_user_attr(trial_id, key, value)

    def give_back(self, number: int) -> None:
        """A worker that stops hands its unfinished trial to the others."""
        params = self._trial(number).params
        self._live.pop(number, None)
        if self._drop(number, LOST):
            self.study.enqueue_trial(params, user_attrs={"again": number})

    def at_work(self) -> int:
        """Trials that some worker is at."""
        from optuna.trial import TrialState

        return len(self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))

    def trials(self) -> list[dict[str, Any]]:
        """The finished trials, as `tune.analysis.analyse` takes them."""
        found = []
        for trial in self.study.get_trials(deepcopy=False):
            result = trial.user_attrs.get("result")
            if not trial.state.is_finished() or not counts(trial) or result is None:
                continue
            found.append(as_trial(trial.number, trial.user_attrs["params"], result))
        return found

    def _trial(self, number: int) -> Any:
        return self.study.get_trials(deepcopy=False)[number]

    def _counted(self) -> int:
        from optuna.trial import TrialState

        trials = self.study.get_trials(deepcopy=False)
        return sum(counts(t) for t in trials if t.state != TrialState.WAITING)

    def _drop(self, number: int, why: str) -> bool:
        """End a trial that counts for nothing; False where somebody else did."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        with contextlib.suppress(UpdateFinishedTrialError, ValueError):
            self.note(number, dropped=why)
            self.study.tell(number, state=TrialState.FAIL)
            return True
        return False


def as_trial(number: int, params: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """A finished trial as `tune.analysis.analyse` takes it.

    Args:
        result: a `Result` as a dict.
    """
    state = {"complete": "complete", "pruned": "pruned"}.get(result["state"], "failed")
    one = {
        "number": number,
        "params": dict(params),
        "value": result["value"] if state == "complete" else None,
        "state": state,
        "seconds": result["seconds"],
        "reason": result["reason"],
    }
    one |= {"seed": result["seed"]} if result["seed"] is not None else {}
    return one | ({"curve": list(result["curve"])} if result["curve"] else {})


def counts(trial: Any) -> bool:
    """Whether an Optuna trial uses up one of the search's places."""
    return "dropped" not in trial.user_attrs
