"""The recipe's line "use backprop to chart dependencies".

Set the loss to something that depends on one row's outputs alone, run backward to the inputs, and
make sure that only that row's input gets a gradient (Karpathy 2019). A view in the place of a
permute mixes rows and still trains, badly. Looked at in evaluation mode, so that BatchNorm's own
mixing does not count; through a random projection of the logits, since a plain sum of them can
cancel exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch

from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.exhibit import Matrix
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.subject import Subject
from hf_recipe.instruments.trace import Trace, few_rows, random_direction, trace


@dataclass(frozen=True)
class RowDependence(Measurement):
    """How much one row's outputs depend on inputs, by the largest absolute gradient.

    Attributes:
        rows: in the batch.
        own: gradient on the row's own input (the smallest of all rows).
        other: gradient on any other row's input (the largest).
        source: what was differentiated for: names of inputs.
    """

    rows: int
    own: float
    other: float
    source: str


def measure(subject: Subject) -> Iterator[RowDependence | Matrix]:
    """One backward pass for each of a few rows, and the chart of them."""
    made = trace(subject, few_rows(subject))
    rows, logits = made.rows, made.logits
    if rows < 2:
        raise Skip("a batch of one row has no other rows")
    if logits is None or logits.ndim < 1 or logits.shape[0] != rows:
        raise Skip("the model's outputs are not one per row")
    if not made.leaves:
        raise Skip("no floating-point input and no embedded ids to differentiate for")
    if logits.ndim == 2 and logits.shape[1] == rows and _compares_rows(subject, made):
        raise Skip("the outputs compare the rows of a batch with each other, by design")
    direction = random_direction(logits)
    table, sources = [], set()
    for row in range(rows):
        gradients = made.gradients((logits[row] * direction).sum())
        reached = [
            (leaf, g) for leaf, g in zip(made.leaves, gradients, strict=True) if g is not None
        ]
        reached = [(leaf, g) for leaf, g in reached if g.shape[0] % rows == 0]
        if not reached:
            raise Skip("the outputs do not depend on any input that can be differentiated for")
        sources |= {leaf.name for leaf, _ in reached}
        table.append(torch.stack([g.reshape(rows, -1).amax(1) for _, g in reached]).amax(0))
    sizes = torch.stack(table)
    own = sizes.diagonal()
    other = sizes - torch.diag(own)
    yield RowDependence(rows, float(own.min()), float(other.max()), ", ".join(sorted(sources)))
    yield _chart(sizes)


def _compares_rows(subject: Subject, made: Trace) -> bool:
    """Whether the outputs have as many columns as the batch has rows, whatever their number."""
    with torch.no_grad():
        fewer = trace(subject, made.batch.take(range(2)), grasp=False).logits
    return fewer is not None and fewer.ndim == 2 and fewer.shape[1] == 2


def _chart(sizes: torch.Tensor) -> Matrix:
    largest = max(float(sizes.max()), 1e-30)
    names = [f"row {i}" for i in range(len(sizes))]
    return Matrix(
        "Which row's output depends on which row's input",
        "baselines",
        tuple(f"output of {name}" for name in names),
        tuple(f"input of {name}" for name in names),
        tuple(tuple(float(v) / largest for v in line) for line in sizes),
        "Largest gradient, relative to the largest of all: off the diagonal it must be 0.",
    )


def example_leak(
    dependence: RowDependence,
    *,
    tolerance: Annotated[float, "of the own gradient: fused kernels leave about 1e-6"] = 1e-5,
) -> Iterator[Fault]:
    """A row's output changes with another row's input."""
    if dependence.own > 0 and dependence.other <= tolerance * dependence.own:
        return
    if dependence.own == 0 and dependence.other == 0:
        return  # a constant output: another check's affair
    if not (math.isfinite(dependence.own) and math.isfinite(dependence.other)):
        return  # NaN says nothing of what depends on what
    yield Fault(
        f"outputs of a row have a gradient of {dependence.other:.2e} on other rows' "
        f"inputs ({dependence.source}; own: {dependence.own:.2e})",
        evidence={
            "seen": f"gradient {dependence.other:.2e} on other rows",
            "expected": "exactly 0 (in evaluation mode)",
            "own": dependence.own,
            "other": dependence.other,
        },
    )


row_dependence = Probe("chart row dependence", "probe", (RowDependence,), measure)
example_leaks = Check(
    name="example-leak",
    stage="baselines",
    severity="error",
    moments=("probe",),
    why="Rows that see each other train a model that cannot be used one row at a time.",
    fix="x.permute(...) or x.transpose(...) where x.view(...) mixes the batch axis",
    source="Karpathy, A Recipe for Training Neural Networks, 2019",
    unsure="Declared in-batch comparisons (contrastive heads) depend on other rows by design.",
    judges=(example_leak,),
    explains=("padding-leak", "padded-loss-differs"),
)
