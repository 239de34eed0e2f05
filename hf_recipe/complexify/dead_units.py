"""Units that never fire, or never leave saturation.

Looked at on a few steps of the run. A unit counts as dead when it was so on every row and position
of the last steps looked at. A layer is named when nearly all of its units are, or when nearly all
that they put out is saturated: a unit that crosses its narrow slope now and then learns no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from hf_recipe.core.check import Check, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.activations import SQUASHERS, ActivationUnits, LayerUnits
from hf_recipe.instruments.subject import Subject

ACTIVATIONS = "activation_units"  # where a subject's cache keeps the run's measurement


def take_activations(subject: Subject) -> Iterator[ActivationUnits]:
    """Yield what the run's watch saw."""
    units = subject.cache.get(ACTIVATIONS)
    if not isinstance(units, ActivationUnits):
        raise Skip("nobody watches the activations")
    yield units


def dead(
    units: ActivationUnits,
    *,
    share: Annotated[
        float, "of a layer's units; sparse healthy ReLU layers have up to a half, by batch"
    ] = 0.9,
    samples: Annotated[int, "steps in which they were dead throughout"] = 3,
    positions: Annotated[int, "rows or positions in all; experts may see few"] = 32,
    width: Annotated[int, "units; a narrow output may be sure of itself"] = 8,
    saturated: Annotated[
        float, "of a hidden layer's values; a trained tanh pooler has about a half; judged"
    ] = 0.85,
) -> Iterator[Fault]:
    """Layers of which next to nothing is left."""
    looked = [
        x
        for x in units.layers
        if x.samples >= samples and x.positions >= positions and x.units >= width
    ]
    found = [x for x in looked if x.dead >= share * x.units]
    flat = [x for x in looked if x.followed and x.flat >= saturated and x not in found]
    if found:
        worst = max(found, key=lambda x: x.dead / x.units)
        what = "never left saturation" if worst.function in SQUASHERS else "never fired"
        seen = f"{worst.dead / worst.units:.0%} dead"
        said = f"{worst.dead} of {worst.units} units of {worst.name} ({worst.function}) {what}"
    elif flat:
        worst = max(flat, key=lambda x: x.flat)
        seen = f"{worst.flat:.1%} saturated"
        said = (
            f"{worst.flat:.1%} of what the {worst.units} units of {worst.name} "
            f"({worst.function}) put out is saturated"
        )
    else:
        return
    count = len(found) + len(flat)
    more = f" (and in {count - 1} further layers)" if count > 1 else ""
    yield Fault(
        f"{said} in the last of {worst.samples} steps looked at, {worst.positions} positions{more}",
        evidence={
            "seen": seen,
            "expected": f"< {share if found else saturated:.0%}",
            "layers": count,
        },
        fix=_fix(worst),
    )


def _fix(worst: LayerUnits) -> str:
    if worst.function in SQUASHERS:
        return "nn.init.xavier_uniform_(layer.weight)  # and inputs of unit scale, or LayerNorm"
    return "nn.init.zeros_(layer.bias)  # and inputs of unit scale, or a smaller rate"


WATCH_UNITS = Probe(
    name="watch activations",
    moment="run",
    measures=(ActivationUnits,),
    take=take_activations,
    needs=("optimizer",),
)

DEAD_UNIT = Check(
    name="dead-unit",
    stage="complexify",
    severity="warning",
    moments=("run",),
    why="A unit that never fires, or is saturated on every input, has no gradient and stays so.",
    fix="StandardScaler().fit_transform(X)  # or a smaller rate, or biases that begin at zero",
    source="Lu et al., Dying ReLU and Initialization (2019); Glorot and Bengio (2010)",
    unsure="Gates that are shut on purpose; experts that no row of the samples was sent to.",
    judges=(dead,),
    explains=(
        "vanishing-gradient",
        "update-too-small",
        "loss-not-decreasing",
        "input-without-gradient",
        "input-ignored",
    ),
)

__all__ = ["DEAD_UNIT"]
