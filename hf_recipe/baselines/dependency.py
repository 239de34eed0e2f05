"""The recipe's line "use backprop to chart dependencies".

Set the loss to something that depends on one row's outputs alone, run backward to the inputs, and
make sure that only that row's input gets a gradient (Karpathy 2019). A view in the place of a
permute mixes rows and still trains, badly. Looked at in evaluation mode, so that BatchNorm's own
mixing does not count; through a random projection of the logits, since a plain sum of them can
cancel exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import nn

from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.row_losses import logits_of
from hf_recipe.instruments.subject import Subject

ROWS, CHOSEN = 4, (0, 2)


@dataclass(frozen=True)
class RowDependence(Measurement):
    """How much one row's outputs depend on inputs, by the largest absolute gradient.

    Attributes:
        rows: in the batch.
        own: gradient on the row's own input (of the smallest of the rows looked at).
        other: gradient on any other row's input (the largest).
        source: what was differentiated for: an input's name, or the embedding's output.
    """

    rows: int
    own: float
    other: float
    source: str


def measure(subject: Subject) -> Iterator[RowDependence]:
    """Two backward passes on a few rows."""
    batch = subject.batch("train", size=ROWS)
    rows = len(batch)
    if rows < 2:
        raise Skip("a batch of one row has no other rows")
    model = subject.model
    model.eval()
    inputs = {k: v for k, v in batch.inputs.items() if v is not batch.labels}
    logits, leaf, source = _forward(model, inputs)
    if logits is None or logits.ndim < 2 or logits.shape[0] != rows:
        raise Skip("the model's outputs are not one per row")
    if leaf.shape[0] != rows:
        raise Skip(f"{source} is not one per row")
    direction = torch.randn(logits.shape[1:], device=logits.device, dtype=logits.dtype)
    own, other = [], []
    for row in sorted({min(r, rows - 1) for r in CHOSEN}):
        (gradient,) = torch.autograd.grad(
            (logits[row] * direction).sum(), leaf, retain_graph=True, allow_unused=True
        )
        if gradient is None:
            raise Skip(f"the outputs do not depend on {source}")
        size = gradient.detach().float().abs().reshape(rows, -1).amax(1)
        own.append(float(size[row]))
        other.append(float(torch.cat([size[:row], size[row + 1 :]]).max()))
    yield RowDependence(rows, min(own), max(other), source)


def _forward(
    model: nn.Module, inputs: Mapping[str, Any]
) -> tuple[torch.Tensor | None, torch.Tensor, str]:
    """(logits, the tensor to differentiate for, its name)."""
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and "mask" not in name:
            leaf = value.detach().clone().requires_grad_(True)
            return logits_of(model(**{**inputs, name: leaf})), leaf, name
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if embedding is None:
        raise Skip("no floating-point input and no input embedding to differentiate for")
    kept: list[torch.Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        leaf = output.detach().requires_grad_(True)
        kept.append(leaf)
        return leaf

    handle = embedding.register_forward_hook(keep)
    try:
        logits = logits_of(model(**inputs))
    finally:
        handle.remove()
    if not kept:
        raise Skip("the input embedding was not called")
    return logits, kept[0], "the input embedding"


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
    yield Fault(
        f"outputs of a row have a gradient of {dependence.other:.2e} on other rows' "
        f"{dependence.source} (own: {dependence.own:.2e})",
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
)
