"""What a lone callback can hear: the model's own outputs, through one forward hook."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hf_recipe.instruments.record import Recorder
from hf_recipe.instruments.row_losses import row_losses
from hf_recipe.trainer.seams import EvaluationRecorder


class ModelHook:
    """Takes the loss out of every forward pass of the outermost module a callback sees.

    A loss that the Trainer computes outside of the model (label smoothing, ``compute_loss_func``,
    an override) is not heard; `hf_recipe.attach` hears it.
    """

    def __init__(self, recorder: Recorder, evaluation: EvaluationRecorder) -> None:
        self.recorder = recorder
        self.evaluation = evaluation
        self.loader: Any = None
        self._handle: Any = None

    def install(self, model: nn.Module) -> None:
        """Hook `model`; again is the same as once."""
        self.remove()
        self._handle = model.register_forward_hook(self._hear, with_kwargs=True)

    def remove(self) -> None:
        """Take the hook off."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def _hear(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], outputs: Any) -> None:
        if not self.recorder.active:
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if not isinstance(loss, torch.Tensor):
            return
        if module.training and torch.is_grad_enabled():
            self.recorder.add(loss.detach())
        elif not module.training:
            rows = None
            if self.evaluation.row_losses is not None:
                rows = row_losses(outputs, kwargs.get("labels"), float(loss))
            self.evaluation.add(loss.detach(), rows)
