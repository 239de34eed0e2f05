"""The head of a saved model's card: what it is, how good, how it is loaded; the checks follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_recipe.core.report import Report

ARRIVED = "How much of the teacher has arrived?"
HELPED = "Does the teacher help the student?"
LOAD = """```python
from hf_recipe.runner.models import load_saved

model = load_saved("{name}").eval()
```"""


def card_head(
    name: str, data: str, metric: str, results: Mapping[str, Mapping[str, Any]], report: Report
) -> str:
    """The Markdown above our section in the card of the model saved as `name`.

    Args:
        data: name of the data set.
        metric: of the results, besides their loss.
        results: on the test set, by model.
    """
    own = results[name]
    parts = [
        "---\ntags:\n- hf_recipe\n---",
        f"# {data}: the {name}",
        _about(name, results, report),
        f"On the test set, which chose nothing and was read once ({own['rows']} rows):",
        _numbers(name, metric, results),
        LOAD.format(name=name),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _about(name: str, results: Mapping[str, Mapping[str, Any]], report: Report) -> str:
    if name != "student":
        return "Trained by the recipe's choice of settings on the training and validation rows."
    teacher = "ensemble" if "ensemble" in results else "model"
    ours, theirs = results[name]["parameters"], results[teacher]["parameters"]
    said = {answer.question: answer.answer for answer in report.answers}
    lines = [
        f"A small network that stands in for the {teacher}, distilled out of it: {ours:,} "
        f"parameters instead of {theirs:,}."
    ]
    lines += [
        f"- {question} {said[question]}." for question in (ARRIVED, HELPED) if question in said
    ]
    return "\n".join(
        [lines[0], "", "Seen on validation rows, before the last training:", *lines[1:]]
    )


def _numbers(name: str, metric: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"| model | loss | {metric} | parameters |", "| --- | --- | --- | --- |"]
    for other, result in results.items():
        called = f"**{other}**, this one" if other == name else other
        loss = f"{result['loss']:.4f} +- {result['loss_error']:.4f}"
        lines.append(f"| {called} | {loss} | {result[metric]:.4f} | {result['parameters']:,} |")
    return "\n".join(lines)
