"""The input-independent baseline: does the model use its inputs at all?

The recipe: "Train an input-independent baseline (e.g. easiest is to just set all your inputs to
zero). This should perform worse than when you actually plug in your data without zeroing it out.
Does it? i.e. does your model learn to extract any information out of the input at all?"

The best input-blind model is known without training it: it gives every row the label frequencies
(regression: the mean). Its loss on every held-out row is taken before training and compared, row
by row, with the model's. An overconfident model may lose on the loss and still know its inputs,
so it is cleared by its best evaluation, and, with two classes, by the order in which it puts the
rows (area under the ROC curve, which no imbalance moves).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import torch

from hf_recipe.baselines.initial_loss import InitialLoss, remember_initial_loss
from hf_recipe.baselines.output_bias import PRIORLESS, frequencies
from hf_recipe.baselines.start import observe_start
from hf_recipe.core.check import Check, Located, Measurement, Monitor, Probe, Skip, State, private
from hf_recipe.core.finding import Fault
from hf_recipe.data.cheap import auc, auc_error
from hf_recipe.instruments.batches import Rows, stream_reason
from hf_recipe.instruments.heads import BINARY, SOFTMAX, Head
from hf_recipe.instruments.subject import Subject
from hf_recipe.instruments.window import Evaluation, Window

MOST_ROWS = 4096  # rows of an evaluation set that are compared
PRIOR_ROWS = 1024  # training rows whose labels make the input-blind model


@dataclass(frozen=True)
class BlindBaseline(Measurement):
    """The input-blind model's loss on each row of an evaluation set, in the set's order.

    Attributes:
        losses: nats (regression: squared error) of the first rows; a few thousand at most.
        labels: class of each of these rows where there are two classes; else empty.
        mean: mean of `losses`.
        majority: share of the commonest label among these rows; None: no single class per row.
        split: the evaluation set.
    """

    losses: tuple[float, ...] = private()
    labels: tuple[int, ...] = private()
    mean: float = math.nan
    majority: float | None = None
    split: str = ""


def measure_blind_baseline(subject: Subject) -> Iterator[Located | Measurement]:
    """Take the label frequencies of the training rows to every evaluation row."""
    if not subject.evaluation:
        raise Skip("there is no evaluation set to hold the input-blind baseline against")
    start = observe_start(subject)
    head = start.pooled
    if head.task in PRIORLESS or head.task in ("causal", "masked", "seq2seq", "segmentation"):
        raise Skip(f"a {head.task} head is not compared with label frequencies")
    yield from remember_initial_loss(subject)
    head = _with_more_labels(head, subject)
    taken = False
    for split, rows in subject.evaluation.items():
        if stream_reason(rows) or subject.overridden(split) or not len(rows):
            continue
        taken = True
        labels = _labels(rows, range(min(len(rows), MOST_ROWS)))
        yield Located(_blind(head, labels, split), split)
    if not taken:
        raise Skip("the evaluation data cannot be read ahead")


def _with_more_labels(head: Head, subject: Subject) -> Head:
    """`head` with the labels of many training rows: a few dozen make a poor blind model.

    Frequencies out of n rows cost about (classes - 1) / 2n nats, which must be far less than the
    gain that is looked for; else a model that ignores its inputs looks better than blind.
    """
    rows = subject.train
    if rows is None or stream_reason(rows) or subject.overridden("train"):
        return head
    labels = _labels(rows, rows.evenly_spaced(PRIOR_ROWS))
    if head.problem_type == SOFTMAX:
        flat = torch.cat([y.reshape(-1) for y in labels])
        flat = flat[flat != -100].long()
    else:
        flat = torch.stack([y.double().reshape(-1) for y in labels])
    return replace(head, labels=flat) if len(flat) > len(head.labels) else head


def _labels(rows: Rows, indices: Sequence[int]) -> list[torch.Tensor]:
    """The labels of the set's rows at `indices`, collated as they will be."""
    found = []
    for batch in rows.batches(indices, 64):
        labels = batch.labels
        if not isinstance(labels, torch.Tensor):
            raise Skip(f"the {rows.name} batches have no labels")
        found += list(labels)
    return found


def _blind(head: Head, labels: Sequence[torch.Tensor], split: str) -> BlindBaseline:
    target = frequencies(head).cpu()
    losses: list[float] = []
    for y in labels:
        if head.problem_type == SOFTMAX:
            supervised = y.reshape(-1)[y.reshape(-1) != -100].long().cpu()
            row = -target.log()[supervised]
        elif head.problem_type == BINARY:
            y = y.double().cpu()
            row = -(y * target.log() + (1 - y) * (1 - target).log())
        else:
            row = (y.double().cpu().reshape(-1) - target).square()
        losses.append(float(row.mean()) if len(row.reshape(-1)) else math.nan)
    single = head.problem_type == SOFTMAX and head.task == "classification"
    classes = [int(y) for y in labels] if single else []
    known = [x for x in losses if math.isfinite(x)]
    return BlindBaseline(
        losses=tuple(losses),
        labels=tuple(classes) if head.logits.shape[-1] == 2 else (),
        mean=math.fsum(known) / max(len(known), 1),
        majority=max(classes.count(k) for k in set(classes)) / len(classes) if classes else None,
        split=split,
    )


@dataclass(frozen=True)
class AgainstBlind(Measurement):
    """The model against the input-blind one on the same held-out rows, over all evaluations.

    Attributes:
        blind: mean loss of the input-blind model.
        model: mean loss of the model at its best evaluation.
        gain: blind - model there, row by row; standard_error: of `gain`.
        rows: rows compared.
        order: area under the ROC curve at its best evaluation; None: not two classes.
        order_error: its standard error where the order is random.
        accuracy: best reported accuracy; None: none was reported.
        majority: accuracy of always saying the commonest label; None: no single class per row.
        training_loss: of the last steps; prior: what label frequencies reach there.
        steps, total_steps: done and planned.
        rising: whether the last of several evaluations was the best.
    """

    blind: float
    model: float
    gain: float
    standard_error: float
    rows: int
    order: float | None
    order_error: float
    accuracy: float | None
    majority: float | None
    training_loss: float
    prior: float
    steps: int
    total_steps: int | None
    split: str = ""
    rising: bool = False


LAST = 50  # steps whose mean is the training loss


def compare_with_blind(
    state: State, window: Window, seen: Mapping[str, Measurement]
) -> tuple[State, AgainstBlind | None]:
    """Keep the best evaluation against the blind baseline; tell at the end of training."""
    blind, start = seen.get("BlindBaseline"), seen.get("InitialLoss")
    if not isinstance(blind, BlindBaseline) or not isinstance(start, InitialLoss):
        return state, None
    state = dict(state)
    if window.steps:
        state["steps"] = window.steps[-1].step
        losses = [*state.get("losses", ()), *(s.loss for s in window.steps)]
        state["losses"] = losses[-LAST:]
    if window.evaluation is not None and window.evaluation.split in ("", blind.split):
        state = _with(state, window.evaluation, blind)
    if not window.ended or "gain" not in state or not state.get("losses"):
        return state, None
    return state, AgainstBlind(
        blind=blind.mean,
        model=state["model"],
        gain=state["gain"],
        standard_error=state["standard_error"],
        rows=state["rows"],
        order=state.get("order"),
        order_error=state.get("order_error", 0.0),
        accuracy=state.get("accuracy"),
        majority=blind.majority,
        training_loss=math.fsum(state["losses"]) / len(state["losses"]),
        prior=max(start.prior, blind.mean),  # the few rows of the start flatter the prior
        steps=state.get("steps", 0),
        total_steps=window.plan.total_steps if window.plan else None,
        split=blind.split,
        rising=state.get("rising", False),
    )


def _with(state: State, evaluation: Evaluation, blind: BlindBaseline) -> State:
    """`state` with what this evaluation adds: the best gain, order and accuracy so far."""
    pairs = [
        (b, m)
        for b, m in zip(blind.losses, evaluation.row_losses, strict=False)
        if math.isfinite(b) and math.isfinite(m)
    ]
    complete = len(evaluation.row_losses) >= len(blind.losses)
    if len(pairs) >= 2 and complete:  # an incomplete pass has another order of rows
        gains = [b - m for b, m in pairs]
        gain = math.fsum(gains) / len(gains)
        state["rising"] = gain > state.get("gain", math.inf)
        spread = math.fsum((g - gain) ** 2 for g in gains) / (len(gains) - 1)
        if gain > state.get("gain", -math.inf):
            model = math.fsum(m for _, m in pairs) / len(pairs)
            error = math.sqrt(spread / len(gains))
            state |= {"gain": gain, "standard_error": error, "model": model, "rows": len(pairs)}
        if blind.labels:
            order, order_error = _order(blind.labels, evaluation.row_losses)
            if order is not None and order > (state.get("order") or 0.0):
                state |= {"order": order, "order_error": order_error}
    accuracy = evaluation.metrics.get("eval_accuracy")
    if accuracy is not None and accuracy > state.get("accuracy", 0.0):
        state["accuracy"] = float(accuracy)
    return state


def _order(labels: Sequence[int], losses: Sequence[float]) -> tuple[float | None, float]:
    """Area under the ROC curve from each row's loss and label, and its error if random."""
    told = list(zip(labels, losses, strict=False))
    chance = np.array([math.exp(-x) if y == 1 else -math.expm1(-x) for y, x in told])
    positive = np.array([y == 1 for y, _ in told])
    ones = int(positive.sum())
    zeros = len(told) - ones
    if not ones or not zeros or not np.isfinite(chance).all():
        return None, 0.0
    return auc(chance, positive), auc_error(ones, zeros)


PROBE = Probe(
    name="take the input-blind baseline to the evaluation rows",
    moment="probe",
    measures=(BlindBaseline, AgainstBlind),
    take=measure_blind_baseline,
)

MONITOR = Monitor(
    name="compare evaluations with the input-blind baseline",
    moment="eval",
    measures=(AgainstBlind,),
    fold=compare_with_blind,
    patient=True,
)


def input_ignored(
    run: AgainstBlind,
    *,
    errors: Annotated[float, "2 standard errors either way: undecided lies between"] = 2.0,
    least: Annotated[float, "2 % of the blind loss: a smaller gain is none in practice"] = 0.02,
    enough_steps: Annotated[int, "fewer steps than this decide nothing"] = 50,
    sure: Annotated[float, "3 standard errors, over all evaluations: it did learn something"] = 3.0,
    near_prior: Annotated[
        float, "a model that has not even learnt the frequencies fails for another reason"
    ] = 0.1,
) -> Iterator[Fault]:
    """See a trained model that no held-out row tells from an input-blind one."""
    unfinished = run.total_steps is not None and run.steps < 0.9 * run.total_steps
    if run.steps < enough_steps or unfinished:
        return
    if not run.training_loss <= run.prior * (1 + near_prior):
        return
    if run.gain + errors * run.standard_error > least * run.blind:
        return  # better, or undecided
    if run.gain > sure * run.standard_error or (run.rising and run.gain > 0):
        return  # a little better, surely or on its way: trained too little, not blind
    if run.order is not None and run.order > 0.5 + errors * run.order_error:
        return
    if run.accuracy is not None and run.majority is not None:
        error = math.sqrt(run.majority * (1 - run.majority) / run.rows)
        if run.accuracy > run.majority + errors * error:
            return
    than = "" if run.majority is None else f"; always the commonest label: {run.majority:.1%} right"
    yield Fault(
        f"after {run.steps} steps the model's loss on held-out rows is {run.model:.4g}, that of an "
        f"input-blind model {run.blind:.4g}{than}",
        evidence={
            "seen": f"gain {run.gain:.3g} +- {run.standard_error:.2g} over {run.rows} rows, at the "
            "best of all evaluations",
            "expected": f"a gain above {least * run.blind:.2g}: inputs that tell something",
            "gain": run.gain,
            "standard_error": run.standard_error,
            "area_under_roc": run.order,
            "accuracy": run.accuracy,
        },
    )


CHECK = Check(
    name="input-ignored",
    stage="baselines",
    severity="warning",
    moments=("eval",),
    why="A model that does no better than the label frequencies has learnt nothing from its "
    "inputs, whatever its accuracy looks like.",
    fix="Check that rows and labels belong together, and that the input reaches the head.",
    source="Karpathy, A Recipe for Training Neural Networks (2019): input-independent baseline",
    unsure="Labels that truly cannot be told from the inputs; a run too short to leave the prior. "
    "Overconfident models of more than two classes are cleared by an earlier evaluation or by a "
    "reported accuracy only.",
    judges=(input_ignored,),
    explains=("loss-not-decreasing",),
)
