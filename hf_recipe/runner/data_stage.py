"""Data: become one with it. The data report, and what its labels alone are worth."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hf_recipe.core.exhibit import Answer, Table
from hf_recipe.core.report import Gate
from hf_recipe.instruments.distributed import from_rank_0
from hf_recipe.runner.data import Data
from hf_recipe.runner.experiment import Lab
from hf_recipe.runner.gates import data_gate
from hf_recipe.runner.journey import Journey


def run(journey: Journey) -> Gate:
    """Inspect all parts on rank 0; all ranks get its verdict."""
    return from_rank_0(_look(journey.lab) if journey.lab.leads else None)  # type: ignore[return-value]


def _look(lab: Lab) -> Gate:
    data = lab.data
    lab.report.exhibit(_parts(data))
    lab.report.answer(_prior(data))
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
    inputs: dict[str, Any] = {}
    if data.kind in ("text", "image"):
        inputs[data.kind] = data.inputs[0]
    seen = inspect_dataset(
        dict(data.splits),
        label="label",
        processing_class=lab.feed.processing_class,
        model=build(data, lab.feed, lab.options, "simplest", 0.0) if data.classes else None,
        ignore=[n for n, c in CHECKS.items() if c.stage == "data" and n not in wanted],
        **inputs,
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


def _parts(data: Data) -> Table:
    names = data.classes or ("mean", "standard deviation")
    rows: list[tuple[Any, ...]] = []
    for part in ("train", "validation", "test"):
        labels = np.asarray(data.splits[part]["label"])
        if data.classes:
            counts = np.bincount(labels, minlength=len(names))
            rows.append((part, len(labels), *(int(c) for c in counts)))
        else:
            rows.append((part, len(labels), float(labels.mean()), float(labels.std())))
    return Table("The three parts", "data", ("part", "rows", *names), tuple(rows))


def _prior(data: Data) -> Answer:
    """What is known without any input."""
    question = "How good is an answer that never looks at its input?"
    if not data.classes:
        return Answer(
            question, "data", "squared error 1 in units of the target's variance", {"loss": 1.0}
        )
    shares = np.bincount(data.labels("train"), minlength=data.outputs) / len(data.labels("train"))
    entropy = float(-sum(p * math.log(p) for p in shares if p > 0))
    return Answer(
        question,
        "data",
        f"loss {entropy:.4f} (uniform: {math.log(data.outputs):.4f}), accuracy {shares.max():.1%}",
        {"loss": entropy, "accuracy": float(shares.max())},
    )
