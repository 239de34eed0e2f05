"""A real training run, told to a monitor as the recorder would."""

from __future__ import annotations

import torch
from torch.nn import functional
from transformers import PrinterCallback

from hf_recipe.instruments.window import Evaluation, Step, Window


def told(trainer, monitor, seen, plan):
    """Train, and fold every step, a final evaluation and the end into `monitor`."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    logs = [r for r in trainer.state.log_history if "loss" in r]
    steps = [Step(r["step"], r["loss"], r["learning_rate"]) for r in logs]
    state, found = {}, []
    for start in range(0, len(steps), 20):
        state, made = monitor.fold(state, Window(tuple(steps[start : start + 20]), plan=plan), seen)
        found.append(made)
    if trainer.eval_dataset is not None:
        evaluation = Evaluation(len(steps), "validation", tuple(row_losses(trainer)))
        state, made = monitor.fold(state, Window(evaluation=evaluation, plan=plan), seen)
        found.append(made)
    state, made = monitor.fold(state, Window(plan=plan, ended=True), seen)
    return [m for m in [*found, made] if m is not None]


def row_losses(trainer):
    output = trainer.predict(trainer.eval_dataset)
    z, y = torch.as_tensor(output.predictions), torch.as_tensor(output.label_ids)
    if y.is_floating_point():
        return (z.reshape(y.shape) - y).square().tolist()
    return functional.cross_entropy(z, y, reduction="none").tolist()
