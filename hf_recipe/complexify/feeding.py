"""How the rows come: in a new order every epoch, and in time?

A sampler that is seeded anew each epoch shows the same batches in the same order; the gradient's
noise then repeats instead of averaging out. And a step that waits for its rows is paid twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from hf_recipe.core.check import Check, Measurement, Monitor
from hf_recipe.core.exhibit import Series
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.window import Window

COMPARED = 64  # steps of an epoch whose order is remembered


@dataclass(frozen=True)
class EpochOrder(Measurement):
    """The order of the first steps of two epochs.

    Attributes:
        compared: steps of an epoch that were compared.
        same: those with the same rows in the same order in both epochs.
        rows: rows in the compared steps.
        sorted: whether the rows simply came in the data set's order.
    """

    compared: int
    same: int
    rows: int
    sorted: bool


@dataclass(frozen=True)
class Waiting(Measurement):
    """Seconds that steps took, and of them those spent waiting for data.

    Attributes:
        steps: steps after the first few.
        seconds, waiting: of a typical step: medians.
        share: of all the time.
    """

    steps: int
    seconds: float
    waiting: float
    share: float


def follow_order(
    state: dict[str, Any], window: Window, seen: Mapping[str, Measurement]
) -> tuple[dict[str, Any], EpochOrder | None]:
    """Hash the rows of the first steps of epoch 1; measures in epoch 2, once."""
    state = {"first": [], "rows": [], "same": 0, "compared": 0, "total": 0, "done": False, **state}
    plan = window.plan
    if state["done"] or plan is None or plan.steps_per_epoch < 2:
        return state, None
    wanted = min(COMPARED, plan.steps_per_epoch)
    for step in window.steps:
        if not step.rows or step.step > 2 * plan.steps_per_epoch:
            continue
        place = (step.step - 1) % plan.steps_per_epoch
        if place >= wanted:
            continue
        digest = hashlib.sha1(repr(step.rows).encode(), usedforsecurity=False).hexdigest()[:12]
        if step.step <= plan.steps_per_epoch:
            if place == len(state["first"]):
                state["first"].append(digest)
                state["rows"] = [*state["rows"], *step.rows][:256]
        elif place < len(state["first"]):
            state["compared"] += 1
            state["total"] += len(step.rows)
            state["same"] += digest == state["first"][place]
    if not state["compared"] or (state["compared"] < wanted and not window.ended):
        return state, None
    state["done"] = True
    rows = state["rows"]
    return state, EpochOrder(
        compared=state["compared"],
        same=state["same"],
        rows=state["total"],
        sorted=rows == sorted(rows),
    )


def follow_waiting(
    state: dict[str, Any], window: Window, seen: Mapping[str, Measurement]
) -> tuple[dict[str, Any], Waiting | None]:
    """Sum times from step 9 on (workers start, caches fill); measures at the end."""
    state = {"seconds": 0.0, "waiting": 0.0, "steps": 0, "s": None, "w": None, **state}
    seconds, waits = (
        Series.from_state(state[k], 64) if state[k] else Series(64) for k in ("s", "w")
    )
    warm = [step for step in window.steps if step.step > 8]
    numbers = [step.step for step in warm]
    took, waited = [step.seconds for step in warm], [step.waiting for step in warm]
    state["steps"] += len(warm)
    state["seconds"] += sum(took)
    state["waiting"] += sum(waited)
    seconds.extend(numbers, took)
    waits.extend(numbers, waited)
    state |= {"s": seconds.state(), "w": waits.state()}
    if not window.ended or not state["steps"] or state["seconds"] <= 0:
        return state, None
    return state, Waiting(
        steps=state["steps"],
        seconds=_median(seconds.y),
        waiting=_median(waits.y),
        share=state["waiting"] / state["seconds"],
    )


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def repeats(
    order: EpochOrder,
    *,
    few: Annotated[int, "steps: two orders of four or more steps agree by chance 1 time in 24"] = 4,
) -> Iterator[Fault]:
    """Every compared step had the same rows in the same order."""
    if order.compared < few or order.same < order.compared:
        return
    how = "the data set's own order" if order.sorted else "one shuffled order"
    yield Fault(
        f"the first {order.compared} steps of epochs 1 and 2 have the same rows in the same order "
        f"({how})",
        evidence={
            "seen": f"{order.same} of {order.compared} steps alike",
            "expected": "a new order",
            "rows": order.rows,
        },
    )


def waits(
    times: Waiting,
    *,
    share: Annotated[float, "of the time; below a tenth another worker brings little"] = 0.1,
    few: Annotated[int, "steps"] = 20,
    seconds: Annotated[float, "a step's wait; shorter ones are the collator's own work"] = 0.005,
) -> Iterator[Fault]:
    """A share of the time that workers would save."""
    if times.steps < few or times.share < share:
        return
    mean = times.share * times.seconds
    if max(mean, times.waiting) < seconds:
        return
    bursts = times.waiting < 0.3 * times.share * times.seconds
    what = "in bursts: a worker or the disk holds it up" if bursts else "at every step"
    yield Fault(
        f"{times.share:.0%} of the time is spent waiting for data, {what} (a typical step takes "
        f"{times.seconds * 1000:.0f} ms, of which {times.waiting * 1000:.0f} ms waiting)",
        evidence={"seen": f"{times.share:.0%}", "expected": f"< {share:.0%}", "steps": times.steps},
    )


FOLLOW_ORDER = Monitor(
    name="compare epochs' orders", moment="run", measures=(EpochOrder,), fold=follow_order
)
FOLLOW_WAITING = Monitor(
    name="follow waiting for data",
    moment="run",
    measures=(Waiting,),
    fold=follow_waiting,
    patient=True,
)

ORDER_REPEATS = Check(
    name="order-repeats",
    stage="complexify",
    severity="warning",
    moments=("run",),
    why="Batches that come again in the same order repeat their noise instead of averaging it.",
    fix="sampler.set_epoch(epoch)  # or leave the sampler to the Trainer",
    source="Bottou, Curiously fast convergence of some SGD algorithms (2009)",
    unsure="train_sampling_strategy='sequential' asks for it; curricula do too.",
    judges=(repeats,),
)

WAITING_FOR_DATA = Check(
    name="waiting-for-data",
    stage="complexify",
    severity="note",
    moments=("run",),
    why="While a step waits for rows, the device does nothing; workers would fetch them meanwhile.",
    fix="TrainingArguments(..., dataloader_num_workers=4, dataloader_pin_memory=True)",
    source="Mohan et al., Analyzing and Mitigating Data Stalls in DNN Training (2021)",
    unsure="On the CPU workers compete with the training itself.",
    judges=(waits,),
)

__all__ = ["ORDER_REPEATS", "WAITING_FOR_DATA", "EpochOrder", "Waiting"]
