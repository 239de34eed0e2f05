"""Train on, stop sooner, or decay differently? Advice from the loss law, with its intervals.

"Leave it training": networks improve for unintuitively long; or the run's second half bought
nothing. Both are notes: what the law predicts is the training loss, so a run whose evaluation no
longer falls is not told to go on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from hf_recipe.complexify.outlook import LONGER, SHORTER, Outlook, fold
from hf_recipe.core.check import Check, Monitor
from hf_recipe.core.exhibit import Answer, Curve, Line
from hf_recipe.core.finding import Fault


def still_improving(
    outlook: Outlook,
    *,
    share: Annotated[float, "of the loss; seeds alone differ by 1 to 2 %"] = 0.02,
    falls: Annotated[float, "standard errors by which evaluation's slope is below zero"] = 2.0,
    epochs: Annotated[float, "passes up to which the training loss speaks for unseen rows"] = 3.0,
) -> Iterator[Fault]:
    """More steps of the same schedule are predicted to lower the loss."""
    longer = outlook.option(LONGER)
    if longer is None or not outlook.ended:
        return
    evaluated = outlook.evaluations >= 6
    general = outlook.falls > falls if evaluated else 0 < outlook.epochs <= epochs
    enough = longer.gain > max(share * abs(outlook.final), 2 * outlook.error)
    if not (general and enough and longer.low > 0):
        return
    yield Fault(
        f"after {outlook.steps:,} steps the loss was still falling: {longer.steps:,} steps of the "
        f"same schedule are predicted to lower the training loss by {longer.gain:.3g} "
        f"[{longer.low:.3g}, {longer.high:.3g}] to {longer.loss:.4g}",
        subject="steps",
        evidence={
            "seen": f"{outlook.final:.4g} after {outlook.steps:,} steps",
            "expected": f"{longer.loss:.4g} after {longer.steps:,}",
            "gain": longer.gain,
            "low": longer.low,
            "high": longer.high,
        },
        fix=f"TrainingArguments(..., max_steps={longer.steps})",
    )


def saturated_early(
    outlook: Outlook,
    *,
    by: Annotated[float, "share of the run: 40 % of its cost then bought nothing"] = 0.6,
    rate: Annotated[float, "of the peak: under it the schedule, not the model, stood still"] = 0.1,
    share: Annotated[float, "of the loss: a change that no choice rests on"] = 0.005,
) -> Iterator[Fault]:
    """The loss was at its end long before the end, at a rate that still moved the weights."""
    shorter = outlook.option(SHORTER)
    if shorter is None or not outlook.ended or outlook.falls > 2:
        return
    if not (outlook.settled < by and outlook.rate_then > rate):
        return
    worst = max(share * abs(outlook.final), 2 * outlook.error)
    if not -shorter.low < worst:
        return
    yield Fault(
        f"the loss was within one standard error of its end at {outlook.settled:.0%} of the run; "
        f"{shorter.steps:,} steps of the same schedule are predicted to cost {-shorter.gain:.3g} "
        f"[{-shorter.high:.3g}, {-shorter.low:.3g}]",
        subject="steps",
        evidence={
            "seen": f"settled at {outlook.settled:.0%}",
            "expected": "a loss that falls to the end",
            "cost": -shorter.gain,
            "steps": shorter.steps,
        },
        fix=f"TrainingArguments(..., max_steps={shorter.steps})",
    )


# -------------------------------------------------------------------- what a reader sees


def advise(outlook: Outlook) -> Answer:
    """The decay that the law expects most of, at this number of steps."""
    same = [o for o in outlook.options[1:] if o.steps == outlook.steps]
    best = max(same, key=lambda o: o.gain)
    if best.low > 0:
        word = f"{best.name}: a training loss lower by {best.gain:.3g} "
        word += f"[{best.low:.3g}, {best.high:.3g}]"
    else:
        word = f"as it is: no other is better beyond doubt ({best.name} {best.gain:+.3g} "
        word += f"[{best.low:+.3g}, {best.high:+.3g}])"
    if outlook.undecided:
        word = f"undecided; {word}. A plateau with a decay of its own at the end would tell"
    return Answer(
        "Which learning-rate decay suits this data set?",
        "complexify",
        word,
        {o.name: [o.loss, o.gain, o.low, o.high] for o in outlook.options},
    )


def picture(outlook: Outlook) -> Curve:
    """The predicted curves."""
    lines = tuple(Line(o.name, o.x, o.y) for o in outlook.options)
    return Curve(
        "Loss under other schedules, as predicted",
        "complexify",
        "step",
        "training loss",
        lines,
        caption="By the loss law fitted to this run's own curve; 80 % intervals stand in the "
        "answer on decay.",
    )


LOOK_AHEAD = Monitor("look ahead", "end", (Outlook,), fold, patient=True)

STILL_IMPROVING = Check(
    name="still-improving",
    stage="complexify",
    severity="note",
    moments=("end",),
    why="Networks keep training for unintuitively long; a run that is cut while its loss falls "
    "says little of what the model can do.",
    fix="TrainingArguments(..., num_train_epochs=1.5 * epochs)",
    source="Karpathy, A Recipe for Training Neural Networks (2019); Tissue et al. (2024)",
    judges=(still_improving,),
    unsure="It predicts the training loss; without six evaluations, runs of over three epochs "
    "are not judged.",
)
SATURATED_EARLY = Check(
    name="saturated-early",
    stage="complexify",
    severity="note",
    moments=("end",),
    why="Steps after the loss has settled cost as much as the others and change nothing; spend "
    "them on another seed or a larger model.",
    fix="TrainingArguments(..., num_train_epochs=0.6 * epochs)",
    source="Godbole et al., Deep Learning Tuning Playbook (2023); Tissue et al. (2024)",
    judges=(saturated_early,),
    unsure="A long plateau before another fall (grokking) looks the same until it falls.",
)

__all__ = ["LOOK_AHEAD", "SATURATED_EARLY", "STILL_IMPROVING", "Outlook", "advise", "picture"]
