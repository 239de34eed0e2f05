"""The loss's course: is it a number at every step?

By default the Trainer puts the running mean in the place of a NaN before it logs, so a run whose
every weight is NaN logs ``loss 0.0``; and evaluation leaves batches that are NaN out of its mean.
So nothing is read from the log here: the recorder's own losses are, before any filter.

A gradient scaler (float16) finds its scale by overflowing: some steps with an infinite norm and a
finite loss are its way of working, and those steps are not taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from hf_recipe.complexify.nonfinite_origin import (
    FIXES,
    FOLLOWS,
    NonFiniteOrigin,
    began_in,
    told,
)
from hf_recipe.core.check import Check, Measurement, Monitor
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.window import Evaluation, Window

ROWS_NAMED = 64  # a step with more rows than this does not narrow anything down


@dataclass(frozen=True)
class NonFiniteSteps(Measurement):
    """Optimizer steps whose loss or gradient was not a number.

    Attributes:
        steps: optimizer steps seen.
        losses: steps with a loss that is NaN or infinite.
        first_loss: the first of them; None: there is none.
        value: its loss, "nan", "inf" or "-inf".
        micro_batch: which of that step's micro-batches was first, from 0, where it is known.
        rows: data set rows of that step, where they are known and few.
        norms: steps with a gradient norm that is NaN or infinite although the loss is finite.
        first_norm: the first of those in the unbroken run of bad steps that led to now, or to
            `first_loss`.
        longest_norms: most such steps in a row.
        where, began: where the first of them began, as a kind and in words; "" where not known.
    """

    steps: int
    losses: int
    first_loss: int | None
    value: str
    micro_batch: int | None
    rows: tuple[int, ...]
    norms: int
    first_norm: int | None
    longest_norms: int
    where: str = ""
    began: str = ""


@dataclass(frozen=True)
class NonFiniteEvaluation(Measurement):
    """One evaluation's losses that were not numbers.

    Attributes:
        step: optimizer steps done.
        split: the evaluation set's name.
        batches, bad_batches: evaluation batches, and those with a NaN or infinite loss.
        infinite_rows: rows whose loss is infinite, at most 64.
        logged: what the log says of this loss ("0.6928", "nan"), "" where it says nothing.
        after_training_failed: the training loss was not finite before this.
    """

    step: int
    split: str
    batches: int
    bad_batches: int
    infinite_rows: tuple[int, ...]
    logged: str
    after_training_failed: bool


# ---------------------------------------------------------------- the monitors

_START: dict[str, Any] = {
    "steps": 0,
    "losses": 0,
    "first_loss": None,
    "value": "",
    "micro_batch": None,
    "rows": [],
    "norms": 0,
    "first_norm": None,
    "streak": 0,
    "longest": 0,
    "told": -1,
}


def follow_steps(
    state: dict[str, Any], window: Window, seen: Mapping[str, Measurement]
) -> tuple[dict[str, Any], NonFiniteSteps | None]:
    """Count steps that are not finite; measures at first, when it gets worse, and at the end."""
    state = {**_START, **state}
    state["steps"] += len(window.steps)
    for step in () if _nothing_to_count(window, state) else window.steps:
        if not math.isfinite(step.loss):
            state["losses"] += 1
            if state["first_loss"] is None:
                micro = [i for i, x in enumerate(step.micro_losses) if not math.isfinite(x)]
                state |= {
                    "first_loss": step.step,
                    "value": str(step.loss),
                    "micro_batch": micro[0] if micro and len(step.micro_losses) > 1 else None,
                    "rows": list(step.rows) if len(step.rows) <= ROWS_NAMED else [],
                }
        elif step.grad_norm is not None and not math.isfinite(step.grad_norm):
            state["norms"] += 1
            state["streak"] += 1
            state["longest"] = max(state["longest"], state["streak"])
            if state["streak"] == 1 and state["first_loss"] is None:
                state["first_norm"] = step.step
        else:
            state["streak"] = 0
            if state["first_loss"] is None:
                state["first_norm"] = None
    bad = state["losses"] + state["norms"]
    due = state["told"] < 0 or (bad and bad >= 2 * state["told"]) or window.ended
    if not state["steps"] or not due or (bad == state["told"] and not window.ended):
        return state, None
    state["told"] = bad
    origin = seen.get(NonFiniteOrigin.kind()) if state["losses"] else None
    assert origin is None or isinstance(origin, NonFiniteOrigin)
    return state, NonFiniteSteps(
        steps=state["steps"],
        losses=state["losses"],
        first_loss=state["first_loss"],
        value=state["value"],
        micro_batch=state["micro_batch"],
        rows=tuple(state["rows"]),
        norms=state["norms"],
        first_norm=state["first_norm"],
        longest_norms=state["longest"],
        where=origin.where if origin else "",
        began=told(origin) if origin else "",
    )


def _nothing_to_count(window: Window, state: Mapping[str, Any]) -> bool:
    """Whether there is nothing to count: the steps are well, and so was the one before."""
    norms = [step.grad_norm for step in window.steps if step.grad_norm is not None]
    well = len(window.finite) == len(window.steps) and all(map(math.isfinite, norms))
    return well and not state["streak"] and (state["losses"] > 0 or state["first_norm"] is None)


def follow_evaluations(
    state: dict[str, Any], window: Window, seen: Mapping[str, Measurement]
) -> tuple[dict[str, Any], NonFiniteEvaluation | None]:
    """Measure each evaluation's losses."""
    evaluation = window.evaluation
    if evaluation is None:
        return state, None
    before = seen.get(NonFiniteSteps.kind())
    failed = isinstance(before, NonFiniteSteps) and before.losses > 0
    logged = _logged_loss(evaluation)
    infinite = [i for i, x in enumerate(evaluation.row_losses) if math.isinf(x)]
    return state, NonFiniteEvaluation(
        step=evaluation.step,
        split=evaluation.split,
        batches=len(evaluation.batch_losses),
        bad_batches=sum(not math.isfinite(x) for x in evaluation.batch_losses),
        infinite_rows=tuple(infinite[:ROWS_NAMED]),
        logged="" if logged is None else f"{logged:.4g}",
        after_training_failed=failed,
    )


def _logged_loss(evaluation: Evaluation) -> float | None:
    """The set's own loss among its metrics: ``eval_loss`` or ``eval_<split>_loss``."""
    for name in (f"eval_{evaluation.split}_loss", "eval_loss"):
        if name in evaluation.metrics:
            return float(evaluation.metrics[name])
    return None


# ---------------------------------------------------------------- the check


def steps_not_finite(
    steps: NonFiniteSteps,
    *,
    skips: Annotated[
        int, "torch's GradScaler starts at 2**16: sixteen halvings bring it to one"
    ] = 16,
) -> Iterator[Fault]:
    """A training loss, or a gradient for longer than a scaler searches, is no number."""
    if steps.losses:
        where = "" if steps.micro_batch is None else f", in micro-batch {steps.micro_batch}"
        gradient = (
            f"; the gradient was not finite from step {steps.first_norm} on"
            if steps.first_norm is not None
            else ""
        )
        yield Fault(
            f"the training loss is {steps.value} at step {steps.first_loss}{where}, and was not "
            f"finite in {steps.losses} of {steps.steps} steps, whatever the log shows{gradient}"
            + (f"; {steps.began}" if steps.began else ""),
            fix=FIXES.get(steps.where),
            evidence={
                "seen": f"{steps.value} at step {steps.first_loss}",
                "expected": "finite",
                "first_step": steps.first_loss,
                "steps": steps.losses,
                "first_gradient_step": steps.first_norm,
                "follows_from": FOLLOWS.get(steps.where),
            },
            examples=steps.rows,
        )
    elif steps.longest_norms > skips:
        yield Fault(
            f"the gradient was not finite in {steps.longest_norms} steps in a row with a finite "
            f"loss ({steps.norms} of {steps.steps} steps): no step is taken, or the weights are "
            "gone",
            subject="gradient",
            evidence={
                "seen": f"{steps.longest_norms} steps in a row",
                "expected": f"<= {skips} (a scaler's search)",
                "first_step": steps.first_norm,
            },
        )


def evaluation_not_finite(evaluation: NonFiniteEvaluation) -> Iterator[Fault]:
    """Evaluation batches that are no number, left out of the logged mean or not."""
    if evaluation.after_training_failed:
        return  # it follows from the training loss, which is reported
    logged_bad = evaluation.logged in ("nan", "inf", "-inf")
    if evaluation.bad_batches:
        seen = f"{evaluation.bad_batches} of {evaluation.batches} batches"
        says = f", while the log says {evaluation.logged}" if evaluation.logged else ""
        message = f"the loss of {seen} of {evaluation.split or 'evaluation'} is not finite{says}"
    elif logged_bad or evaluation.infinite_rows:
        seen = evaluation.logged if logged_bad else f"{len(evaluation.infinite_rows)} infinite rows"
        message = f"the evaluation loss of {evaluation.split or 'evaluation'} is not finite: {seen}"
    else:
        return
    yield Fault(
        message,
        subject=evaluation.split or "evaluation",
        evidence={
            "seen": seen,
            "expected": "finite",
            "logged": evaluation.logged,
            "step": evaluation.step,
        },
        fix="TrainingArguments(..., logging_nan_inf_filter=False)  # then look at those rows",
        examples=evaluation.infinite_rows,
    )


FOLLOW_STEPS = Monitor(
    name="follow the loss for NaN",
    moment="run",
    measures=(NonFiniteSteps,),
    fold=follow_steps,
)

FOLLOW_EVALUATIONS = Monitor(
    name="follow evaluation losses for NaN",
    moment="eval",
    measures=(NonFiniteEvaluation,),
    fold=follow_evaluations,
)

LOSS_NOT_FINITE = Check(
    name="loss-not-finite",
    stage="complexify",
    severity="error",
    moments=("run", "eval"),
    why="One NaN step turns every weight into NaN, and the log hides it: it shows a mean, or 0.0.",
    fix="TrainingArguments(..., bf16=True, fp16=False, max_grad_norm=1.0)",
    source="transformers issues 9160 (2020) and 28122 (2023); Trainer's logging_nan_inf_filter",
    unsure="An evaluation batch without a single supervised label has no loss, and is reported.",
    judges=(steps_not_finite, evaluation_not_finite, began_in),
    explains=(
        "initial-loss-unexpected",
        "loss-diverged",
        "loss-spike",
        "exploding-gradient",
        "dead-unit",
        "loss-not-decreasing",
    ),
)

__all__ = ["LOSS_NOT_FINITE", "NonFiniteEvaluation", "NonFiniteOrigin", "NonFiniteSteps"]
