"""Does the bundled simplest model do as well?

A network that a linear model or a bigram matches has learned nothing that its size is for: the
data carry no more, or something keeps it from them. The two are compared row by row on the same
evaluation rows; "as well" needs an interval that excludes a gain worth having, and an
overconfident network that classifies better is cleared by that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch

from hf_recipe.baselines.reference_models import (
    EVALUATION_ROWS,
    Reference,
    ReferenceLines,
    head_of,
    reference_lines,
)
from hf_recipe.core.check import Check, Measurement, Monitor, State
from hf_recipe.core.exhibit import Answer, Cell, Table
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.heads import SOFTMAX, Head
from hf_recipe.instruments.subject import Subject
from hf_recipe.instruments.window import Evaluation, Window


@dataclass(frozen=True)
class AgainstSimple(Measurement):
    """The model against the best of the simple ones on the same evaluation rows.

    Attributes:
        name: of the simple model.
        simple, model: mean losses.
        gain: simple - model, row by row; standard_error: of it.
        rows: rows compared.
        more_right: accuracy of the model less that of the simple one; None: no classes.
        right_error: its standard error; 0 where there are no classes.
        steps, total_steps: done and planned; None: not known.
        split: the evaluation set.
    """

    name: str
    simple: float
    model: float
    gain: float
    standard_error: float
    rows: int
    more_right: float | None = None
    right_error: float = 0.0
    steps: int = 0
    total_steps: int | None = None
    split: str = ""


def compare_with_simple_models(
    subject: Subject, split: str | None = None
) -> Iterator[ReferenceLines | AgainstSimple | Table | Answer]:
    """Train the simple models, and compare the model as it stands. Call it quietly.

    Before training the reference lines alone are taken; evaluations are compared with them.
    """
    lines = reference_lines(subject, split)
    yield lines
    if subject.fresh and subject.step == 0:
        yield _table(lines, None)
        return
    losses, right = _rows_of_model(subject, lines.split)
    against = _against(lines.best, losses, right, subject, lines.split)
    yield _table(lines, against)
    if against is not None:
        yield against
        yield answer(against)


def _rows_of_model(subject: Subject, split: str) -> tuple[list[float], list[float]]:
    """Loss of each evaluation row and whether it was classified rightly (empty: no classes)."""
    rows = subject.evaluation[split]
    losses: list[float] = []
    right: list[float] = []
    for batch in rows.batches(range(min(len(rows), EVALUATION_ROWS)), 64):
        head = head_of(subject, batch.to(subject.device))
        losses += _by_example(head, head.row_losses(), len(batch))
        if head.task == "classification" and head.problem_type == SOFTMAX:
            right += (head.logits.argmax(-1) == head.labels).float().tolist()
    return losses, right


def _by_example(head: Head, losses: torch.Tensor, rows: int) -> list[float]:
    """Mean loss of each example's supervised positions; NaN without one."""
    groups = head.groups.long().cpu()
    total = torch.zeros(rows, dtype=torch.double).index_add_(0, groups, losses.double().cpu())
    count = torch.zeros(rows, dtype=torch.double).index_add_(
        0, groups, torch.ones(len(groups), dtype=torch.double)
    )
    return torch.where(count > 0, total / count.clamp(min=1), torch.nan).tolist()


def _against(
    simple: Reference,
    losses: Sequence[float],
    right: Sequence[float],
    subject: Subject,
    split: str,
) -> AgainstSimple | None:
    more_right, right_error = None, 0.0
    if right and len(right) == len(simple.right):
        more_right, right_error = _mean_and_error(
            [m - s for m, s in zip(right, simple.right, strict=True)]
        )
    return _paired(
        simple, losses, more_right, right_error, subject.step,
        subject.plan.total_steps if subject.plan else None, split,
    )  # fmt: skip


def _paired(
    simple: Reference,
    losses: Sequence[float],
    more_right: float | None,
    right_error: float,
    steps: int,
    total_steps: int | None,
    split: str,
) -> AgainstSimple | None:
    pairs = [
        (s, m)
        for s, m in zip(simple.losses, losses, strict=False)
        if math.isfinite(s) and math.isfinite(m)
    ]
    if len(pairs) < 2:
        return None
    gain, error = _mean_and_error([s - m for s, m in pairs])
    return AgainstSimple(
        name=simple.name,
        simple=math.fsum(s for s, _ in pairs) / len(pairs),
        model=math.fsum(m for _, m in pairs) / len(pairs),
        gain=gain,
        standard_error=error,
        rows=len(pairs),
        more_right=more_right,
        right_error=right_error,
        steps=steps,
        total_steps=total_steps,
        split=split,
    )


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    spread = math.fsum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1)
    return mean, math.sqrt(spread / len(values))


# ---------------------------------------------------------------- while training


def fold(
    state: State, window: Window, seen: Mapping[str, Measurement]
) -> tuple[State, AgainstSimple | None]:
    """Keep the model's best evaluation against the reference line; tell at the end."""
    lines = seen.get(ReferenceLines.kind())
    if not isinstance(lines, ReferenceLines):
        return state, None
    state = dict(state)
    if window.steps:
        state["steps"] = window.steps[-1].step
    simple = lines.best
    if window.evaluation is not None and window.evaluation.split in ("", lines.split):
        found = _evaluated(simple, window.evaluation, lines.split)
        if found is not None and found.gain > state.get("gain", -math.inf):
            state |= {name: getattr(found, name) for name in KEPT}
    if not window.ended or "gain" not in state:
        return state, None
    return state, AgainstSimple(
        name=simple.name,
        **{name: state[name] for name in KEPT},
        steps=state.get("steps", 0),
        total_steps=window.plan.total_steps if window.plan else None,
        split=lines.split,
    )


KEPT = ("simple", "model", "gain", "standard_error", "rows", "more_right", "right_error")


def _evaluated(simple: Reference, evaluation: Evaluation, split: str) -> AgainstSimple | None:
    if len(evaluation.row_losses) < len(simple.losses):
        return None  # an incomplete pass has another order of rows
    accuracy = evaluation.metrics.get("eval_accuracy")
    more_right, error = None, 0.0
    if accuracy is not None and simple.right:
        share, own = _mean_and_error(simple.right)
        more_right = accuracy - share
        error = math.sqrt(own**2 + accuracy * (1 - accuracy) / len(simple.right))
    return _paired(simple, evaluation.row_losses, more_right, error, 0, None, split)


# ---------------------------------------------------------------- judging


def simple_model_wins(
    run: AgainstSimple,
    *,
    errors: Annotated[float, "2 standard errors: undecided lies between"] = 2.0,
    least: Annotated[float, "2 % of the simple model's loss: a smaller gain is none"] = 0.02,
    enough_steps: Annotated[int, "fewer steps than this decide nothing"] = 50,
) -> Iterator[Fault]:
    """No gain worth having over the simplest model, beyond noise."""
    unfinished = run.total_steps is not None and run.steps < 0.9 * run.total_steps
    if run.steps < enough_steps or unfinished or verdict(run, errors, least) is not False:
        return
    worse = run.gain + errors * run.standard_error < 0
    right = "" if run.more_right is None else f"; accuracy {run.more_right:+.1%}"
    yield Fault(
        f"a {run.name} model trained in seconds does {'better' if worse else 'as well'}: loss "
        f"{run.simple:.4g} against {run.model:.4g} on {run.rows} rows{right}",
        evidence={
            "seen": f"gain {run.gain:.3g} +- {run.standard_error:.2g}",
            "expected": f"above {least * run.simple:.2g}",
            "gain": run.gain,
            "standard_error": run.standard_error,
            "more_right": run.more_right,
        },
    )


def verdict(run: AgainstSimple, errors: float = 2.0, least: float = 0.02) -> bool | None:
    """True: the model is better than the simple one; False: it is not; None: undecided."""
    better = run.gain - errors * run.standard_error > least * run.simple
    by_class = run.more_right is not None and run.more_right > errors * run.right_error
    if better or by_class:
        return True
    if not run.gain + errors * run.standard_error <= least * run.simple:
        return None
    return False


def answer(run: AgainstSimple) -> Answer:
    """The comparison in words."""
    word = {True: "yes", False: "no", None: "undecided"}[verdict(run)]
    text = (
        f"{word}: loss {run.model:.4g} against {run.simple:.4g} of a {run.name} model, gain "
        f"{run.gain:+.3g} +- {run.standard_error:.2g} over {run.rows} rows"
    )
    return Answer("Does the model beat the simplest one?", "regularize", text)


def _table(lines: ReferenceLines, against: AgainstSimple | None) -> Table:
    rows: list[tuple[Cell, ...]] = [
        (line.name, line.loss, _mean_and_error(line.right)[0] if line.right else None)
        for line in lines.lines
    ]
    if against is not None:
        share = rows[[line.name for line in lines.lines].index(against.name)][2]
        own = None if against.more_right is None else float(share or 0) + against.more_right
        rows.append(("the model", against.model, own))
    caption = f"Trained on {lines.rows} of the run's own training rows; best: {lines.best.name}."
    title = f"Reference lines on {lines.split}"
    return Table(title, "baselines", ("model", "loss", "accuracy"), tuple(rows), caption)


MONITOR = Monitor(
    name="compare evaluations with the simplest model",
    moment="eval",
    measures=(AgainstSimple,),
    fold=fold,
    patient=True,
)

SIMPLE_MODEL_WINS = Check(
    name="simple-model-wins",
    stage="regularize",
    severity="warning",
    moments=("eval",),
    why="A network that a linear model or a bigram matches has learned nothing its size is for.",
    fix="recipe.overfit_one_batch()  # then train longer, or take the simple model",
    source="Karpathy (2019): simplest possible model; Deep Learning Tuning Playbook (2023)",
    unsure="Tasks that are linear in pooled inputs: then the answer is right, and the simple "
    "model enough. A run stopped on purpose before it was done.",
    judges=(simple_model_wins,),
    call="recipe.compare_with_simple_models()",
)
