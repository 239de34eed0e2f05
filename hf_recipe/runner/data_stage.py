"""Data: become one with it. The data report, and what its labels alone are worth."""

from __future__ import annotations

from hf_recipe.core.exhibit import Answer
from hf_recipe.core.report import Gate
from hf_recipe.instruments.distributed import from_rank_0
from hf_recipe.runner.experiment import Lab
from hf_recipe.runner.gates import data_gate
from hf_recipe.runner.journey import Journey


def run(journey: Journey) -> Gate:
    """Inspect all parts on rank 0; all ranks get its verdict."""
    return from_rank_0(_look(journey.lab) if journey.lab.leads else None)  # type: ignore[return-value]


def _look(lab: Lab) -> Gate:
    data = lab.data
    lab.report.exhibit(data.task.table(lab.feed))
    lab.report.answer(data.task.prior(lab.feed))
    if data.best:
        lab.report.answer(Answer("How good can any answer be?", "data", data.best))
    unanswered = _inspect(lab)
    own = [finding for finding in lab.report.flat if finding.stage == "data"]
    return data_gate(
        sorted({f.check for f in own if f.severity == "error"}),
        sorted({f.check for f in own if f.severity == "warning"}),
        [answer.question for answer in lab.report.answers if answer.stage == "data"],
        unanswered,
    )


def _inspect(lab: Lab) -> list[str]:
    """Run the data checks; returns what could not be answered, with the reason."""
    from hf_recipe.catalogue import CHECKS
    from hf_recipe.inspection import inspect_dataset
    from hf_recipe.runner.models import build

    data, wanted = lab.data, lab.chosen("data")
    looked = data.task.looked_at(data)
    labelled = looked.label is not None and bool(data.classes)
    seen = inspect_dataset(
        dict(looked.parts),
        label=looked.label,
        processing_class=lab.feed.processing_class,
        model=build(data, lab.feed, lab.options, "simplest", 0.0) if labelled else None,
        ignore=[n for n, c in CHECKS.items() if c.stage == "data" and n not in wanted],
        **looked.columns,
    )
    for finding in seen.flat:
        if finding.check in wanted:
            lab.report.add(finding)
            lab.show.finding(finding)
    lab.absorb(seen)
    for exhibit in seen.exhibits:
        lab.report.exhibit(exhibit)
    for answer in seen.answers:
        lab.report.answer(answer)
    return [f"{name} crashed: {error}" for name, error in seen.crashed.items() if name in wanted]
