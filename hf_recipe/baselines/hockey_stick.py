"""The hockey stick: a first drop that only learnt how frequent each label is.

The recipe wants the loss curve without it: a model whose output bias is set before training starts
where this drop ends. Two pieces of evidence make a third here: the loss before step 1, which knows
the level of the label frequencies, and the first steps of the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from hf_recipe.baselines.initial_loss import InitialLoss, remember_initial_loss
from hf_recipe.baselines.output_bias import PRIORLESS
from hf_recipe.core.check import Check, Measurement, Monitor, Probe, State
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.heads import SOFTMAX, UNEVEN_TASKS
from hf_recipe.instruments.window import Window


@dataclass(frozen=True)
class FirstDrop(Measurement):
    """The first fall of the training loss, against the level of the label frequencies.

    Attributes:
        initial: loss before step 1.
        prior: loss of the best input-blind head, corrected for its small sample.
        arrived: steps until the loss had come down to `prior`.
        fell: how far it fell in as many steps again (at least 5).
        noise: standard error of the level after the drop.
        uniform: loss of an uninformed head.
        task: how the head was read.
    """

    initial: float
    prior: float
    arrived: int
    fell: float
    noise: float
    uniform: float
    problem_type: str
    total_steps: int | None = None
    task: str = ""


KEPT = 2000  # steps: a first drop that takes longer is no hockey stick
WIDTH = 5  # steps averaged


def follow_first_drop(
    state: State, window: Window, seen: Mapping[str, Measurement]
) -> tuple[State, FirstDrop | None]:
    """Keep the first losses until the drop to the prior, and what followed, can be told."""
    start = seen.get("InitialLoss")
    if state.get("done") or not isinstance(start, InitialLoss):
        return state, None
    if not _has_prior(start):
        return {"done": True}, None
    losses = [*state.get("losses", ()), *(s.loss for s in window.steps)][:KEPT]
    drop = first_drop(losses, start)
    if drop is None:
        finished = window.ended or len(losses) >= KEPT
        return ({"done": True} if finished else {"losses": losses}), None
    total = window.plan.total_steps if window.plan else None
    return {"done": True}, FirstDrop(
        initial=start.recomputed,
        prior=_prior_of(start),
        arrived=drop[0],
        fell=drop[1],
        noise=drop[2],
        uniform=start.uniform,
        problem_type=start.problem_type,
        total_steps=total,
        task=start.task,
    )


def _has_prior(start: InitialLoss) -> bool:
    """Whether the level of the frequencies is known, and the head is fresh."""
    known = start.problem_type != SOFTMAX or start.outputs * 4 <= start.rows
    known = known and not start.drawn_otherwise
    fresh = start.recomputed >= start.expected * 0.995 - 4 * start.standard_error
    return known and fresh and start.relation == "mean" and start.task not in PRIORLESS


def _prior_of(start: InitialLoss) -> float:
    """Entropy of the labels with Miller and Madow's correction (1955)."""
    if start.problem_type == SOFTMAX:
        return start.prior + (start.outputs - 1) / (2 * start.rows)
    return start.prior


def first_drop(losses: list[float], start: InitialLoss) -> tuple[int, float, float] | None:
    """(steps to the prior's level, fall in as many steps again, noise); None: not yet, or no."""
    prior = _prior_of(start)
    drop = start.recomputed - prior
    if drop <= 0 or not losses:
        return None
    sums = np.convolve(losses, np.ones(WIDTH))[: len(losses)]
    means = sums / np.minimum(np.arange(len(losses)) + 1, WIDTH)
    low = np.flatnonzero(means <= prior + 0.15 * drop)
    if not low.size:
        return None
    arrived = int(low[0])
    ahead = max(arrived + 1, 2 * WIDTH)
    if len(losses) < arrived + ahead + 1:
        return None
    after = losses[arrived + 1 : arrived + ahead + 1]
    late = after[-WIDTH:]
    mean = math.fsum(after) / len(after)
    noise = math.sqrt(math.fsum((x - mean) ** 2 for x in after) / (len(after) - 1) / WIDTH)
    return arrived + 1, float(means[arrived]) - math.fsum(late) / len(late), noise


PROBE = Probe(
    name="measure the level that the first drop is held against",
    moment="probe",
    measures=(FirstDrop,),  # evidence for it: it runs where hockey-stick is wanted
    take=remember_initial_loss,
    needs=("fresh",),
)

FIRST_DROP = Monitor(
    name="follow the first drop of the loss",
    moment="run",
    measures=(FirstDrop,),
    fold=follow_first_drop,
)


def hockey_stick(
    drop: FirstDrop,
    *,
    errors: Annotated[float, "3 standard errors of the level after the drop"] = 3.0,
    least: Annotated[float, "2 % of the uninformed loss, as for output-bias-unset"] = 0.02,
    further: Annotated[float, "a run that learns from its inputs falls on by as much"] = 0.25,
    negligible: Annotated[float, "2 % of the planned steps, as the catalogue sets it"] = 0.02,
    ordinary: Annotated[float, "of the uninformed loss, as for output-bias-unset"] = 0.4,
) -> Iterator[Fault]:
    """See a first drop that ends at the label frequencies, and stays there."""
    fall = drop.initial - drop.prior
    smallest = errors * drop.noise + least * drop.uniform
    if not fall > smallest:
        return
    if drop.fell > further * fall:
        return
    share = drop.arrived / drop.total_steps if drop.total_steps else None
    mild = drop.problem_type != SOFTMAX or (share is not None and share < negligible)
    # Words are never even, and even labels teach nothing: as for output-bias-unset.
    skew = drop.uniform - drop.prior
    mild = mild or drop.task in UNEVEN_TASKS or skew <= max(smallest, ordinary * drop.uniform)
    of = f" of {drop.total_steps}" if drop.total_steps else ""
    yield Fault(
        f"the first {drop.arrived}{of} steps only learnt the label frequencies: the loss fell "
        f"from {drop.initial:.4g} to their {drop.prior:.4g} and then by {drop.fell:.2g}",
        evidence={
            "seen": f"{fall:.3g} down to the prior in {drop.arrived} steps, {drop.fell:.2g} in as "
            "many again",
            "expected": "a start at the prior's level: the bias can be set before training",
            "fall": fall,
            "steps": drop.arrived,
        },
        severity="note" if mild else None,
    )


HOCKEY_STICK = Check(
    name="hockey-stick",
    stage="baselines",
    severity="warning",
    moments=("run",),
    why="The first steps only learnt how frequent each label is; the bias of the output layer can "
    "say it before training.",
    fix="hf_recipe.set_output_bias(model, train_dataset)",
    source="Karpathy, A Recipe for Training Neural Networks (2019): init well",
    unsure="A plateau at the prior's level that ends later (a slow start) looks the same.",
    judges=(hockey_stick,),
)
