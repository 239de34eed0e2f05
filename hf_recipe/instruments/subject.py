"""The subject: what a probe may look at, whether a Trainer is attached or a callback sits alone.

A probe gets one `Subject` and asks it for the model, the arguments, rows of data collated as the
Trainer would collate them, and the loss as the Trainer computes it. It never touches the
Trainer's dataloader.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hf_recipe.core.check import Skip
from hf_recipe.instruments.batches import Batch, Rows, stream_reason


@dataclass
class Plan:
    """The run as it is planned, in optimizer steps.

    Attributes:
        total_steps: optimizer steps of the whole run.
        steps_per_epoch: optimizer steps per pass over this data set.
        rows_per_step: rows that one optimizer step sees (all processes, all micro-batches).
        max_grad_norm: the clipping threshold; 0: none.
        parameters: trainable numbers; 0 where unknown.
        scale_free: whether the optimizer divides the gradient by its own size.
        epsilon: what it adds to that size; 0 where it has none.
    """

    total_steps: int
    steps_per_epoch: int
    rows_per_step: int
    max_grad_norm: float = 0.0
    parameters: int = 0
    scale_free: bool = True
    epsilon: float = 0.0


@dataclass
class Subject:
    """What a probe may look at.

    Attributes:
        model: the bare module, unwrapped.
        args: the TrainingArguments.
        train: rows of the training set; None where there is none.
        evaluation: rows of each evaluation set by name ("validation" where there is one only).
        trainer: the Trainer, or None when a callback sits alone.
        optimizer, scheduler: where they exist (at train begin, or borrowed by preflight).
        plan: the run's steps; None where they cannot be known.
        step: optimizer steps done so far.
        fresh: whether this is the first training of these weights: no step was taken, by this
            attempt or an earlier one, and nothing was resumed.
        first_inputs: the real inputs of the first training step, once they are there: what
            streams, packed and overridden dataloaders are probed on.
        compute_loss: (inputs, return_outputs) -> loss or (loss, outputs), as the Trainer would,
            without ``num_items_in_batch``: the mean over this batch.
    """

    model: nn.Module
    args: Any
    train: Rows | None
    evaluation: Mapping[str, Rows]
    trainer: Any = None
    processing_class: Any = None
    optimizer: Any = None
    scheduler: Any = None
    plan: Plan | None = None
    step: int = 0
    resumed: bool = False
    fresh: bool = True
    first_inputs: Mapping[str, Any] | None = None
    loss_function: Callable[..., Any] | None = None
    cache: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Any:
        """The model's config, or None for a bare module."""
        return getattr(self.model, "config", None)

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter lies."""
        for parameter in self.model.parameters():
            return parameter.device
        return torch.device("cpu")

    def rows(self, split: str) -> Rows:
        """The rows of "train" or of an evaluation set; raises Skip where there is none."""
        rows = self.train if split == "train" else self.evaluation.get(split)
        if rows is None:
            raise Skip(f"there is no {split} data set")
        return rows

    def batch(self, split: str = "train", *, size: int | None = None) -> Batch:
        """A batch of evenly spaced rows, collated as the Trainer would, on the model's device.

        Args:
            split: "train" or the name of an evaluation set.
            size: rows; default: the per-device train batch size.

        Raises:
            Skip: the data cannot be read without disturbing the run (streams, overridden
                dataloaders before the first step).
        """
        size = size or int(getattr(self.args, "per_device_train_batch_size", 8))
        if split == "train" and self.first_inputs is not None:
            return Batch.of_inputs(self.first_inputs, self.device)
        rows = self.rows(split)
        reason = stream_reason(rows) or self.overridden(split)
        if reason:
            raise Skip(reason)
        return rows.batch(rows.evenly_spaced(size)).to(self.device)

    def batches(self, split: str, *, rows: int, size: int | None = None) -> Iterator[Batch]:
        """Up to `rows` evenly spaced rows in batches of `size`, each made when it is asked for."""
        size = size or int(getattr(self.args, "per_device_train_batch_size", 8))
        if split == "train" and self.first_inputs is not None:
            return iter([Batch.of_inputs(self.first_inputs, self.device)])
        source = self.rows(split)
        reason = stream_reason(source) or self.overridden(split)
        if reason:
            raise Skip(reason)
        chosen = source.evenly_spaced(rows)
        parts = (chosen[i : i + size] for i in range(0, len(chosen), size))
        return (source.batch(part).to(self.device) for part in parts)

    def overridden(self, split: str) -> str | None:
        """Why own rows would not be what the Trainer feeds, or None where they are."""
        if self.trainer is None:
            return None
        name = "get_train_dataloader" if split == "train" else "get_eval_dataloader"
        from transformers import Trainer

        if inspect.getattr_static(type(self.trainer), name) is not inspect.getattr_static(
            Trainer, name
        ) or name in vars(self.trainer):
            return f"{name} is overridden, so its batches can only be seen while training"
        return None

    def compute_loss(self, inputs: Mapping[str, Any], *, outputs: bool = False) -> Any:
        """The loss of one batch as the Trainer computes it: a mean over this batch alone.

        ``num_items_in_batch`` is never passed, so that the value is neither divided by a count
        of other micro-batches nor multiplied by the number of processes. The model's mode and
        gradient recording are the caller's choice.

        Returns:
            The loss, or (loss, the model's outputs) with ``outputs=True``.
        """
        if self.loss_function is not None:
            return self.loss_function(self.model, dict(inputs), return_outputs=outputs)
        result = self.model(**inputs)
        loss = result["loss"] if isinstance(result, Mapping) else result[0]
        return (loss, result) if outputs else loss


def trainer_loss(trainer: Any) -> Callable[..., Any]:
    """`trainer.compute_loss` under its own autocast, for `Subject.loss_function`."""

    def loss(model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False) -> Any:
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(model, inputs, return_outputs=return_outputs)

    return loss
