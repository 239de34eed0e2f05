"""What more rows would buy, and which inputs earn their place: small trainings of their own."""

from __future__ import annotations

import math

from hf_recipe.examiner import Examiner
from hf_recipe.instruments.compare import Outcome
from hf_recipe.instruments.distributed import from_rank_0
from hf_recipe.regularize import features, more_data
from hf_recipe.regularize.features import FieldUse
from hf_recipe.regularize.more_data import DataCurve
from hf_recipe.runner.journey import Journey, train_loss

SHARES = (8, 4, 2)  # the rows' eighth, quarter and half
MOST_TRIED = 3  # columns that are left out, one at a time


def look_at_data(journey: Journey, standing: list[Outcome]) -> None:
    """Answer both questions with the setup that stands, and let the checks judge."""
    lab = journey.lab
    examiner = Examiner(
        lab.settings(), lab.report, hear=lab.show.finding, agree=from_rank_0, leads=lab.leads
    )
    curve = _curve(journey, standing)
    if isinstance(curve, str):
        examiner.skip((DataCurve,), curve)
    else:
        examiner.judge(curve, "end")
        lab.report.exhibit(more_data.exhibit(curve))
        lab.report.answer(more_data.answer(curve))
        lab.show.say(f"       more data? {more_data.answer(curve).answer}")
    use = _fields(journey, standing)
    if use is None:
        examiner.skip((FieldUse,), "no model was looked at in full in this job")
        return
    for exhibit in features.exhibits(use):
        lab.report.exhibit(exhibit)
    if any(field.cost is not None for field in use.fields):
        examiner.judge(use, "end")
    else:
        kind = lab.data.kind
        reason = "every column is used" if kind == "numbers" else f"{kind} inputs are not left out"
        examiner.skip((FieldUse,), f"no field was left out and trained without: {reason}")


def _best(outcome: Outcome) -> float:
    """The lowest validation loss on the way: what stopping early would have kept."""
    losses = [outcome.loss, *(loss for _, loss in outcome.facts["curve"])]
    return min((loss for loss in losses if math.isfinite(loss)), default=math.nan)


def _curve(journey: Journey, standing: list[Outcome]) -> DataCurve | str:
    """The learning curve, or why there is none. Half the rows get 0.7 of the steps, and so on."""
    lab, setup = journey.lab, journey.setup
    rows = lab.feed.count("train")
    if rows < SHARES[0] * more_data.LEAST_ROWS:
        return f"{rows} training rows are too few to be cut to an eighth"
    found = [(rows, _best(outcome)) for outcome in standing]
    parts = {}
    for share in SHARES:
        change = {"rows": rows // share, "epochs": setup.epochs * math.sqrt(share)}
        parts[f"1/{share} of the rows"] = setup.change(**change, early_stopping=False)
    lab.ahead([part.variant(name, lab.seeds[0]) for name, part in parts.items()])
    found += [(part.rows, _best(lab.run(name, part))) for name, part in parts.items()]
    try:
        errors = [o.standard_error for o in standing]
        return more_data.extrapolate(sorted(found), rows, max(errors), train_loss(standing))
    except ValueError as error:
        return str(error)


def _fields(journey: Journey, standing: list[Outcome]) -> FieldUse | None:
    """What each field is worth; columns that seem idle are left out and trained without."""
    lab = journey.lab
    if lab.fields is None:
        return None
    use = FieldUse.from_values(lab.fields)
    if lab.data.kind != "numbers" or journey.setup.share < 1:  # then columns are left out already
        return use
    idle = sorted(
        features.unneeded(use), key=lambda n: next(f.rise for f in use.fields if f.name == n)
    )
    costs = {}
    for name in idle[:MOST_TRIED]:
        number = str(lab.data.inputs.index(name))
        outcomes = journey.outcomes(f"without {name}", journey.setup.change(without=number))
        costs[name] = journey.gain(standing, outcomes)
    return features.with_costs(use, costs)
