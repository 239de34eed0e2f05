"""What the costly questions about data have in common.

They take seconds, so that `inspect_dataset` and the runner ask them and a run does not; three of
them are answered by a note, never by an alarm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from hf_recipe.core.check import Check, Measurement, Probe

CALL = "hf_recipe.inspect_dataset(dataset)"
SMALLEST = 1e-6  # a chance under it is told as such: the tails of these tests carry no more


def asking(name: str, kind: type[Measurement], take: Callable[[Any], Iterable[Any]]) -> Probe:
    """The probe of a costly question."""
    return Probe(name, "dataset", (kind,), take, ("inspection",))


def answered(
    name: str, judge: Callable[..., Any], *, why: str, fix: str, source: str, unsure: str
) -> Check:
    """The check of a question whose answer is a note."""
    return Check(
        name=name, stage="data", severity="note", moments=("dataset",), why=why, fix=fix,
        source=source, judges=(judge,), unsure=unsure, call=CALL,
    )  # fmt: skip


def chance_text(p: float) -> str:
    """A chance in a sentence: "p 0.03", "p < 1e-6"."""
    return f"p < {SMALLEST:.0e}".replace("e-06", "e-6") if p < SMALLEST else f"p {p:.2g}"


def chance_cell(p: float) -> float | str:
    """A chance in a table's cell: two digits, or that it is under one in a million."""
    return "< 1e-6" if p < SMALLEST else float(f"{p:.2g}")
