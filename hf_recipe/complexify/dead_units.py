"""Units that never fire, or never leave saturation.

Looked at on a few steps of the run, through forward hooks that stand for that one step. A unit
counts as dead when it was so on every row and position of every step looked at; a layer is named
when nearly all of its units are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import nn

from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.subject import Subject

ACTIVATIONS = "activation_units"  # where a subject's cache keeps the run's measurement
MODULES = 64  # activation modules watched at most, evenly through the depth
POSITIONS = 4096  # rows or positions looked at in one call
RECTIFIERS = ("relu", "gelu", "silu", "swish", "mish", "quickgelu")
SQUASHERS = {"tanh": (-1.0, 1.0), "sigmoid": (0.0, 1.0)}
NEAR = 1e-3  # from the end of a squasher's range, whose slope is then below 0.2 % of its largest


@dataclass(frozen=True)
class LayerUnits(Measurement):
    """One activation: `dead` of `units` were so in all of `samples` steps.

    Attributes:
        name, function: of the module.
        positions: rows and positions seen in all.
    """

    name: str
    function: str
    units: int
    dead: int
    samples: int
    positions: int


@dataclass(frozen=True)
class ActivationUnits(Measurement):
    """All activations that were seen, in the model's order."""

    layers: tuple[LayerUnits, ...]


@dataclass
class _Seen:
    function: str
    alive: torch.Tensor
    samples: int = 0
    positions: int = 0
    step: int = -1


@dataclass
class ActivationWatch:
    """Hooks the activations of a model for single steps."""

    _seen: dict[str, _Seen] = field(default_factory=dict)
    _hooks: list[Any] = field(default_factory=list)

    def arm(self, model: nn.Module, step: int) -> None:
        """Look on from here until `disarm`."""
        self.disarm()
        found = [(n, m, f) for n, m in model.named_modules() if (f := _function(m))]
        for name, module, function in found[:: -(-len(found) // MODULES) or 1]:
            self._hooks.append(module.register_forward_hook(self._hook(name, function, step)))

    def disarm(self) -> None:
        """Take every hook off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def measure(self) -> ActivationUnits:
        """What was seen so far; reads the device."""
        return ActivationUnits(
            tuple(
                LayerUnits(
                    name=name,
                    function=seen.function,
                    units=seen.alive.numel(),
                    dead=int((~seen.alive).sum()),
                    samples=seen.samples,
                    positions=seen.positions,
                )
                for name, seen in self._seen.items()
            )
        )

    def _hook(self, name: str, function: str, step: int) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            # Activation checkpointing runs the forward pass again, inside the backward pass.
            if torch._C._current_graph_task_id() != -1 or not isinstance(output, torch.Tensor):
                return
            if not module.training or output.dim() < 2:
                return
            self._take(name, function, step, output.detach())

        return look

    @torch.no_grad()
    def _take(self, name: str, function: str, step: int, output: torch.Tensor) -> None:
        picture = output.dim() == 4  # (rows, channels, height, width); else units come last
        units = output.movedim(1, -1) if picture else output
        units = units.reshape(-1, units.shape[-1])
        units = units[:: -(-units.shape[0] // POSITIONS) or 1]
        alive = _alive(units, function)
        seen = self._seen.get(name)
        if seen is None or seen.alive.shape != alive.shape:
            seen = self._seen[name] = _Seen(function, alive)
        seen.alive = seen.alive | alive
        seen.positions += units.shape[0]
        if seen.step != step:
            seen.samples, seen.step = seen.samples + 1, step


def _function(module: nn.Module) -> str:
    """The activation's name in lower case, "" for any other module."""
    name = type(module).__name__.lower().removesuffix("activation")
    known = name in SQUASHERS or any(name.endswith(r) for r in RECTIFIERS)
    return name if known and not any(module.children()) else ""


def _alive(units: torch.Tensor, function: str) -> torch.Tensor:
    """Which columns did something on at least one row."""
    if function in SQUASHERS:
        low, high = SQUASHERS[function]
        margin = NEAR * (high - low)
        return ((units > low + margin) & (units < high - margin)).any(0)
    return (units.abs() > 1e-6).any(0)


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
) -> Iterator[Fault]:
    """Layers of which next to nothing is left."""
    found = [
        x
        for x in units.layers
        if x.samples >= samples
        and x.positions >= positions
        and x.units >= width
        and x.dead >= share * x.units
    ]
    if not found:
        return
    worst = max(found, key=lambda x: x.dead / x.units)
    what = "never left saturation" if worst.function in SQUASHERS else "never fired"
    more = f" (and in {len(found) - 1} further layers)" if len(found) > 1 else ""
    yield Fault(
        f"{worst.dead} of {worst.units} units of {worst.name} ({worst.function}) {what} in "
        f"{worst.samples} steps, {worst.positions} positions{more}",
        evidence={
            "seen": f"{worst.dead / worst.units:.0%} dead",
            "expected": f"< {share:.0%}",
            "layers": len(found),
        },
    )


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
        "loss-not-decreasing",
        "input-without-gradient",
        "input-ignored",
    ),
)

__all__ = ["DEAD_UNIT", "ActivationUnits", "ActivationWatch", "LayerUnits"]
