"""The student's Trainer: the same as any other, and a teacher beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from hf_recipe.instruments.compare import Outcome
from hf_recipe.runner.models import load_saved
from hf_recipe.runner.setup import Setup
from hf_recipe.tune.distillation import DistillationTrainer, DistillationTrainingArguments
from hf_recipe.tune.ensemble import Ensemble
from hf_recipe.tune.teacher_gain import fidelity

ALPHA, TEMPERATURE = 0.5, 2.0


def together(folders: Sequence[str | Path]) -> str:
    """Folders of saved models as one `Setup.teacher`."""
    return os.pathsep.join(map(str, folders))


def load_together(teacher: str) -> nn.Module:
    """The model that `together` named, or the ensemble of several."""
    members = [load_saved(folder) for folder in teacher.split(os.pathsep)]
    return members[0] if len(members) == 1 else Ensemble(members)


def distillation_trainer(teacher: str, common: Mapping[str, Any]) -> DistillationTrainer:
    """A DistillationTrainer with the models saved in the folders of `teacher`.

    Args:
        teacher: from `together`: folders of saved models of the same task.
        common: the arguments of a Trainer.
    """
    args = DistillationTrainingArguments.of(common["args"])
    args.alpha, args.distill_temperature = ALPHA, TEMPERATURE
    return DistillationTrainer(**{**common, "args": args}, teacher=load_together(teacher))


def with_fidelity(outcome: Outcome, trainer: Any, setup: Setup) -> Outcome:
    """An outcome with what has arrived of the teacher, if validation rows were not learned from."""
    if not setup.teacher or setup.part != "train":
        return outcome
    arrived = fidelity(trainer)[0].values()
    return replace(outcome, facts={**outcome.facts, "fidelity": arrived})
