"""The quiet guard: whatever a probe does inside it, the run that follows is bit-identical.

What a forward or backward pass leaves behind is saved on entry and put back on exit: the random
state of Python, numpy, torch on the CPU and on every accelerator; the mode of every module; every
buffer's value (BatchNorm's statistics); which parameters ask for gradients; the gradients
themselves, as references, so that the guard also works in the middle of an accumulation;
Accelerate's GradientState; hooks; and the plain Python attributes of modules and of the Trainer
(step counters, metrics). Compiled models run as they were written, so that a probe's shapes do not
fill the compiler's cache. Objects of other kinds that a forward pass changes are not known of.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_recipe.instruments.attributes import remembered
from hf_recipe.instruments.held_modules import held_modules


@contextmanager
def quiet(*models: nn.Module | None, trainer: Any = None) -> Iterator[None]:
    """Leave no trace in `models`, in any random generator, or in the Trainer's counters.

    Inside, gradients are None and stay apart from those of the run.

    Args:
        models: modules that may be run inside; wrapped and unwrapped forms may both be given.
        trainer: if given, its ``current_flos`` and its accelerator's GradientState are kept, and
            the modules that it holds besides its model (teachers, reference models, losses with
            parameters) are left as they were, too.
    """
    modules = _with_parts([m for m in models if m is not None] + held_modules(trainer))
    parameters = {id(p): p for m in modules for p in m._parameters.values() if p is not None}
    modes = [(module, module.training) for module in modules]
    buffer_names = [(m, name, buffer) for m in modules for name, buffer in m._buffers.items()]
    buffers = {id(buffer): buffer for _, _, buffer in buffer_names if buffer is not None}
    kept_buffers = [(buffer, buffer.detach().clone()) for buffer in buffers.values()]
    gradients = [(p, p.requires_grad, p.grad) for p in parameters.values()]
    grad_enabled = torch.is_grad_enabled()
    flos = getattr(trainer, "current_flos", None)
    gradient_state = _gradient_state(trainer)
    generators = save_random_state()
    put_back = remembered([*modules, *([trainer] if trainer is not None else [])])
    for parameter, _, _ in gradients:
        parameter.grad = None
    try:
        with torch.enable_grad(), _as_written():
            yield
    finally:
        torch.set_grad_enabled(grad_enabled)
        for parameter, requires_grad, gradient in gradients:
            parameter.grad = None
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        with torch.no_grad():
            for module, name, buffer in buffer_names:
                if module._buffers.get(name) is not buffer:  # replaced instead of written to
                    module._buffers[name] = buffer
            for buffer, value in kept_buffers:
                buffer.copy_(value)
        for module, training in modes:
            if module.training != training:
                module.training = training
        put_back()
        if flos is not None:
            trainer.current_flos = flos
        if gradient_state is not None:
            state, sync, references = gradient_state
            state._set_sync_gradients(sync)
            state.dataloader_references = references
        restore_random_state(generators)


def _with_parts(roots: list[nn.Module]) -> list[nn.Module]:
    """These modules and all below them, each once (`Module.modules` takes ten times as long)."""
    found: dict[int, nn.Module] = {}
    queue: list[nn.Module | None] = list(roots)
    while queue:
        module = queue.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            queue += module._modules.values()
    return list(found.values())


def _as_written() -> AbstractContextManager[Any]:
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes a second
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def save_random_state() -> dict[str, Any]:
    """The state of every random generator that training may draw from."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    xpu = getattr(torch, "xpu", None)
    if xpu is not None and xpu.is_available():
        state["xpu"] = xpu.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Put back what `save_random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
    if "mps" in state:
        torch.mps.set_rng_state(state["mps"])
    if "xpu" in state:
        torch.xpu.set_rng_state_all(state["xpu"])


def _gradient_state(trainer: Any) -> tuple[Any, bool, list[Any]] | None:
    accelerator = getattr(trainer, "accelerator", None)
    if accelerator is None:
        return None
    state = accelerator.gradient_state
    return state, state.sync_gradients, state.dataloader_references
