"""The output layer: which one it is, and what the same layer would say, drawn anew.

Some families start far above log V by design (T5 does not scale its head down), so a fresh head
is compared with what the model's own initialisation draws, not with a formula.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_recipe.instruments.heads import bare

FLAG = "_is_hf_initialized"  # transformers: leave this tensor or module as it is
LARGE = 1 << 28  # parameters; a second model of this size is not made


@dataclass
class OutputLayer:
    """The layer whose output is the logits.

    Attributes:
        name: its dotted name in the model.
        module: the layer; has a ``weight`` and perhaps a ``bias``.
        tied: whether its weight is also the input embedding.
    """

    name: str
    module: nn.Module
    tied: bool

    @property
    def weight(self) -> torch.Tensor:
        """The layer's weight."""
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias, or None where the layer was built without one."""
        bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, torch.Tensor) else None


class Watch:
    """Records, during one forward, what the model returned and every layer that may be last."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.outputs: Any = None
        self._made: list[tuple[str, nn.Module, torch.Tensor, torch.Tensor]] = []

    @contextmanager
    def watching(self, layers: bool = True) -> Iterator[Watch]:
        """Hooks are there inside, gone after."""
        handles = [self.model.register_forward_hook(self._keep)]
        if layers:
            for name, module in self.model.named_modules():
                if _is_layer(module):
                    handles.append(module.register_forward_hook(self._note(name)))
        self._made.clear()
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        self.outputs = outputs

    def _note(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if inputs and isinstance(inputs[0], torch.Tensor) and isinstance(output, torch.Tensor):
                self._made = self._made[-7:]  # the last layers are enough
                self._made.append((name, module, inputs[0].detach(), output.detach()))

        return hook

    def output_layer(self, raw: torch.Tensor) -> tuple[OutputLayer, torch.Tensor] | None:
        """The layer whose output is `raw`, up to its shape, and its input; None where none is."""
        found = None
        for name, module, hidden, output in reversed(self._made):
            picked = _same(output, raw, hidden)
            if picked is not None:
                found = OutputLayer(name, module, self._is_tied(module)), picked
                break
        self._made.clear()
        return found

    def _is_tied(self, layer: nn.Module) -> bool:
        return any(
            module is not layer and getattr(module, "weight", None) is layer.weight
            for module in self.model.modules()
        )


def _same(output: torch.Tensor, raw: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor | None:
    """The part of `hidden` that made `raw`, if `output` is `raw`, or `raw` one position of it."""
    if output.numel() == raw.numel():
        equal = torch.equal(output.reshape(-1).float(), raw.reshape(-1).float())
        return hidden if equal else None
    if output.ndim == 3 and raw.ndim == 2 and output[:, 0].shape == raw.shape:
        # A decoder's classifier scores every position and keeps each row's last.
        equals = (output.float() == raw[:, None].float()).all(-1)
        if bool(equals.any(1).all()):
            rows = torch.arange(len(raw), device=raw.device)
            return hidden[rows, equals.float().argmax(1)]
    return None


def _is_layer(module: nn.Module) -> bool:
    """Linear, convolution and their kin: an own matrix, no table of embeddings, no wrapper."""
    weight = module._parameters.get("weight")
    if weight is None or isinstance(module, nn.Embedding):
        return False
    return weight.ndim >= 2 and weight.is_floating_point()


@contextmanager
def kept(*parameters: torch.Tensor) -> Iterator[None]:
    """Put the values of `parameters` back on exit."""
    values = [p.detach().clone() for p in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)


def redrawn_layers(model: nn.Module, layer: OutputLayer, draws: int) -> Iterator[nn.Module]:
    """The output layer, drawn anew `draws` times in place; its own values are back after each.

    Random numbers are drawn: call it inside the quiet guard. Yields nothing where the model does
    not say how the layer is drawn.
    """
    fresh = _Drawer(bare(model), layer)
    with torch.no_grad():
        for _ in range(draws):
            with kept(*fresh.touched):
                if not fresh.draw():
                    return
                yield layer.module


class _Drawer:
    """Initialises one layer in place, as its model would have."""

    def __init__(self, model: nn.Module, layer: OutputLayer) -> None:
        self.model, self.layer = model, layer.module
        names = {id(module): name for name, module in model.named_modules()}
        path = names.get(id(layer.module))
        self.chain: list[nn.Module] = [layer.module]
        if path is not None:
            parts = path.split(".")
            above = [".".join(parts[:i]) for i in range(len(parts))]
            # A family may draw its head from the class above it (T5 does). Its `init` functions
            # leave flagged tensors alone; code from elsewhere may not, so it is not called.
            self.chain += [
                m
                for m in (model.get_submodule(p) for p in reversed(above))
                if type(m).__module__.startswith("transformers.")
            ]
        self.touched = list(  # the layer's own weight first
            {id(p): p for m in self.chain for p in m.parameters(recurse=False)}.values()
        )

    def draw(self) -> bool:
        before = [p.detach().clone() for p in self.touched]
        initialise = getattr(self.model, "_init_weights", None)
        if callable(initialise):
            own = {id(p) for p in self.layer.parameters(recurse=False)}
            with _flagged(self.model, own):
                for module in self.chain:
                    initialise(module)
        if torch.equal(before[0], self.touched[0]):
            reset = getattr(self.layer, "reset_parameters", None)
            if not callable(reset):
                return False
            reset()
        return True


@contextmanager
def _flagged(model: nn.Module, free: set[int]) -> Iterator[None]:
    """Every tensor but those in `free` counts as initialised, inside."""
    tensors = [*model.parameters(), *model.buffers()]
    before = [(t, vars(t).get(FLAG)) for t in tensors]
    for tensor in tensors:
        setattr(tensor, FLAG, id(tensor) not in free)
    try:
        yield
    finally:
        for tensor, flag in before:
            if flag is None:
                delattr(tensor, FLAG)
            else:
                setattr(tensor, FLAG, flag)


def redrawn_model(model: nn.Module) -> nn.Module | None:
    """A copy of the model with every weight drawn anew; None where it is too large for a copy."""
    model = bare(model)
    if sum(p.numel() for p in model.parameters()) > LARGE:
        return None
    fresh = copy.deepcopy(model)
    for tensor in (*fresh.parameters(), *fresh.buffers()):
        setattr(tensor, FLAG, False)
    with torch.no_grad():
        for module in fresh.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        initialise = getattr(fresh, "_init_weights", None)
        if callable(initialise):
            fresh.apply(initialise)  # children first: what a parent draws stands
    return fresh
