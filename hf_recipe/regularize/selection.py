"""What does this run choose by: which way round, on which rows, and on how many?

Best-model selection and early stopping believe the evaluation. A metric that is taken the wrong
way round keeps the worst checkpoint; a set that is the training set rewards memory; a test set
that chooses is no test any more; and a few rows cannot tell two checkpoints apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch

from hf_recipe.core.check import Check, Located, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.data.splits import is_training_set
from hf_recipe.instruments.subject import Subject
from hf_recipe.regularize.metric_names import (
    chosen_direction,
    chosen_metric,
    lower_is_better,
)


@dataclass(frozen=True)
class Selection(Measurement):
    """How the run chooses.

    Attributes:
        metric: what is chosen by; empty: nothing is declared.
        greater_is_better: as the arguments stand.
        chooses: settings that act on it ("load_best_model_at_end", ...).
    """

    metric: str
    greater_is_better: bool
    chooses: tuple[str, ...]


@dataclass(frozen=True)
class EvaluationRows(Measurement):
    """One evaluation set, as something to choose by.

    Attributes:
        name: of the set.
        rows: how many.
        labels_per_row: supervised numbers of a row (more than one: a sequence).
        is_training_set: whether it is the training set itself, or a copy of the same data.
        declared: whether its name says that it is training data.
        split: the split that the data set says it is ("test", ...); empty: it does not.
        chooses: settings of the run that choose by evaluation.
        scheduled: whether any evaluation is scheduled.
    """

    name: str
    rows: int
    labels_per_row: int
    is_training_set: bool
    declared: bool
    split: str
    chooses: tuple[str, ...]
    scheduled: bool


def measure_selection(subject: Subject) -> Iterator[Selection]:
    """Read metric and direction off the arguments, and off callbacks that have their own."""
    args, own = subject.args, tuple(_own_metrics(subject))
    yield Selection(
        metric=str(args.metric_for_best_model or ""),
        greater_is_better=bool(args.greater_is_better),
        chooses=tuple(name for name in _choosers(subject) if name not in {o[0] for o in own}),
    )
    for name, metric, greater in own:
        yield Selection(metric=metric, greater_is_better=greater, chooses=(name,))


def _own_metrics(subject: Subject) -> Iterator[tuple[str, str, bool]]:
    """Class name, metric and direction of each callback of ours that was told its own."""
    from hf_recipe.regularize.best_checkpoints import BestCheckpoints
    from hf_recipe.regularize.early_stopping import EarlyStopping

    callbacks = subject.trainer.callback_handler.callbacks if subject.trainer is not None else []
    for callback in callbacks:
        if not isinstance(callback, (EarlyStopping, BestCheckpoints)):
            continue
        if callback.metric is None and callback.greater_is_better is None:
            continue
        greater = chosen_direction(callback.metric, callback.greater_is_better, subject.args)
        names = callback.metrics if isinstance(callback, EarlyStopping) else ()
        for name in names or (chosen_metric(callback.metric, subject.args),):
            yield type(callback).__name__, name, greater


def stoppers(trainer: Any) -> list[Any]:
    """The early-stopping callbacks of a Trainer: its own kind's, and ours."""
    from transformers import EarlyStoppingCallback

    from hf_recipe.regularize.early_stopping import EarlyStopping

    callbacks = trainer.callback_handler.callbacks if trainer is not None else []
    return [c for c in callbacks if isinstance(c, (EarlyStoppingCallback, EarlyStopping))]


def _choosers(subject: Subject) -> tuple[str, ...]:
    args = subject.args
    found = ["load_best_model_at_end"] if args.load_best_model_at_end else []
    if str(getattr(args.save_strategy, "value", "")) == "best":
        found.append("save_strategy=best")
    if str(getattr(args.lr_scheduler_type, "value", "")) == "reduce_lr_on_plateau":
        found.append("reduce_lr_on_plateau")
    return (*found, *(type(c).__name__ for c in stoppers(subject.trainer)))


def measure_evaluation_rows(subject: Subject) -> Iterator[Located]:
    """Yield the size and the kinship of every evaluation set whose rows can be counted."""
    chooses = _choosers(subject)
    scheduled = str(getattr(subject.args.eval_strategy, "value", "no")) != "no"
    sets = {
        name: rows for name, rows in subject.evaluation.items() if not rows.is_stream and len(rows)
    }
    if not sets:
        raise Skip("there is no evaluation set with a length")
    for name, rows in sets.items():
        labels = (
            None if subject.overridden("evaluation") else rows.batch(rows.evenly_spaced(2)).labels
        )
        many = int(labels.numel()) // min(2, len(rows)) if isinstance(labels, torch.Tensor) else 1
        yield Located(
            EvaluationRows(
                name=name,
                rows=len(rows),
                labels_per_row=max(many, 1),
                is_training_set=subject.train is not None and is_training_set(subject, name),
                declared="train" in name.lower(),
                split=str(getattr(rows.dataset, "split", None) or ""),
                chooses=chooses,
                scheduled=scheduled,
            ),
            name,
        )


# ---------------------------------------------------------------- verdicts


def metric_direction(selection: Selection) -> Iterator[Fault]:
    """The metric's name says one direction, the arguments the other."""
    lower = lower_is_better(selection.metric)
    if not selection.chooses or lower is None or lower != selection.greater_is_better:
        return
    way = "lower" if lower else "higher"
    yield Fault(
        f"{', '.join(selection.chooses)} takes the {'highest' if lower else 'lowest'} "
        f"{selection.metric} for the best (greater_is_better={selection.greater_is_better}); by "
        f"its name {way} is better",
        subject=selection.metric,
        fix=f"greater_is_better={not lower}",
        evidence={
            "seen": f"greater_is_better={selection.greater_is_better}",
            "expected": f"greater_is_better={not lower}",
        },
    )


def eval_in_training_set(rows: EvaluationRows) -> Iterator[Fault]:
    """The evaluation set is the training set; or the test split chooses."""
    if rows.is_training_set:
        meant = rows.declared or not (rows.scheduled or rows.chooses)
        yield Fault(
            f"the evaluation set {rows.name} is the training set ({rows.rows:,} rows): it measures "
            "memory" + ("" if meant else ", and nothing else is evaluated under that name"),
            subject=rows.name,
            severity="note" if meant else None,
            evidence={"seen": "the training set", "expected": "rows that were held out"},
        )
    elif rows.split.startswith("test") and rows.chooses and rows.scheduled:
        yield Fault(
            f"the test split chooses: {', '.join(rows.chooses)} acts on {rows.name}, which the "
            "data set calls its test split, so that no figure on it is a test any more",
            subject=rows.name,
            severity="warning",
            fix='parts = train.train_test_split(0.1)  # choose by parts["test"]',
            evidence={"seen": "test split", "expected": "a validation split"},
        )


def eval_too_small(
    rows: EvaluationRows,
    *,
    few: Annotated[
        int, "labels under which an accuracy of 0.8 has a standard error above 7 points: sqrt(pq/n)"
    ] = 30,
    small: Annotated[int, "labels under which that standard error is above 4 points"] = 100,
) -> Iterator[Fault]:
    """So few rows that checkpoints cannot be told apart, where one is chosen by them."""
    if (
        rows.rows >= small
        or rows.labels_per_row > 1
        or rows.declared
        or not (rows.chooses and rows.scheduled)
    ):
        return
    error = math.sqrt(0.8 * 0.2 / max(rows.rows, 1))
    yield Fault(
        f"{rows.name} has {rows.rows} rows: an accuracy of 0.8 has a standard error of "
        f"{100 * error:.0f} points there"
        f", and {', '.join(rows.chooses)} chooses by it",
        subject=rows.name,
        severity="warning" if rows.rows < few else "note",
        evidence={"seen": f"{rows.rows} rows", "expected": f"at least {small}"},
    )


SELECTION = Probe("read what is chosen by", "static", (Selection,), measure_selection)
EVALUATION_ROWS = Probe(
    "count evaluation rows", "batch", (EvaluationRows,), measure_evaluation_rows
)

METRIC_DIRECTION = Check(
    name="metric-direction",
    stage="regularize",
    severity="warning",
    moments=("static",),
    why="greater_is_better is True unless set, or the metric's name ends in loss: the worst "
    "checkpoint is kept, and stopping works backwards.",
    fix="greater_is_better=False",
    source="transformers issue 31142 (2024)",
    unsure="Known by the metric's name alone; names that say neither way are not judged.",
    judges=(metric_direction,),
)
EVAL_IN_TRAINING_SET = Check(
    name="eval-in-training-set",
    stage="regularize",
    severity="error",
    moments=("batch",),
    why="Evaluating on what was trained on rewards memory; choosing by the test set uses it up.",
    fix='parts = data.train_test_split(0.1); train, validation = parts["train"], parts["test"]',
    source="Karpathy, A Recipe for Training Neural Networks (2019)",
    unsure="A test split that is known only by the variable it is in cannot be seen.",
    judges=(eval_in_training_set,),
    explains=("split-leak",),
)
EVAL_TOO_SMALL = Check(
    name="eval-too-small",
    stage="regularize",
    severity="warning",
    moments=("batch",),
    why="Differences smaller than the evaluation's own standard error choose at random.",
    fix="parts = data.train_test_split(test_size=500)",
    source="Dietterich 1998; Card et al. 2020, With Little Power (arXiv:2010.06595)",
    unsure="Rows are counted, not measured: regression or a nearly perfect model resolves more.",
    judges=(eval_too_small,),
)
