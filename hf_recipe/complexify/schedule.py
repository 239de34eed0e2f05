"""Learning-rate schedules: "learning rate decay: fit it to your data set".

The recipe warns of code taken over from a large data set, where the rate falls "at epoch 30":
here that moment may lie beyond the end of the run, or the rate may be spent at a quarter of it.
So the run's real scheduler is simulated to the last planned step and past it, and judged in
steps, epochs and samples of *this* data set. Only its course past the end tells a rate that is
constant on purpose from one whose first milestone never comes.

What counts as a fault follows from one question: does the schedule's own horizon fit this run?
Restarts and cycles return, an inverse square root has no horizon to miss, a floor may be wanted,
milestones may leave a small rate for the last part: these are silent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from hf_recipe.complexify.schedule_summary import ScheduleSummary, summarise
from hf_recipe.core.check import Check, Measurement, Monitor, Probe, Skip, State
from hf_recipe.core.exhibit import Curve, Line
from hf_recipe.core.finding import Fault, Finding
from hf_recipe.instruments.rates import last_milestone, simulate
from hf_recipe.instruments.window import Window

# -------------------------------------------------------------------- judging


def never_decays(
    schedule: ScheduleSummary,
    *,
    high: Annotated[float, "half of the peak: a decay that ends there has hardly begun"] = 0.5,
) -> Iterator[Fault]:
    """A decay is declared, and the run ends before it."""
    if _rises_too_long(schedule) or schedule.horizonless or not schedule.peak > 0:
        return
    if not min(schedule.low, schedule.deepest) > high * schedule.peak * (1 + 1e-6):
        return
    falls_later = schedule.beyond is not None and schedule.beyond < 0.999 * schedule.deepest
    still_falling = schedule.beyond is None and schedule.falling and schedule.steps >= 10
    if schedule.dropped or not (falls_later or still_falling):
        return
    if schedule.steps < 10 and schedule.next_fall == schedule.steps:
        return  # so few steps that the decay's last one comes after them
    share = schedule.final / schedule.peak
    comes = (
        f"it falls under half of it at {schedule.place(schedule.next_fall)}"
        if schedule.next_fall is not None
        else "its decay lies further on"
    )
    yield Fault(
        message=f"the rate ends at {share:.1%} of its peak: {comes}, and the run ends at "
        f"{schedule.place(schedule.steps)}",
        evidence={
            "seen": f"{share:.1%} of the peak at the last step",
            "expected": f"under {high:.0%} within {schedule.steps:,} steps",
            "final": schedule.final,
            "peak": schedule.peak,
            "next_fall": schedule.next_fall,
            "steps": schedule.steps,
        },
    )


def decays_early(
    schedule: ScheduleSummary,
    *,
    idle: Annotated[float, "5 %: rounding and small errors in counting steps stay under it"] = 0.05,
    spent: Annotated[
        float, "under 1 % of the peak for 40 %: a fifth-power polynomial, the steepest in use"
    ] = 0.4,
    moved: Annotated[float, "95 % of the sum of rates in a third of the run; linear: 78 %"] = 1 / 3,
) -> Iterator[Fault]:
    """The rate is used up, and the run goes on."""
    if _rises_too_long(schedule) or not schedule.peak > 0 or schedule.steps < 5:
        return
    if schedule.idle > idle:
        end, what = 1 - schedule.idle, f"stays at {schedule.final:.2g} from there"
    elif schedule.mirrored > idle:
        end, what = 1 - schedule.mirrored, "climbs back from there: it ran past its own horizon"
    elif schedule.spent > spent:
        end, what = 1 - schedule.spent, "is under 1 % of its peak from there"
    elif schedule.moved <= moved:
        end, what = schedule.moved, "has by then moved the weights by 95 % of all it will"
    else:
        return
    step = round(end * schedule.steps)
    yield Fault(
        message=f"the rate is spent at {end:.0%} of the run, {schedule.place(step)}, and {what}; "
        f"the run ends at {schedule.place(schedule.steps)}",
        evidence={
            "seen": f"spent at {end:.0%} of the run",
            "expected": "a decay that ends with the run",
            "spent_step": step,
            "steps": schedule.steps,
            "final": schedule.final,
            "peak": schedule.peak,
        },
    )


def _rises_too_long(schedule: ScheduleSummary) -> bool:
    return any(True for _ in warmup_too_long(schedule))


def warmup_too_long(
    schedule: ScheduleSummary,
    *,
    share: Annotated[float, "half of the run: one-cycle schedules rise for 30 to 50 %"] = 0.5,
) -> Iterator[Fault]:
    """The peak comes late, or never."""
    if schedule.warmup_steps <= max(1, share * schedule.steps) or not schedule.declared_peak > 0:
        return
    reached = schedule.peak / schedule.declared_peak
    when = (
        f"the rate reaches only {reached:.1%} of its peak"
        if reached < 0.99
        else f"the peak is first reached at {schedule.place(schedule.warmup_steps)}"
    )
    yield Fault(
        message=f"{when}; the run ends at {schedule.place(schedule.steps)}",
        evidence={
            "seen": f"peak {reached:.1%} after {schedule.warmup_steps:,} steps of warm-up",
            "expected": f"the peak within {share:.0%} of {schedule.steps:,} steps",
            "reached": reached,
            "warmup_steps": schedule.warmup_steps,
            "steps": schedule.steps,
        },
    )


# -------------------------------------------------------------------- while training


@dataclass(frozen=True)
class SchedulePace(Measurement):
    """How the rates really used run against the planned ones.

    Attributes:
        step: optimizer steps done.
        rate: the rate of the last of them.
        pace: scheduler steps per optimizer step: 1 as planned, 4 when it is stepped four times,
            0 when it is never stepped; None: the rates are neither.
        compared: steps at which another pace would have given another rate.
    """

    step: int
    pace: int | None
    compared: int
    rate: float


COMPARED = 16  # steps of a window; all of them early in a run, where windows are short
PACES = (0, 1, 2, 3, 4, 6, 8, 12, 16)
# The surplus steps may come before the optimizer's first one (from a training_step) or after it.
CADENCES = tuple((p, ahead) for p in PACES for ahead in sorted({0, max(p - 1, 0)}))


def _key(pace: int, ahead: int) -> str:
    return f"{pace}+{ahead}" if ahead else str(pace)


NAMED = tuple((each, _key(*each)) for each in CADENCES)


def fold_pace(
    state: State, window: Window, seen: Mapping[str, Measurement]
) -> tuple[State, SchedulePace | None]:
    """Hold some rates of each window against the planned ones that every pace would give."""
    plan = seen.get(ScheduleSummary.kind())
    if not isinstance(plan, ScheduleSummary) or not plan.peak > 0:
        return state, None
    if not state and min(plan.planned) == max(plan.planned):  # at any pace
        return state, None
    tally: dict[str, list[int]] = dict(state) or {name: [0, 0] for _, name in NAMED}
    refuted = {name for name, (told, wrong) in tally.items() if told >= 3 and wrong}
    open_still = [item for item in NAMED if item[1] == "1" or item[1] not in refuted]
    step, rate = 0, 0.0
    known = [s for s in window.steps if (s.step - 1) % plan.every == 0]
    for done in known[:: max(1, len(known) // COMPARED)]:
        point = (done.step - 1) // plan.every
        if point >= len(plan.planned):
            continue
        step, rate = done.step, done.learning_rate
        for (pace, ahead), name in open_still:
            place = point * pace + (ahead if plan.every == 1 else 0)
            if place >= len(plan.planned):
                continue
            expected = plan.planned[place]
            told, wrong = tally[name]
            told += not abs(expected - plan.planned[point]) <= 0.02 * plan.peak
            wrong += not abs(expected - rate) <= 0.01 * plan.peak
            tally[name] = [told, wrong]
    if not step:
        return tally, None
    fits = {each: tally[name] for each, name in NAMED}
    others = [p for (p, _), (told, wrong) in fits.items() if p != 1 and not wrong and told >= 3]
    compared = max(told for told, _ in tally.values())
    likely = 1 if tally["1"][1] < 3 else (others[0] if others else None)
    return tally, SchedulePace(step, likely, compared, rate) if compared >= 3 else None


def stepped_too_often(pace: SchedulePace) -> Iterator[Fault]:
    """The scheduler runs ahead of the optimizer."""
    if pace.pace is not None and pace.pace > 1:
        yield Fault(
            message=f"the scheduler steps {pace.pace} times per optimizer step: the decay will be "
            f"over at {1 / pace.pace:.0%} of the run",
            subject="scheduler steps",
            severity="error",
            fix="call scheduler.step() once per optimizer step, and let the Trainer do it",
            evidence={
                "seen": f"{pace.pace} scheduler steps per update",
                "expected": "1",
                "pace": pace.pace,
                "compared": pace.compared,
            },
        )


def never_stepped(pace: SchedulePace) -> Iterator[Fault]:
    """The rate stays where it was at step 1, though the schedule moves."""
    if pace.pace == 0:
        yield Fault(
            message=f"the rate is still {pace.rate:.3g} at step {pace.step:,}, where it began: "
            "the scheduler does not step",
            subject="scheduler steps",
            evidence={"seen": "0 scheduler steps per update", "expected": "1", "pace": 0},
        )


# -------------------------------------------------------------------- the objects

NEVER_DECAYS = Check(
    name="schedule-never-decays",
    stage="complexify",
    severity="warning",
    moments=("static", "run"),
    why="A decay that begins after the run's end does nothing: the last and largest part of the "
    "gain, usually made at a small rate, is lost.",
    fix="state milestones and horizons as shares of this run's steps, e.g. "
    'lr_scheduler_type="linear"',
    source="Karpathy, A Recipe for Training Neural Networks (2019); Hägele et al. (2024)",
    judges=(never_decays, never_stepped),
    unsure="One leg of a longer training that will be resumed; an exponential decay that is meant "
    "to stay above half. A power law such as inverse_sqrt has no horizon and is silent.",
)
DECAYS_EARLY = Check(
    name="schedule-decays-early",
    stage="complexify",
    severity="warning",
    moments=("static", "run"),
    why="Steps taken at no learning rate cost the same and teach nothing; often the scheduler "
    "is stepped once per process or counts micro-batches.",
    fix="give the scheduler this run's optimizer steps: num_training_steps=trainer.state.max_steps",
    source="Karpathy, A Recipe for Training Neural Networks (2019); accelerate issue 2142 (2023)",
    judges=(decays_early, stepped_too_often),
    unsure="A cosine of several full waves without restarts, if it is meant.",
    explains=("update-too-small", "loss-not-decreasing", "input-ignored"),
)
WARMUP_TOO_LONG = Check(
    name="warmup-too-long",
    stage="complexify",
    severity="warning",
    moments=("static",),
    why="A run that ends during its warm-up never trains at the rate that was asked for.",
    fix="warmup_steps=0.1  # a share of the run's steps",
    source="Godbole et al., Deep Learning Tuning Playbook (2023)",
    judges=(warmup_too_long,),
    unsure="The first leg of a longer training that will be resumed; a cycle longer than the run.",
    explains=("update-too-small", "loss-not-decreasing", "input-ignored"),
)
CHECKS = (NEVER_DECAYS, DECAYS_EARLY, WARMUP_TOO_LONG)


def judge_schedule(
    learning_rates: Sequence[float],
    steps_per_epoch: int,
    *,
    continuation: Sequence[float] | None = None,
) -> list[Finding]:
    """Judge the learning rates of a planned run.

    Args:
        learning_rates: the rate of every optimizer step of the run.
        steps_per_epoch: optimizer steps in one pass over this data set; 0: unknown.
        continuation: rates of the same scheduler past the run's end. Without it, a constant rate
            is taken as meant.

    Returns:
        Findings of schedule-never-decays, schedule-decays-early and warmup-too-long.

    Raises:
        ValueError: no rates, or rates that are negative or not finite.
    """
    schedule = summarise(learning_rates, steps_per_epoch, continuation=continuation)
    return [check.finding(fault) for check in CHECKS for fault in check.judge(schedule)]


def take(subject: Any) -> Iterable[ScheduleSummary | Curve]:
    """Simulate the run's real scheduler to its end and past it."""
    plan = subject.plan
    if plan is None or subject.scheduler is None:
        raise Skip("the number of steps, or the scheduler, is not known before training")
    if subject.step:
        raise Skip("the run is resumed: its schedule was judged when it began")
    further = _further(plan.total_steps, last_milestone(subject.scheduler))
    rates = simulate(subject.scheduler, plan.total_steps + further)
    run, later = rates[: plan.total_steps], rates[plan.total_steps :]
    run += run[-1:] * (plan.total_steps - len(run))  # a one-cycle schedule that ends too soon
    summary = summarise(
        run, plan.steps_per_epoch, rows_per_step=plan.rows_per_step, continuation=later or None
    )
    yield summary
    steps = tuple(float(i * summary.every) for i in range(len(summary.planned)))
    yield Curve(
        title="Learning rate as planned",
        stage="complexify",
        x_label="step",
        y_label="learning rate",
        lines=(Line("planned", steps, summary.planned),),
    )


def _further(steps: int, milestone: int) -> int:
    """How far past the end to look: nine times the run and the last milestone, within a second."""
    return min(max(9 * steps + 100, milestone + 1 - steps), max(50_000, steps))


PROBE = Probe(
    name="simulate the schedule",
    moment="static",
    measures=(ScheduleSummary,),
    take=take,
    needs=("optimizer",),
)
MONITOR = Monitor(
    name="compare the rates used with the plan",
    moment="run",
    measures=(SchedulePace,),
    fold=fold_pace,
)
