"""Will this run's evaluation happen, and will it find what it needs?

The Trainer looks for labels under names it reads off the model's forward. Where the batch holds
them under another name, `compute_metrics` is never called and no ``eval_loss`` is logged, without
a word. And an evaluation set does nothing until a strategy uses it.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import EarlyStoppingCallback

from hf_recipe.baselines.rehearsal import EvaluationRehearsal
from hf_recipe.core.check import Check, Located, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.batches import stream_reason
from hf_recipe.instruments.overrides import mentions, replaces, strings
from hf_recipe.instruments.subject import Subject


@dataclass(frozen=True)
class MetricWiring(Measurement):
    """What the Trainer's `prediction_step` looks for, and what an evaluation batch holds.

    Attributes:
        label_names: keys that must all be in the batch for it to count as labelled.
        batch_keys: keys of a collated evaluation batch (those that are not None).
        candidates: batch keys that the forward takes and that read like targets.
        computes_metrics: whether `compute_metrics` was given.
        loss_only: ``prediction_loss_only``.
        returns_loss: the forward returns a loss without labels (``return_loss=True``).
        scheduled: whether a strategy evaluates during the run.
    """

    label_names: tuple[str, ...]
    batch_keys: tuple[str, ...]
    candidates: tuple[str, ...]
    computes_metrics: bool
    loss_only: bool
    returns_loss: bool
    scheduled: bool


@dataclass(frozen=True)
class EvaluationPlan(Measurement):
    """When this run evaluates, in optimizer steps.

    Attributes:
        strategy: "no", "steps" or "epoch".
        first: step of the first evaluation; beyond `total_steps` where the interval never comes
            round, so that only the one at the very end is left; None: there is none.
        total_steps: steps of the run; None where unknown.
        on_start: whether one comes before training.
        needed_by: settings that choose by an evaluation.
        asked_by_callback: a callback of the user's asks for evaluations itself.
    """

    strategy: str
    first: int | None
    total_steps: int | None
    on_start: bool
    needed_by: tuple[str, ...]
    asked_by_callback: bool


# ---------------------------------------------------------------- the probes


def measure_metric_wiring(subject: Subject) -> Iterator[Located]:
    """Yield, for each evaluation set, where the Trainer will look for labels."""
    trainer = subject.trainer
    if trainer is None:
        raise Skip("without the Trainer its label names cannot be seen")
    for name in ("prediction_step", "evaluation_loop"):
        if replaces(trainer, name):
            raise Skip(f"{name} is replaced: it may find labels in its own way")
    readable = [rows for rows in subject.evaluation.values() if not stream_reason(rows)]
    if not readable:
        raise Skip("there is no evaluation set that can be read ahead")
    if reason := subject.overridden("evaluation"):
        raise Skip(reason)
    accepted = inspect.signature(_forward(subject)).parameters
    for rows in readable:
        keys = tuple(k for k, v in rows.batch([0]).inputs.items() if v is not None)
        yield Located(
            MetricWiring(
                label_names=tuple(trainer.label_names),
                batch_keys=keys,
                candidates=_candidates(keys, tuple(accepted), subject),
                computes_metrics=trainer.compute_metrics is not None,
                loss_only=bool(trainer.args.prediction_loss_only),
                returns_loss=bool(trainer.can_return_loss or "return_loss" in keys),
                scheduled=str(getattr(trainer.args.eval_strategy, "value", "no")) != "no",
            ),
            rows.name,
        )


def _forward(subject: Subject) -> Any:
    """The forward of the model under its adapters."""
    base = getattr(subject.model, "get_base_model", None)
    return (base() if base is not None else subject.model).forward


def _candidates(
    keys: tuple[str, ...], accepted: tuple[str, ...], subject: Subject
) -> tuple[str, ...]:
    """Batch keys that forward or compute_loss take and that are no known input; likely first."""
    inputs = {"attention_mask", "token_type_ids", "position_ids", "pixel_values", "input_ids"}
    inputs.add(str(getattr(subject.model, "main_input_name", "input_ids")))
    inputs |= set(getattr(subject.processing_class, "model_input_names", ()))
    found = [k for k in keys if k in accepted and k not in inputs]
    trainer = subject.trainer
    if not found and trainer is not None and replaces(trainer, "compute_loss"):
        taken = type(trainer).compute_loss.__code__  # it takes the targets out before the forward
        found = [k for k in keys if k not in inputs and k in strings(taken)]
    likely = [k for k in found if any(w in k.lower() for w in ("label", "target", "class"))]
    return tuple(likely or [k for k in found if k in ("y", "answer", "answers")] or found[-1:])


def measure_evaluation_plan(subject: Subject) -> Iterator[EvaluationPlan]:
    """Yield when the run evaluates."""
    if not subject.evaluation:
        raise Skip("there is no evaluation set")
    args, plan = subject.args, subject.plan
    strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    if strategy != "no" and plan is None:
        raise Skip("the number of steps is not known")
    callbacks = subject.trainer.callback_handler.callbacks if subject.trainer is not None else []
    needs = {
        "load_best_model_at_end": args.load_best_model_at_end,
        f"metric_for_best_model={args.metric_for_best_model!r}": args.metric_for_best_model,
        "EarlyStoppingCallback": any(isinstance(c, EarlyStoppingCallback) for c in callbacks),
    }
    yield EvaluationPlan(
        strategy=strategy,
        first=_first_evaluation(args, plan, strategy),
        total_steps=plan.total_steps if plan is not None else None,
        on_start=bool(args.eval_on_start),
        needed_by=tuple(name for name, set_ in needs.items() if set_),
        asked_by_callback=any(_asks_for_evaluation(c) for c in callbacks),
    )


def _first_evaluation(args: Any, plan: Any, strategy: str) -> int | None:
    """The first step at which the Trainer's own flow control asks for an evaluation."""
    if strategy == "no":
        return None
    delay, total = float(args.eval_delay or 0), int(plan.total_steps)
    if strategy == "steps":
        every = args.eval_steps or args.logging_steps
        every = math.ceil(total * every) if every < 1 else int(every)
        first = every * max(1, math.ceil(delay / every))
        due = delay <= total
    else:  # a last epoch that is cut short is evaluated all the same
        first = plan.steps_per_epoch * max(1, math.ceil(delay))
        due = delay <= total / plan.steps_per_epoch
    return min(first, total + 1 if strategy == "steps" else total) if due else None


def _asks_for_evaluation(callback: Any) -> bool:
    if type(callback).__module__.partition(".")[0] in ("transformers", "hf_recipe"):
        return False
    methods = inspect.getmembers(type(callback), inspect.isfunction)
    return any(
        name.startswith("on_")
        and isinstance(method, types.FunctionType)
        and mentions(method.__code__, "should_evaluate")
        for name, method in methods
    )


# ---------------------------------------------------------------- the checks


def labels_not_found(wiring: MetricWiring) -> Iterator[Fault]:
    """The Trainer finds neither labels nor a loss, or is told to compute the loss alone."""
    if not (wiring.computes_metrics or wiring.scheduled):
        return
    missing = [name for name in wiring.label_names if name not in wiring.batch_keys]
    found = bool(wiring.label_names) and not missing
    if not found and not (not wiring.label_names and wiring.returns_loss):
        lost = "compute_metrics and eval_loss" if wiring.computes_metrics else "eval_loss"
        looked = ", ".join(wiring.label_names) or "no name at all"
        yield Fault(
            f"no {lost}: the Trainer looks for {looked}, the evaluation batch holds "
            f"{', '.join(wiring.batch_keys)}",
            evidence={"seen": ", ".join(wiring.batch_keys), "expected": looked},
            fix=_label_names_line(wiring),
        )
    elif wiring.computes_metrics and wiring.loss_only:
        yield Fault(
            "compute_metrics is given and never called: prediction_loss_only=True",
            evidence={"seen": "prediction_loss_only=True", "expected": "False"},
            fix="TrainingArguments(..., prediction_loss_only=False)",
        )


def nothing_came_back(rehearsal: EvaluationRehearsal) -> Iterator[Fault]:
    """A `prediction_step` of the user's own that gives no loss, or no labels for the metrics."""
    if rehearsal.failed_in:
        return
    if rehearsal.computes_metrics and rehearsal.labels and not rehearsal.predictions:
        yield Fault(
            "labels are found, and no predictions are left for them: "
            + (
                "preprocess_logits_for_metrics returns None"
                if rehearsal.stock_step
                else "prediction_step, or preprocess_logits_for_metrics, returns None"
            )
            + ", and compute_metrics is never called",
            evidence={"seen": "no predictions", "expected": "predictions and labels"},
            fix="return logits.argmax(-1)  # from preprocess_logits_for_metrics",
        )
        return
    if rehearsal.stock_step:
        return
    missing = [
        name
        for name, there in (("loss", rehearsal.loss), ("labels", rehearsal.labels))
        if not there
    ]
    if (rehearsal.computes_metrics and not rehearsal.labels) or (
        rehearsal.scheduled and len(missing) == 2
    ):
        yield Fault(
            f"prediction_step returns no {' and no '.join(missing)}"
            + (": compute_metrics is never called" if rehearsal.computes_metrics else ""),
            evidence={"seen": f"no {', no '.join(missing)}", "expected": "loss, logits, labels"},
            fix="return loss, logits, labels",
        )


def _label_names_line(wiring: MetricWiring) -> str | None:
    present = [name for name in wiring.label_names if name in wiring.batch_keys]
    names = present or list(wiring.candidates)
    if not names:
        return "def forward(self, input_ids, labels=None):  # and a 'labels' column in each row"
    return f"TrainingArguments(..., label_names={names!r})".replace("'", '"')


def evaluation_out_of_reach(plan: EvaluationPlan) -> Iterator[Fault]:
    """An evaluation set that the run never uses, or once it is over."""
    total = plan.total_steps
    only_at_end = plan.first is not None and total is not None and plan.first > total
    if plan.asked_by_callback or (plan.first is not None and not only_at_end):
        return
    needed = f"; {', '.join(plan.needed_by)} chooses by it" if plan.needed_by else ""
    before = " (one comes before training)" if plan.on_start else ""
    if plan.strategy == "no":
        message = f"eval_strategy is 'no': the run never evaluates{before}{needed}"
    elif only_at_end:
        message = f"eval_steps never comes round in the run's {total} steps: one evaluation is left"
        message += f", at the very end{needed}"
    else:
        message = f"eval_delay lies beyond the run's {total} steps: it never evaluates"
        message += f"{before}{needed}"
    evaluates_by_hand = plan.strategy == "no" and not plan.needed_by
    yield Fault(
        message,
        severity="note" if evaluates_by_hand else "warning",
        evidence={
            "seen": f"eval_strategy={plan.strategy}, "
            + ("one evaluation, at the end" if only_at_end else "no evaluation"),
            "expected": "evaluations during training",
            "total_steps": total,
        },
        fix='TrainingArguments(..., eval_strategy="epoch")',
    )


READ_METRIC_WIRING = Probe(
    name="look where labels are looked for",
    moment="static",
    measures=(MetricWiring,),
    take=measure_metric_wiring,
)

READ_EVALUATION_PLAN = Probe(
    name="read when the run evaluates",
    moment="static",
    measures=(EvaluationPlan,),
    take=measure_evaluation_plan,
)

METRICS_NEVER_COMPUTED = Check(
    name="metrics-never-computed",
    stage="baselines",
    severity="error",
    moments=("static", "probe"),
    why="The Trainer then skips compute_metrics and eval_loss without a word; early stopping and "
    "the choice of the best model fail later.",
    fix='TrainingArguments(..., label_names=["targets"])',
    source="transformers issues 21553 (2023) and 33733 (2024); Trainer.prediction_step, 5.23",
    unsure="An evaluation that logs speed alone, on purpose.",
    judges=(labels_not_found, nothing_came_back),
    explains=("early-stop-miswired",),
)

EVAL_NEVER_RUNS = Check(
    name="eval-never-runs",
    stage="baselines",
    severity="warning",
    moments=("static",),
    why="A validation set that is never looked at can neither choose the model nor show "
    "overfitting.",
    fix='TrainingArguments(..., eval_strategy="epoch")',
    source="TrainingArguments: eval_strategy defaults to 'no' (transformers 5, 2026)",
    unsure="Many scripts keep eval_strategy='no' and call trainer.evaluate() by hand after "
    "training; nothing before the end tells the two apart, so that case is a note.",
    judges=(evaluation_out_of_reach,),
)
