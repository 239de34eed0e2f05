"""Did the loss leave its course: for a moment, or for good?

A run that blows up may come back by itself (a spike) or never again (it has diverged, and every
further step is wasted). Both are told in the run's own units: against its own noise and its own
fall so far, so that targets in millions and targets in millionths are treated alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Annotated, Any

from hf_recipe.core.check import Check, Measurement, Monitor
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.window import Step, Window

BLOCK = 8  # steps whose median is one point of the course
KEPT = 64  # latest losses that are remembered
ROWS_NAMED = 64
MAD_TO_SIGMA = 1.4826
RATE_JUMPS = 1.5  # a rise of the rate by so much excuses a bump: restarts and warm-up do that
RETURNS_WITHIN = 16  # steps; what stays longer is no spike


@dataclass(frozen=True)
class LossCourse(Measurement):
    """Where the training loss stands, in the model's own unit.

    Attributes:
        steps: finite steps seen.
        initial: loss of the first step, or before it, whichever is higher.
        lowest: lowest median over eight steps.
        levels: medians over eight steps each, the last ones, in order; at most eight.
        noise: standard deviation of one step, from differences of neighbours; robust.
        ended: whether training is over.
        calm: ``noise`` when the lowest level was reached: a lost course is noisy itself, and must
            not hide behind that; 0: not known.
    """

    steps: int
    initial: float
    lowest: float
    levels: tuple[float, ...]
    noise: float
    ended: bool
    calm: float = 0.0


@dataclass(frozen=True)
class Spike:
    """One event: the loss rose far above its course, and came back.

    Attributes:
        step, loss: its peak.
        level, noise: median and standard deviation of the steps before.
        length: steps until it was back.
        highest: the largest rise, in standard deviations, in the steps before.
        learning_rate: at the peak.
        rows: data set rows of the peak's step, where they are known and few.
    """

    step: int
    loss: float
    level: float
    noise: float
    length: int
    highest: float
    learning_rate: float
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class LossSpikes(Measurement):
    """Rises that ended since the last look; `steps` were judged so far."""

    steps: int
    spikes: tuple[Spike, ...]


# ---------------------------------------------------------------- the monitors


def noise_of(losses: list[float]) -> float:
    """Standard deviation of one loss, from the median difference of neighbours: no trend in it."""
    steps = [abs(b - a) for a, b in pairwise(losses)]
    return MAD_TO_SIGMA * median(steps) / math.sqrt(2) if steps else 0.0


def follow_course(
    state: dict[str, Any], window: Window, seen: Mapping[str, Measurement]
) -> tuple[dict[str, Any], LossCourse | None]:
    """Keep the last losses and the lowest level; measures at every flush from step 16 on."""
    state = {"steps": 0, "initial": None, "lowest": None, "calm": 0.0, "recent": [], **state}
    losses = window.losses
    if losses and state["initial"] is None:
        before = getattr(seen.get("InitialLoss"), "observed", -math.inf)
        state["initial"] = max(losses[0], before) if math.isfinite(before) else losses[0]
    state["steps"] += len(losses)
    recent = state["recent"] = [*state["recent"], *losses][-KEPT:]
    if len(recent) < 2 * BLOCK or not (losses or window.ended):
        return state, None
    first = len(recent) % BLOCK
    levels = [median(recent[i : i + BLOCK]) for i in range(first, len(recent), BLOCK)]
    noise, lowest = noise_of(recent), min(levels)
    if state["lowest"] is None or lowest < state["lowest"]:
        state |= {"lowest": lowest, "calm": noise}
    return state, LossCourse(
        steps=state["steps"],
        initial=state["initial"],
        lowest=state["lowest"],
        levels=tuple(levels),
        noise=noise,
        ended=window.ended,
        calm=state["calm"],
    )


def follow_spikes(
    state: dict[str, Any], window: Window, seen: Mapping[str, Measurement]
) -> tuple[dict[str, Any], LossSpikes | None]:
    """Compare each step with the 32 before its flush; measures rises that have come back."""
    state = {"steps": 0, "recent": [], "rates": [], "highest": 0.0, "open": None, **state}
    closed: list[Spike] = []
    recent: list[float] = state["recent"]
    full = len(recent) >= 2 * BLOCK
    level, noise = (median(recent), noise_of(recent)) if full else (0.0, 0.0)
    usual = window.losses
    rates = [*state["rates"], *(step.learning_rate for step in window.finite)]
    if not _is_quiet(state, window, level, noise, rates):
        place = len(state["rates"])
        for step in window.steps:
            if not math.isfinite(step.loss):
                state["open"] = None
                continue
            place += 1
            latest = rates[max(place - BLOCK, 0) : place]
            if full and noise > 0 and max(latest) <= RATE_JUMPS * latest[0]:
                _follow_rise(state, step, level, noise, closed)
    state |= {"steps": state["steps"] + len(usual), "rates": rates[-BLOCK:]}
    if state["open"] is None:
        state["recent"] = [*recent, *usual][-4 * BLOCK :]
    if closed or (window.ended and state["steps"]):
        return state, LossSpikes(steps=state["steps"], spikes=tuple(closed))
    return state, None


def _is_quiet(
    state: dict[str, Any], window: Window, level: float, noise: float, rates: list[float]
) -> bool:
    """Whether no step of the window rises; what that says of the highest rise is kept."""
    losses, calm = window.losses, len(window.losses) == len(window.steps)
    if state["open"] is not None or not (calm and losses and noise > 0):
        return False
    rise = (max(losses) - level) / noise
    if not rise < 4 or not max(rates) <= RATE_JUMPS * min(rates):
        return False
    state["highest"] = max(state["highest"], rise)
    return True


def _follow_rise(
    state: dict[str, Any], step: Step, level: float, noise: float, closed: list[Spike]
) -> None:
    """Open, extend or close a rise of four standard deviations or more."""
    rise = (step.loss - level) / noise
    if state["open"] is None:
        if rise < 4:
            state["highest"] = max(state["highest"], rise)
            return
        state["open"] = {"length": 0, "loss": -math.inf, "level": level, "noise": noise}
    event = state["open"]
    if (step.loss - event["level"]) / event["noise"] < 4:
        closed.append(_spike(event, state["highest"]))
        peak = (event["loss"] - event["level"]) / event["noise"]
        state["highest"], state["open"] = max(state["highest"], peak), None
        return
    event["length"] += 1
    if step.loss > event["loss"]:
        rows = list(step.rows) if len(step.rows) <= ROWS_NAMED else []
        event |= {"loss": step.loss, "step": step.step, "rate": step.learning_rate, "rows": rows}
    if event["length"] > RETURNS_WITHIN:  # this is where the loss now is
        state["open"], state["recent"] = None, []


def _spike(event: dict[str, Any], highest: float) -> Spike:
    return Spike(
        step=event["step"],
        loss=event["loss"],
        level=event["level"],
        noise=event["noise"],
        length=event["length"],
        highest=highest,
        learning_rate=event["rate"],
        rows=tuple(event["rows"]),
    )


# ---------------------------------------------------------------- the checks


def left_course(
    course: LossCourse,
    *,
    rise: Annotated[
        float, "share of the initial loss; warm-up bumps of healthy runs stay below a quarter"
    ] = 0.3,
    noises: Annotated[float, "standard deviations of one step; the first is a single one"] = 3.0,
    returned: Annotated[
        float, "share of the fall that is lost again; restarts of a schedule lose a fifth"
    ] = 0.5,
    lasting: Annotated[int, "medians of eight steps: 48 steps without a way back"] = 6,
) -> Iterator[Fault]:
    """The loss stands far above where it began, or lost most of its fall, and does not return."""
    if len(course.levels) < 2:
        return
    before, now = course.levels[-2:]
    steps = [abs(b - a) for a, b in pairwise(course.levels)]
    wander = median(steps) if len(steps) >= 3 else 0.0  # noise with a memory moves the medians
    margin = max(rise * abs(course.initial), noises * course.noise)
    above = [level - course.initial > margin for level in course.levels]
    returning = now - course.initial < 0.8 * (before - course.initial)
    calm = max(rise * abs(course.initial), noises * (course.calm or course.noise))
    late = course.levels[-lasting:]
    if len(late) == lasting and all(level - course.initial > calm for level in late):
        yield _diverged(course, now, f"it began at {course.initial:.4g}")
        return
    settled = course.ended or (all(above[-lasting:]) and len(above) >= lasting)
    at_once = not returning and now - course.initial > 2 * noises * wander
    if above[-1] and above[-2] and (settled or at_once):
        yield _diverged(course, now, f"it began at {course.initial:.4g}")
        return
    fall = course.initial - course.lowest
    needed = max(returned * fall, 2 * noises * course.noise, 2 * noises * wander)
    lost = [level - course.lowest > needed for level in course.levels[-lasting:]]
    fell = fall > max(noises * course.noise, 0.5 * abs(course.initial), 2 * noises * wander)
    flat = now > course.lowest + 0.8 * (max(course.levels[-lasting:]) - course.lowest)
    if len(lost) == lasting and all(lost) and flat and fell:
        yield _diverged(course, now, f"it had fallen from {course.initial:.4g}")


def _diverged(course: LossCourse, now: float, began: str) -> Fault:
    return Fault(
        f"the training loss has left its course: {began}, its lowest level was "
        f"{course.lowest:.4g}, and it stands at {now:.4g} (one step's noise {course.noise:.2g})",
        evidence={
            "seen": f"{now:.4g}",
            "expected": f"<= {course.initial:.4g}",
            "lowest": course.lowest,
            "noise": course.noise,
            "step": course.steps,
        },
    )


def came_back(
    measured: LossSpikes,
    *,
    sigmas: Annotated[
        float, "of a step's own noise, twice in a row: 1e-18 under a normal law"
    ] = 6.0,
    alone: Annotated[float, "for a rise of one step: a batch's own noise has long tails"] = 25.0,
    record: Annotated[float, "times the largest rise before: long tails set their own mark"] = 3.0,
    most: Annotated[int, "events named at once"] = 5,
) -> Iterator[Fault]:
    """Events of the weights last more than one step; a single bad batch must stand out by far."""
    told = 0
    for spike in measured.spikes:
        height = (spike.loss - spike.level) / spike.noise
        if spike.level > 0:  # of a law of products the logarithm is the unit
            ratio = math.log(spike.loss / spike.level)
            height = min(height, ratio / math.log1p(spike.noise / spike.level))
        needed = max(sigmas if spike.length > 1 else alone, record * max(spike.highest, 1.0))
        if not height > needed or told >= most:
            continue
        told += 1
        yield Fault(
            f"the training loss rose from {spike.level:.4g} to {spike.loss:.4g} at step "
            f"{spike.step} ({height:.0f} standard deviations) and came back after "
            f"{spike.length} steps; the rate was {spike.learning_rate:.3g}",
            subject=f"step {spike.step}",
            evidence={
                "seen": f"{spike.loss:.4g}",
                "expected": f"{spike.level:.4g} +- {spike.noise:.2g}",
                "step": spike.step,
                "sigmas": height,
                "length": spike.length,
            },
            examples=spike.rows,
        )


FOLLOW_COURSE = Monitor(
    name="follow the loss's course",
    moment="run",
    measures=(LossCourse,),
    fold=follow_course,
)

FOLLOW_SPIKES = Monitor(
    name="follow the loss's spikes",
    moment="run",
    measures=(LossSpikes,),
    fold=follow_spikes,
)

LOSS_DIVERGED = Check(
    name="loss-diverged",
    stage="complexify",
    severity="warning",
    moments=("run",),
    why="Weights that a too large step has thrown out of their basin rarely come back by training.",
    fix="TrainingArguments(..., learning_rate=args.learning_rate / 10, warmup_steps=0.05)",
    source="Chowdhery et al., PaLM (2022), section 5.1; Karpathy, A Recipe for Training (2019)",
    unsure="Data that grow harder on purpose (a curriculum, sources in turn) raise the loss too.",
    judges=(left_course,),
    explains=("loss-spike", "loss-not-decreasing"),
)

LOSS_SPIKE = Check(
    name="loss-spike",
    stage="complexify",
    severity="note",
    moments=("run",),
    why="A spike costs the steps until the loss is back, and foretells the one that will not be.",
    fix="TrainingArguments(..., max_grad_norm=1.0)  # and look at the rows of that step",
    source="Chowdhery et al., PaLM (2022), section 5.1; Molybog et al., Adam instability (2023)",
    unsure="One batch of odd rows is a spike too: nothing was wrong with the weights.",
    judges=(came_back,),
)

__all__ = ["LOSS_DIVERGED", "LOSS_SPIKE", "LossCourse", "LossSpikes", "Spike"]
