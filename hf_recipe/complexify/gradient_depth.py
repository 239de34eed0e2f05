"""Does the gradient arrive at every layer at a size that means something?

Layers are compared with each other and a run with its own beginning, never with a number in
absolute units: targets in millions have large gradients and train well.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Annotated

from hf_recipe.core.check import Check
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.layers import LayerNumbers, LayerSample, LayerSamples


def _matrices(sample: LayerSample) -> list[LayerNumbers]:
    """Weight matrices in the model's order; those without any gradient (LoRA, experts) aside."""
    return [x for x in sample.layers if x.dims >= 2 and x.gradient > 0]


def _run_below(gradients: list[float], limit: float) -> int:
    """How many matrices, from the input on, have a gradient below `limit`."""
    for place, value in enumerate(gradients):
        if not value < limit:
            return place
    return len(gradients)


def vanishing(
    samples: LayerSamples,
    *,
    share: Annotated[
        float, "of the largest layer's gradient; healthy transformers stay above a thousandth"
    ] = 1e-5,
    matrices: Annotated[int, "from the input on: one alone may be an odd scale"] = 2,
    needed: Annotated[int, "samples in a row"] = 2,
    zeros: Annotated[float, "share of exact zeros in float16 gradients: underflow"] = 0.9,
) -> Iterator[Fault]:
    """The first layers get next to nothing; or float16 gradients are zero nearly everywhere."""
    chosen = samples.samples[-needed:]
    if len(chosen) < needed:
        return
    found = []
    for sample in chosen:
        layers = _matrices(sample)
        if len(layers) <= matrices:
            return
        top = max(x.gradient for x in layers)
        found.append(_run_below([x.gradient for x in layers], share * top))
    if min(found) >= matrices:
        layers = _matrices(chosen[-1])
        top = max(x.gradient for x in layers)
        first = layers[0]
        yield Fault(
            f"the gradient of the first {found[-1]} of {len(layers)} weight matrices is below "
            f"{share:.0e} of the largest one's: {first.name} has {first.gradient / top:.1e} of it",
            evidence={
                "seen": f"{first.gradient / top:.1e}",
                "expected": f">= {share:.0e}",
                "layers": found[-1],
                "step": chosen[-1].step,
            },
        )
        return
    half = [x for s in chosen for x in s.layers if x.dtype == "float16" and x.dims >= 2]
    sampled = sum(x.sampled for x in half)
    empty = sampled - sum(x.reached for x in half)
    if sampled and empty > zeros * sampled:
        yield Fault(
            f"{empty / sampled:.0%} of the float16 gradients are exactly zero: they underflow",
            subject="float16",
            evidence={"seen": f"{empty / sampled:.0%}", "expected": f"<= {zeros:.0%}"},
            fix="model.float() and TrainingArguments(..., bf16=True)",
        )


def exploding(
    samples: LayerSamples,
    *,
    share: Annotated[
        float, "of the last matrices' gradient; healthy deep networks stay below a hundred"
    ] = 1e4,
    matrices: Annotated[int, "from the input on"] = 2,
    needed: Annotated[int, "samples in a row"] = 2,
) -> Iterator[Fault]:
    """The gradient grows by orders of magnitude on its way to the input."""
    chosen = samples.samples[-needed:]
    if len(chosen) < needed:
        return
    seen = []
    for sample in chosen:
        gradients = [x.gradient for x in _matrices(sample)]
        if len(gradients) < 2 * matrices + 2:
            return
        thirds = len(gradients) // 3
        middle = median(gradients[thirds:-thirds])
        early, late = min(gradients[:matrices]), max(gradients[-matrices:])
        seen.append(early / late if early > middle > late else 1.0)
    if min(seen) < share:
        return
    layers = _matrices(chosen[-1])
    yield Fault(
        f"the gradient grows {seen[-1]:.1e}-fold from the last weight matrices to the first "
        f"({layers[0].name})",
        evidence={
            "seen": f"{seen[-1]:.1e}",
            "expected": f"< {share:.0e}",
            "step": chosen[-1].step,
        },
    )


VANISHING_GRADIENT = Check(
    name="vanishing-gradient",
    stage="complexify",
    severity="warning",
    moments=("run",),
    why="Layers that get a millionth of the gradient stay as they were drawn; the rest makes do.",
    fix="x = x + block(norm(x))  # residual connections, normalisation, ReLU or GELU for sigmoid",
    source="Glorot and Bengio, Understanding the difficulty of training deep networks (2010)",
    unsure="Adam rescales small gradients, and may train such layers on their noise.",
    judges=(vanishing,),
    explains=("loss-not-decreasing",),
)

EXPLODING_GRADIENT = Check(
    name="exploding-gradient",
    stage="complexify",
    severity="warning",
    moments=("run",),
    why="Where it grows with depth, no rate suits both the first layers and the last.",
    fix="nn.init.kaiming_normal_(layer.weight)  # and normalisation between the layers",
    source="Pascanu et al., On the difficulty of training recurrent networks (2013)",
    unsure="A head that has converged gets little gradient of its own.",
    judges=(exploding,),
    explains=("loss-diverged", "loss-spike"),
)

__all__ = ["EXPLODING_GRADIENT", "VANISHING_GRADIENT"]
