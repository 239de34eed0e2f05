"""The student's Trainer: the same as any other, and a teacher beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_recipe.runner.models import load_saved
from hf_recipe.tune.distillation import DistillationTrainer, DistillationTrainingArguments

ALPHA, TEMPERATURE = 0.5, 2.0


def distillation_trainer(teacher: str, common: Mapping[str, Any]) -> DistillationTrainer:
    """A DistillationTrainer with the model saved in folder `teacher`.

    Args:
        teacher: folder of a saved model of the same task.
        common: the arguments of a Trainer.
    """
    args = DistillationTrainingArguments.of(common["args"])
    args.alpha, args.distill_temperature = ALPHA, TEMPERATURE
    return DistillationTrainer(**{**common, "args": args}, teacher=load_saved(teacher))
