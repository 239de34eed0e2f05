"""Do the modules train in training mode?

The Trainer puts the model into training mode at every step; an override of `train()`, or an
`eval()` of a part, undoes it: no dropout from then on, frozen BatchNorm statistics, and no error.
The modes are read while a forward of the step runs, so that nothing in between can mislead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_recipe.core.check import Check, Measurement, Probe
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.subject import Subject

NAMED = 4


@dataclass(frozen=True)
class TrainingModes(Measurement):
    """Modules found in evaluation mode during a training step's forward.

    A module counts once, without what it holds. Frozen ones (parameters, none of which trains)
    are left out: they may well be evaluated.

    Attributes:
        step: the optimizer step, from 1.
        modules: of the whole model.
        affected: names of the others whose mode makes a difference (dropout, BatchNorm inside).
        unaffected: how many there are without.
        norms: names of BatchNorm layers that sit in evaluation mode by themselves.
    """

    step: int
    modules: int
    affected: tuple[str, ...]
    unaffected: int
    norms: tuple[str, ...]


@dataclass
class ModeWatch:
    """Reads the modes in the forwards of the steps that are `due`; costs nothing in others."""

    due: tuple[int, ...] = (1, 3)
    seen: TrainingModes | None = None
    _done: set[int] = field(default_factory=set)
    _model: nn.Module | None = None

    def wanted(self, step: int) -> bool:
        """Whether the micro-batch now coming is to be watched."""
        return step in self.due and step not in self._done

    @contextmanager
    def watching(self, model: nn.Module, bare: nn.Module, step: int) -> Iterator[None]:
        """Note the modes in every forward with gradients inside; the mildest one counts.

        Args:
            model: what the Trainer calls (perhaps wrapped).
            bare: whose modules are named.
            step: the optimizer step, from 1.
        """
        self._done.add(step)
        self._model = bare
        found: list[TrainingModes] = []

        def note(module: nn.Module, inputs: Any) -> None:
            if torch.is_grad_enabled():
                found.append(measure_modes(bare, step))

        handle = model.register_forward_pre_hook(note)
        try:
            yield
        finally:
            handle.remove()
        if found:
            self.seen = min(found, key=lambda modes: len(modes.affected))

    def take(self) -> TrainingModes | None:
        """What was seen since the last call; asked while the step's gradients are still there.

        A part that got no gradient does not train (a teacher that is run without recording).
        """
        seen, self.seen = self.seen, None
        if seen is None or self._model is None or not seen.affected:
            return seen
        parts = dict(self._model.named_modules())
        return replace(seen, affected=tuple(n for n in seen.affected if _trained(parts.get(n))))


def _trained(module: nn.Module | None) -> bool:
    """Whether any parameter has a gradient; a part without parameters counts as trained."""
    parameters = list(module.parameters()) if module is not None else []
    return not parameters or any(p.grad is not None for p in parameters)


def measure_modes(model: nn.Module, step: int) -> TrainingModes:
    """The outermost modules of `model` that are in evaluation mode now."""
    affected: list[str] = []
    norms: list[str] = []
    unaffected = 0
    rates = _config_rates(model)
    for name, module in _outermost_evaluating("", model):
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            continue
        if isinstance(module, _BatchNorm):
            norms.append(name)
        elif _matters(module, rates):
            affected.append(name or type(module).__name__)
        else:
            unaffected += 1
    count = sum(1 for _ in model.modules())
    return TrainingModes(step, count, tuple(affected[:50]), unaffected, tuple(norms[:50]))


def _outermost_evaluating(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if not module.training:
        yield name, module
        return
    for inner, child in module.named_children():
        yield from _outermost_evaluating(f"{name}.{inner}" if name else inner, child)


def _config_rates(model: nn.Module) -> bool:
    """Whether the config has a dropout rate that a forward may apply as a function."""
    config: Any = getattr(model, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    return any(
        isinstance(value, float) and value > 0
        for name, value in values.items()
        if "dropout" in name or "pdrop" in name
    )


def _matters(module: nn.Module, rates: bool) -> bool:
    """Whether training mode would change what the module computes."""
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            return True
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
            return True
    return rates and any(True for _ in module.parameters())


def trains_in_eval_mode(modes: TrainingModes) -> Iterator[Fault]:
    """Modules that train in evaluation mode; BatchNorm kept there on purpose is a note."""
    if modes.affected:
        more = len(modes.affected) - NAMED
        names = ", ".join(modes.affected[:NAMED]) + (f" and {more} more" if more > 0 else "")
        yield Fault(
            f"in the forward of training step {modes.step} these were in evaluation mode: {names}; "
            "their dropout is off and their BatchNorm statistics stand still",
            subject=modes.affected[0],
            evidence={"seen": "evaluation mode", "expected": "training mode", "step": modes.step},
        )
    elif modes.norms:
        yield Fault(
            f"{len(modes.norms)} BatchNorm layers stay in evaluation mode while their weights "
            f"train: their statistics stand still (first {modes.norms[0]})",
            subject=modes.norms[0],
            severity="note",
            evidence={"seen": f"{len(modes.norms)} in evaluation mode", "expected": "0, or meant"},
        )


def take_modes(subject: Subject) -> Iterator[TrainingModes]:
    """The modes now; right inside a training step's forward."""
    yield measure_modes(subject.model, subject.step + 1)


MODES = Probe("read the modules' modes", "run", (TrainingModes,), take_modes)

TRAINS_IN_EVAL_MODE = Check(
    name="trains-in-eval-mode",
    stage="baselines",
    severity="error",
    moments=("run",),
    why="In evaluation mode dropout does nothing and BatchNorm's statistics stand still: the model "
    "overfits, and evaluates with statistics of other data.",
    fix="model.train()  # in training_step; and no override of train() that leaves parts out",
    source="Megatron-LM issue 411 (2023)",
    unsure="A part kept in evaluation mode on purpose while it trains, other than BatchNorm.",
    judges=(trains_in_eval_mode,),
    explains=("overfitting",),
)
