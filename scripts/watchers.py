"""Watchers of a Trainer that can be switched on and off in mid-run: ours, nobody, and others'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Switch = Callable[[], Any]
Watcher = Callable[[Any, Path], tuple[Switch, Switch]]  # Trainer and folder -> (on, off)


def ours(trainer: Any, folder: Path) -> tuple[Switch, Switch]:
    """`hf_recipe.attach` at its defaults."""
    import hf_recipe

    recipe = hf_recipe.attach(trainer)
    return recipe.resume, recipe.pause


def nothing(trainer: Any, folder: Path) -> tuple[Switch, Switch]:
    """A/A: both blocks with the recipe paused."""
    _, pause = ours(trainer, folder)
    pause()
    return pause, pause


def wandb_watch(trainer: Any, folder: Path) -> tuple[Switch, Switch]:
    """``wandb.watch(log="all")`` as HF's callback sets it: histograms every 100 passes."""
    import wandb

    run = wandb.init(mode="offline", dir=str(folder), project="overhead")

    def on() -> None:
        run.watch(trainer.model, log="all", log_freq=100)

    return on, lambda: run.unwatch(trainer.model)


def underflow_overflow(trainer: Any, folder: Path) -> tuple[Switch, Switch]:
    """HF's ``debug="underflow_overflow"``."""
    from transformers.debug_utils import DebugUnderflowOverflow

    before = {module: dict(module._forward_hooks) for module in trainer.model.modules()}

    def off() -> None:
        for module, hooks in before.items():
            module._forward_hooks.clear()
            module._forward_hooks.update(hooks)

    return lambda: DebugUnderflowOverflow(trainer.model), off


def torch_audit(trainer: Any, folder: Path) -> tuple[Switch, Switch]:
    """torch-audit's autopatch at its default, every 1,000th step."""
    from torch_audit import autopatch

    held: list[Any] = []

    def on() -> None:
        held.append(autopatch(trainer.model, optimizer=trainer.optimizer, reporters=[]))

    def off() -> None:
        while held:
            held.pop().unpatch()

    return on, off


def trainproof(trainer: Any, folder: Path) -> tuple[Switch, Switch]:
    """trainproof's callback at its defaults."""
    from trainproof.integrations import TrainproofCallback

    callback, callbacks = TrainproofCallback(), trainer.callback_handler.callbacks

    def off() -> None:
        if callback in callbacks:
            callbacks.remove(callback)

    return lambda: callbacks.append(callback), off


OTHERS: dict[str, tuple[str, Watcher]] = {
    'wandb.watch(log="all")': ("wandb", wandb_watch),
    'debug="underflow_overflow"': ("transformers", underflow_overflow),
    "torch-audit's autopatch": ("torch_audit", torch_audit),
    "trainproof's callback": ("trainproof", trainproof),
}
