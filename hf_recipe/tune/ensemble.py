"""The last step of the recipe: ensembles, and one model that stands in for them.

"Model ensembles are a pretty much guaranteed way to gain 2 % of accuracy on anything. If you
cannot afford the computation at test time, look into distilling your ensemble into a network"
(Karpathy 2019). An `Ensemble` is a module like its members, so a Trainer evaluates it and a
`DistillationTrainer` takes it as its teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from hf_recipe.tune import distillation_heads as heads
from hf_recipe.tune import distillation_models as models


class Ensemble(nn.Module):
    """Several models of one task as one: probabilities averaged (numbers, for regression).

    Args:
        members: models with the same outputs, all on one device.
        weights: their shares; default: equal.

    Raises:
        ValueError: no members, weights that do not fit, or members whose classes differ.
    """

    def __init__(self, members: Sequence[nn.Module], weights: Sequence[float] | None = None):
        super().__init__()
        if not members:
            raise ValueError("an ensemble needs members")
        if weights is not None and (len(weights) != len(members) or min(weights) < 0):
            raise ValueError(f"{len(members)} members need as many weights >= 0; got {weights}")
        sizes = {int(getattr(m.config, "num_labels", 0)) for m in members}
        if len(sizes) > 1:
            raise ValueError(f"the members differ in their number of labels: {sorted(sizes)}")
        self.members = nn.ModuleList(members)
        self.weights = list(weights) if weights is not None else None
        self.config = members[0].config
        # A Trainer drops the columns that `forward` does not name: it names what members take.
        models.name_inputs(self, set().union(*map(models.forward_names, members)))

    def forward(self, labels: torch.Tensor | None = None, **inputs: Any) -> ModelOutput:
        """The averaged logits by name; ``loss`` is the members' mean where labels are given."""
        known = {n: v for n, v in (*inputs.items(), ("labels", labels)) if v is not None}
        outputs = [member(**models.accepted(member, known)) for member in self.members]
        task = heads.task_of(self.members[0], known)
        merged = heads.merged(
            task.kind, [heads.logits_of(o, task.kind) for o in outputs], self.weights
        )
        if labels is not None and outputs[0].get("loss") is not None:
            merged = {"loss": torch.stack([o["loss"] for o in outputs]).mean(), **merged}
        return ModelOutput(merged)
