"""Early stopping and best-model selection that cannot work as set, told before step 1.

What the Trainer does with these settings shows only at the first evaluation, or at the end, when
the weights are not the best ones: a metric that evaluation never reports, a best checkpoint that
is never written, a patience longer than the run. All of it can be read off the arguments.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.subject import Plan
from hf_recipe.regularize.metric_names import in_logs

LIBRARIES = ("transformers.", "hf_recipe.")  # their callbacks leave the metrics as they are


@dataclass(frozen=True)
class StoppingSetup(Measurement):
    """How this run evaluates, saves, stops and chooses. Intervals and totals are in steps.

    Attributes:
        stops_by: class name of the early-stopping callback; empty: none.
        patience, threshold: of the Trainer's own callback; None: another one, or none.
        metric: what is chosen by, as in the logs ("eval_loss"); None: nothing is declared.
        reported: what evaluation will report, as far as it can be known: where metrics are
            computed by the user's function, None.
        eval_strategy, save_strategy: "no", "steps", "epoch" or "best".
        eval_steps, save_steps: None unless their strategy is "steps".
        load_best: whether the best checkpoint is to be loaded at the end.
        evaluations: evaluations within the run; None: not known.
        total_steps: optimizer steps of the run; None: not known.
    """

    stops_by: str
    patience: int | None
    threshold: float | None
    metric: str | None
    reported: tuple[str, ...] | None
    eval_strategy: str
    save_strategy: str
    eval_steps: int | None
    save_steps: int | None
    load_best: bool
    evaluations: int | None
    total_steps: int | None


def take(subject: Any) -> Iterator[StoppingSetup]:
    """Read the setup off the arguments, the callbacks and what evaluation can report."""
    from transformers import EarlyStoppingCallback

    from hf_recipe.regularize.early_stopping import EarlyStopping

    args, trainer = subject.args, subject.trainer
    callbacks = trainer.callback_handler.callbacks if trainer is not None else []
    theirs = next((c for c in callbacks if isinstance(c, EarlyStoppingCallback)), None)
    ours = next((c for c in callbacks if isinstance(c, EarlyStopping)), None)
    metric = args.metric_for_best_model
    if ours is not None and theirs is None:
        metric = ours.name_of(args)
        sets = trainer.eval_dataset
        if (
            isinstance(sets, dict)
            and sets
            and ours.metric is None
            and not args.metric_for_best_model
        ):
            metric = f"{next(iter(sets))}_loss"  # it follows them all
    if metric is not None and not metric.startswith("eval_"):
        metric = f"eval_{metric}"
    total = subject.plan.total_steps if subject.plan is not None else None
    eval_strategy, save_strategy = str(args.eval_strategy.value), str(args.save_strategy.value)
    eval_steps = _interval(args.eval_steps, total) if eval_strategy == "steps" else None
    save_steps = _interval(args.save_steps, total) if save_strategy == "steps" else None
    stopper = theirs if theirs is not None else ours
    yield StoppingSetup(
        stops_by=type(stopper).__name__ if stopper is not None else "",
        patience=theirs.early_stopping_patience if theirs is not None else None,
        threshold=float(theirs.early_stopping_threshold or 0.0) if theirs is not None else None,
        metric=metric,
        reported=_reported(subject),
        eval_strategy=eval_strategy,
        save_strategy=save_strategy,
        eval_steps=eval_steps,
        save_steps=save_steps,
        load_best=bool(args.load_best_model_at_end),
        evaluations=_evaluations(subject, eval_strategy, eval_steps),
        total_steps=total,
    )


def _interval(steps: float | None, total: int | None) -> int | None:
    """A number of steps, which may be given as a share of the run."""
    if steps is None:
        return None
    if steps < 1:
        return math.ceil(steps * total) if total is not None else None
    return int(steps)


def _evaluations(subject: Any, strategy: str, every: int | None) -> int | None:
    """How many evaluations the run will see; with steps, one more at the end."""
    plan: Plan | None = subject.plan
    delay = float(subject.args.eval_delay or 0)
    if strategy == "no":
        return 0
    if plan is None:
        return None
    if strategy == "epoch":
        return max(0, math.ceil(plan.total_steps / max(1, plan.steps_per_epoch)) - int(delay))
    if not every:
        return None
    return len({*range(every, plan.total_steps + 1, every), plan.total_steps}) - len(
        [step for step in range(every, plan.total_steps + 1, every) if step < delay]
    )


def _reported(subject: Any) -> tuple[str, ...] | None:
    """Names that evaluation will report, or None where a function of the user's decides."""
    trainer = subject.trainer
    if trainer is None or trainer.compute_metrics is not None:
        return None
    for name in ("evaluate", "evaluation_loop", "prediction_step", "log"):
        method = inspect.getattr_static(type(trainer), name)
        module = getattr(inspect.unwrap(method), "__module__", "")
        if not module.startswith("transformers."):
            return None
    names = ("loss", "runtime", "samples_per_second", "steps_per_second")
    if isinstance(trainer.eval_dataset, dict):
        return tuple(f"eval_{split}_{name}" for split in trainer.eval_dataset for name in names)
    return tuple(f"eval_{name}" for name in names)


def miswired(
    setup: StoppingSetup,
    *,
    few: Annotated[int, "evaluations from which patience 1 is a risk: 4.7 % regret over 80"] = 10,
) -> Iterator[Fault]:
    """What stopping and choosing are set to do, and cannot."""
    who = setup.stops_by or ("load_best_model_at_end" if setup.load_best else "save_strategy=best")
    if not setup.stops_by and not setup.load_best and setup.save_strategy != "best":
        return
    if setup.eval_strategy == "no":
        yield _fault(
            "evaluation",
            f"{who} needs evaluations, and eval_strategy is no",
            'eval_strategy="epoch"',
        )
        return
    if setup.metric is None:
        yield _fault(
            "metric",
            f"{who} needs metric_for_best_model, and none is set: training fails at its start",
            'metric_for_best_model="loss", greater_is_better=False',
        )
    elif setup.reported is not None and setup.metric not in setup.reported:
        losses = [name for name in setup.reported if name.endswith("loss")]
        yield _fault(
            "metric",
            f"{who} watches {setup.metric}, which this evaluation cannot report; it reports "
            f"{', '.join(losses)} (there is no compute_metrics)",
            f'metric_for_best_model="{losses[0]}"',
        )
    yield from _best_is_lost(setup)
    yield from _patience(setup, few)


def _best_is_lost(setup: StoppingSetup) -> Iterator[Fault]:
    if not setup.load_best:
        return
    if setup.save_strategy == "no":
        yield _fault(
            "save_strategy",
            "load_best_model_at_end loads nothing: save_strategy is no, so no checkpoint exists",
            'save_strategy="best"',
        )
    if setup.save_steps is None or setup.total_steps is None or setup.eval_steps is None:
        return
    if setup.save_steps > setup.total_steps > setup.eval_steps:
        yield _fault(
            "save_steps",
            f"save_steps={setup.save_steps:,} is more than the run's {setup.total_steps:,} steps: "
            "only the last weights are saved, so the best ones cannot be loaded",
            'save_strategy="best"',
        )
    elif setup.save_steps > setup.eval_steps:
        yield _fault(
            "save_steps",
            f"saved every {setup.save_steps:,} steps and evaluated every {setup.eval_steps:,}: a "
            "best evaluation between two saves has no checkpoint to load",
            'save_strategy="best"',
            severity="warning",
        )


def _patience(setup: StoppingSetup, few: int) -> Iterator[Fault]:
    if setup.patience is None:
        return
    planned = setup.evaluations
    if planned is not None and setup.patience >= planned:
        yield _fault(
            "patience",
            f"early stopping can never act: its patience is {setup.patience}, and the run has "
            f"{planned} evaluations",
            f"EarlyStoppingCallback(early_stopping_patience={max(1, planned // 4)})",
            severity="warning",
        )
    elif setup.patience == 1 and planned is not None and planned >= few:
        yield _fault(
            "patience",
            f"patience 1: the first of {planned} evaluations that is not a new best ends the run",
            "Trainer(callbacks=[hf_recipe.EarlyStopping()])",
            severity="note",
        )
    if setup.threshold:
        yield _fault(
            "threshold",
            f"early_stopping_threshold={setup.threshold:g} is held against the best value, which "
            "any gain moves: a metric that gains a little less every time counts as standing still",
            "early_stopping_threshold=0.0",
            severity="warning",
        )


# ---------------------------------------------------------------- a metric of the user's own


@dataclass(frozen=True)
class ChosenMetric(Measurement):
    """A metric that chooses, beside what a rehearsed evaluation returned.

    Attributes:
        metric: as in the logs ("eval_f1").
        returned: names that `compute_metrics` returned, as in the logs.
        told_to: who was told it: ``metric_for_best_model``, or a callback's class.
    """

    metric: str
    returned: tuple[str, ...]
    told_to: str = "metric_for_best_model"


def take_chosen(subject: Any) -> Iterator[ChosenMetric]:
    """Set each chosen metric beside the names that the rehearsal of evaluation came by."""
    from transformers import TrainerCallback

    args, trainer = subject.args, subject.trainer
    chosen = {} if trainer is None else dict(_told(args, trainer))
    if not chosen or str(args.eval_strategy.value) == "no":
        raise Skip("no evaluation chooses by a metric")
    returned = subject.cache.get("metric names", {})
    if isinstance(trainer.eval_dataset, dict) or not any(returned.values()):
        raise Skip("what compute_metrics returns was not seen")
    for callback in trainer.callback_handler.callbacks:
        hook, home = type(callback).on_evaluate, type(callback).__module__
        if hook is not TrainerCallback.on_evaluate and not home.startswith(LIBRARIES):
            raise Skip(f"{type(callback).__name__} may add to what evaluation returns")
    names = {in_logs(name) for found in returned.values() for name in found}
    for metric, who in chosen.items():
        yield ChosenMetric(in_logs(metric), tuple(sorted(names)), who)


def _told(args: Any, trainer: Any) -> Iterator[tuple[str, str]]:
    """Each metric that was told to somebody who chooses by it."""
    from hf_recipe.regularize.best_checkpoints import BestCheckpoints
    from hf_recipe.regularize.early_stopping import EarlyStopping

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, EarlyStopping):
            yield from ((metric, "EarlyStopping") for metric in callback.metrics)
        elif isinstance(callback, BestCheckpoints) and callback.metric is not None:
            yield callback.metric, "BestCheckpoints"
    if args.metric_for_best_model is not None:
        yield args.metric_for_best_model, "metric_for_best_model"


def unreported(seen: ChosenMetric) -> Iterator[Fault]:
    """A metric to choose by that evaluation does not return."""
    timed = ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    if seen.metric in (*seen.returned, *(f"eval_{name}" for name in timed)):
        return
    first = seen.returned[0]
    returns = f"compute_metrics returns {', '.join(seen.returned[:5])}"
    if seen.told_to == "metric_for_best_model":
        text = f"metric_for_best_model is {seen.metric}, and {returns}: the first evaluation ends "
        yield _fault("metric", text + "the run with a KeyError", f'metric_for_best_model="{first}"')
    else:
        text = f"{seen.told_to} follows {seen.metric}, and {returns}: it will never act"
        yield _fault("metric", text, f'{seen.told_to}(metric="{first}")')


def _fault(subject: str, message: str, fix: str, severity: Any = None) -> Fault:
    return Fault(
        message=message,
        subject=subject,
        fix=fix,
        severity=severity,
        evidence={"seen": message.split(":")[0], "expected": fix},
    )


EARLY_STOP_MISWIRED = Check(
    name="early-stop-miswired",
    stage="regularize",
    severity="error",
    moments=("static", "probe"),
    why="The run will not stop, or will not end with its best weights, and says so at the first "
    "evaluation, at the end, or never.",
    fix='eval_strategy="epoch", save_strategy="best", metric_for_best_model="loss"',
    source="transformers issues 28530 (2024), 40221 (2025)",
    judges=(miswired, unreported),
    unsure="Metrics that another callback adds to the evaluation's dict, or that a function "
    "returns only where enough rows are there.",
)
PROBE = Probe(
    name="read how the run stops and chooses",
    moment="static",
    measures=(StoppingSetup,),
    take=take,
)
CHOSEN = Probe(
    name="look for the metric that chooses",
    moment="probe",
    measures=(ChosenMetric,),
    take=take_chosen,
    needs=("unsharded",),
)
