"""What the regularize stage tries, in the recipe's order, and what it leaves out and why."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_recipe.regularize.dropout import set_dropout, set_stochastic_depth

if TYPE_CHECKING:
    from hf_recipe.runner.experiment import Lab
    from hf_recipe.runner.journey import Journey

# Real data comes first in the recipe: the stage asks what more of it would buy, on its own.
NAMES = (
    "augmentation",
    "simulated",
    "features",
    "smaller-model",
    "smaller-batch",
    "dropout",
    "stochastic-depth",
    "weight-decay",
    "label-smoothing",
    "early-stopping",
    "averaging",
)
# Early stopping and averaging are seen in trainings that are done anyway; the others of these are
# what the recipe names first, or, as the smaller model, are often trained by then.
USUAL = (
    "augmentation",
    "smaller-model",
    "dropout",
    "weight-decay",
    "early-stopping",
    "averaging",
)
RATE, SMOOTHING, DEPTH, MADE_UP = 0.1, 0.1, 0.1, 0.3
# What decay does hangs on rate x decay x steps: how many times over a run forgets its weights, in
# logarithms. A number that suits a long run does nothing in a short one. Wang and Aitchison 2024
# (arXiv:2405.13698) find the best memory between one epoch and the whole run.
MEMORIES = 1.0
STRONGER = 2.0  # times as strong is tried where a strength was kept


@dataclass(frozen=True)
class Try:
    """One rung: its words, and what it changes in the setup that stands.

    Attributes:
        beside: what it takes from a training that is done anyway; "": nothing.
        stronger: the same at a greater strength, tried where this one was kept.
    """

    what: str
    change: dict[str, Any]
    beside: str = ""
    stronger: Try | None = None


def strengths(what: str, field: str, *values: float) -> Try:
    """The weakest of `values`, ascending, with the next stronger one behind it, and so on."""
    first, *rest = values
    further = strengths(what, field, *rest) if rest else None
    return Try(f"{what} {first:.3g}", {field: first}, stronger=further)


def chosen(text: str) -> tuple[str, ...]:
    """The names that ``--regularizers`` asks for, in the recipe's order.

    Raises:
        ValueError: a name that is not among `NAMES`.
    """
    asked = {part.strip() for part in text.split(",") if part.strip()}
    if "all" in asked:
        return NAMES
    for name in sorted(asked - {"usual", *NAMES}):
        raise ValueError(name)
    if "usual" in asked:
        asked |= set(USUAL)
    return tuple(name for name in NAMES if name in asked)


def proposal(name: str, journey: Journey, steps: int) -> Try | str:
    """What to try under this name on top of what stands, or why it is not tried.

    Args:
        steps: of a training of what stands.
    """
    from hf_recipe.runner.beside import AVERAGED, STOPPED

    lab, setup, first = journey.lab, journey.setup, journey.lab.start
    if name == "augmentation":
        if not lab.feed.changes:
            return lab.feed.fixed
        return strengths("augmentation of strength", "augment", 1.0, STRONGER)
    if name == "simulated":
        if not (_one_class(lab) or lab.data.kind == "numbers"):
            return "rows without one class each have no rows of their class to be made of"
        return Try(f"{MADE_UP:.0%} simulated rows", {"simulated": MADE_UP})
    if name == "features":
        return _features(journey)
    if name == "smaller-model":
        if setup.model == first.model:
            return "the model is the one that the job began with"
        names = ("model", "learning_rate", "schedule")
        return Try("the smaller model", {each: getattr(first, each) for each in names})
    if name == "smaller-batch":
        return Try("half the batch", {"batch": 0.5})
    if name == "dropout":
        return _rate(journey, "dropout", "dropout", RATE)
    if name == "stochastic-depth":
        return _rate(journey, "depth", "stochastic depth", DEPTH)
    if name == "weight-decay":
        value = float(f"{MEMORIES / (setup.learning_rate * max(1, steps)):.2g}")
        return _more(setup.weight_decay, "weight_decay", "weight decay", value)
    if name == "label-smoothing":
        if not _one_class(lab):
            return "rows without one class each have none to smooth"
        if setup.label_smoothing >= SMOOTHING:
            return f"it is {setup.label_smoothing:g} already"
        return Try(f"label smoothing {SMOOTHING}", {"label_smoothing": SMOOTHING})
    if name == "early-stopping":
        return Try("early stopping", {"early_stopping": True}, STOPPED)
    if setup.average:
        return "it is on already"
    return Try("averaged weights", {"average": True}, AVERAGED)


def _one_class(lab: Lab) -> bool:
    return lab.data.task.strata_of_rows(lab.feed, "train") is not None and (
        lab.data.labels("train").ndim == 1
    )


def _more(now: float, field: str, what: str, value: float) -> Try | str:
    if now >= value:
        return f"it is {now:g} already"
    return strengths(what, field, value, value * STRONGER)


def _rate(journey: Journey, field: str, what: str, value: float) -> Try | str:
    """A dropout, where the user's config (ours has units' alone) knows one."""
    from hf_recipe.runner.models import given_config

    config = given_config(journey.lab.options)
    if config is None and field == "depth":
        return "the network of this job drops no paths"
    if config is not None:
        change = set_dropout if field == "dropout" else set_stochastic_depth
        if not change(copy.deepcopy(config), value):
            return f"{type(config).__name__} has none"
    return _more(getattr(journey.setup, field), field, what, value)


def _features(journey: Journey) -> Try | str:
    """Columns that the latest model that was watched does not seem to need."""
    from hf_recipe.regularize.features import FieldUse, unneeded

    lab = journey.lab
    if lab.data.kind != "numbers":
        return f"{lab.data.kind} inputs are not left out"
    if lab.fields is None or journey.setup.share < 1:
        return "no model was looked at with all its columns"
    idle = sorted(unneeded(FieldUse.from_values(lab.fields)), key=lab.data.inputs.index)
    if not idle or len(idle) == len(lab.data.inputs):
        return "every column is used" if not idle else "no column is used beyond noise"
    numbers = ",".join(str(lab.data.inputs.index(column)) for column in idle)
    listed = ", ".join(idle[:3]) + (f" and {len(idle) - 3} more" if len(idle) > 3 else "")
    return Try(f"without {listed}", {"without": numbers})
