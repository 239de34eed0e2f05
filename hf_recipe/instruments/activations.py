"""What the activations of a model put out on single steps: modules, and functions that are called.

A module is met by a forward hook; ``F.relu(...)`` or ``torch.tanh(...)`` by a mode that sees every
torch function while the model's forward runs. Both stand for that one step alone. What no weight
follows is left out where it is a function: a hinge in the loss is zero once it is solved.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from hf_recipe.core.check import Measurement

MODULES = 64  # activation modules, and as many functions, watched at most
POSITIONS = 4096  # rows or positions looked at in one call
RECTIFIERS = ("relu", "gelu", "silu", "swish", "mish", "quickgelu")
SQUASHERS = {"tanh": (-1.0, 1.0), "sigmoid": (0.0, 1.0)}
NEAR = 1e-3  # from the end of a squasher's range, whose slope is then below 0.2 % of its largest
LAST = 3  # steps looked at; what dies in mid-run is seen three looks later
FLAT = 0.1  # of a squasher's largest slope: |tanh| above 0.95
# sigmoid is not among them: in a function it is a gate, or an output that may be sure of itself
FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys((functional.relu, torch.relu, torch.Tensor.relu, torch.relu_), "relu"),
    **dict.fromkeys((torch.Tensor.relu_, functional.relu_), "relu"),
    **dict.fromkeys((functional.tanh, torch.tanh, torch.Tensor.tanh), "tanh"),
    functional.gelu: "gelu",
    functional.silu: "silu",
    functional.mish: "mish",
}


@dataclass(frozen=True)
class LayerUnits(Measurement):
    """One activation: `dead` of `units` were so in all of the last steps (three, if so many).

    Attributes:
        name, function: of the module; of a function its order among its like, and where it stands.
        samples: steps looked at.
        positions: rows and positions seen in all.
        flat: of a squasher, the share of its values whose slope is under a tenth of the largest,
            in that of the last steps where it is smallest.
        followed: whether a weight was met after it: it is no output.
    """

    name: str
    function: str
    units: int
    dead: int
    samples: int
    positions: int
    flat: float = 0.0
    followed: bool = False


@dataclass(frozen=True)
class ActivationUnits(Measurement):
    """All activations that were seen, in the model's order."""

    layers: tuple[LayerUnits, ...]


@dataclass
class _Seen:
    function: str
    alive: torch.Tensor  # which units did something in the latest step
    silent: torch.Tensor  # steps before it, in a row, in which each unit did nothing
    flat: list[tuple[torch.Tensor, int]] = field(default_factory=list)  # of each of the last steps
    samples: int = 0
    positions: int = 0
    step: int = -1
    followed: bool = False

    def begin(self, step: int, alive: torch.Tensor) -> None:
        """A new step is looked at."""
        if self.samples:
            self.silent = torch.where(self.alive, 0, self.silent + 1)
        self.alive, self.step, self.samples = alive, step, self.samples + 1
        self.flat = [*self.flat, (torch.zeros((), device=alive.device), 0)][-LAST:]

    def dead(self) -> int:
        """Units that did nothing in the last steps."""
        silent = torch.where(self.alive, 0, self.silent + 1)
        return int((silent >= min(self.samples, LAST)).sum())


@dataclass
class ActivationWatch:
    """Watches the activations of a model for single steps."""

    _seen: dict[str, _Seen] = field(default_factory=dict)
    _hooks: list[Any] = field(default_factory=list)
    _calls: _Calls | None = None
    _open: ExitStack = field(default_factory=ExitStack)

    def arm(self, model: nn.Module, step: int) -> None:
        """Look on from here until `disarm`."""
        self.disarm()
        found = [(n, m, f) for n, m in model.named_modules() if (f := _function(m))]
        for name, module, function in found[:: -(-len(found) // MODULES) or 1]:
            self._hooks.append(module.register_forward_hook(self._hook(name, function, step)))
        if any(
            m.__class__.__name__ == "OptimizedModule" or vars(m).get("_compiled_call_impl")
            for m in model.modules()
        ):
            return  # a mode would have what is compiled compiled again

        def enter(module: nn.Module, inputs: Any) -> None:
            if self._calls is None and module.training:
                self._calls = _Calls(self, step)
                self._open.enter_context(self._calls)

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            self._leave()

        self._hooks.append(model.register_forward_pre_hook(enter))
        self._hooks.append(model.register_forward_hook(leave, always_call=True))

    def disarm(self) -> None:
        """Take every hook off."""
        self._leave()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _leave(self) -> None:
        self._calls = None
        self._open.close()

    def measure(self) -> ActivationUnits:
        """What was seen so far; reads the device. Functions that no weight follows are left out."""
        return ActivationUnits(
            tuple(
                LayerUnits(
                    name=name,
                    function=seen.function,
                    units=seen.alive.numel(),
                    dead=seen.dead(),
                    samples=seen.samples,
                    positions=seen.positions,
                    flat=min(float(flat) / max(count, 1) for flat, count in seen.flat),
                    followed=seen.followed,
                )
                for name, seen in self._seen.items()
                if seen.followed or not name.startswith("call ")
            )
        )

    def _hook(self, name: str, function: str, step: int) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            # Activation checkpointing runs the forward pass again, inside the backward pass.
            if torch._C._current_graph_task_id() != -1 or not isinstance(output, torch.Tensor):
                return
            if not module.training or output.dim() < 2:
                return
            self.take(name, function, step, output.detach())

        return look

    @torch.no_grad()
    def take(self, name: str, function: str, step: int, output: torch.Tensor) -> None:
        """Take in what one activation put out."""
        picture = output.dim() == 4  # (rows, channels, height, width); else units come last
        units = output.movedim(1, -1) if picture else output
        units = units.reshape(-1, units.shape[-1])
        units = units[:: -(-units.shape[0] // POSITIONS) or 1]
        alive, flat = _alive(units, function), _flat(units, function)
        seen = self._seen.get(name)
        if seen is None or seen.alive.shape != alive.shape:
            none = torch.zeros_like(alive)
            seen = self._seen[name] = _Seen(function, none, none.int())
        if seen.step != step:
            seen.begin(step, alive)
        seen.alive = seen.alive | alive
        before, count = seen.flat[-1]
        seen.flat[-1] = (before + flat, count + units.numel())
        seen.positions += units.shape[0]
        if self._calls is not None:
            self._calls.open.add(name)

    def follow(self, names: set[str]) -> None:
        """A weight is met after these."""
        for name in names:
            self._seen[name].followed = True


class _Calls(TorchFunctionMode):
    """Sees the functions that one forward pass calls."""

    def __init__(self, watch: ActivationWatch, step: int) -> None:
        super().__init__()
        self.watch, self.step = watch, step
        self.counts: dict[str, int] = {}
        self.open: set[str] = set()  # activations that no weight has followed yet

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if self.open and any(isinstance(a, nn.Parameter) and a.dim() > 1 for a in args):
            self.watch.follow(self.open)
            self.open = set()
        made = function(*args, **(kwargs or {}))
        name = FUNCTIONS.get(function) if function.__hash__ is not None else None
        if name is not None and isinstance(made, torch.Tensor) and made.dim() > 1:
            self._look(name, made.detach())
        return made

    def _look(self, function: str, output: torch.Tensor) -> None:
        place = _place()
        count = self.counts[function] = self.counts.get(function, 0) + 1
        if place is None or count > MODULES:
            return
        self.watch.take(f"call {count} of {function} in {place}", function, self.step, output)


def _place() -> str | None:
    """The function outside torch that called; None where a watched module did."""
    frame = sys._getframe(3)  # behind us and the mode
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("torch."):
        if _function(frame.f_locals.get("self")):
            return None
        frame = frame.f_back
    return None if _function(frame.f_locals.get("self")) else frame.f_code.co_qualname


def _function(module: Any) -> str:
    """The activation's name in lower case, "" for any other module."""
    if not isinstance(module, nn.Module):
        return ""
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


def _flat(units: torch.Tensor, function: str) -> torch.Tensor:
    """How many values of a squasher have next to no slope."""
    if function not in SQUASHERS:
        return torch.zeros((), device=units.device)
    low, high = SQUASHERS[function]
    slope = 4 * (units - low) * (high - units) / (high - low) ** 2
    return (slope < FLAT).sum().float()
