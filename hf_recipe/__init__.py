"""The recipe for training neural networks, made executable for Hugging Face's Trainer.

    recipe = hf_recipe.attach(trainer)
    trainer.train()

Importing this imports no torch; each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_recipe.baselines.equivalence import assert_equivalent as assert_equivalent
    from hf_recipe.baselines.initial_loss import expected_initial_loss as expected_initial_loss
    from hf_recipe.baselines.output_bias import set_output_bias as set_output_bias
    from hf_recipe.baselines.seed import seed_everything as seed_everything
    from hf_recipe.catalogue import CHECKS as CHECKS
    from hf_recipe.complexify.growth import GrowInput as GrowInput
    from hf_recipe.core.report import Report as Report
    from hf_recipe.data.resplit import group_split as group_split
    from hf_recipe.explanation import explain as explain
    from hf_recipe.inspection import inspect_dataset as inspect_dataset
    from hf_recipe.regularize.augment import Augmentation as Augmentation
    from hf_recipe.regularize.averaging import WeightAveraging as WeightAveraging
    from hf_recipe.regularize.averaging import average_weights as average_weights
    from hf_recipe.regularize.best_checkpoints import BestCheckpoints as BestCheckpoints
    from hf_recipe.regularize.dropout import set_dropout as set_dropout
    from hf_recipe.regularize.early_stopping import EarlyStopping as EarlyStopping
    from hf_recipe.regularize.simulate import Simulated as Simulated
    from hf_recipe.regularize.transfer import GradualUnfreezing as GradualUnfreezing
    from hf_recipe.regularize.transfer import layerwise_rates as layerwise_rates
    from hf_recipe.regularize.weight_decay import decay_groups as decay_groups
    from hf_recipe.trainer.attach import attach as attach
    from hf_recipe.trainer.border import RecipeError as RecipeError
    from hf_recipe.trainer.callback import HockeyStickCallback as HockeyStickCallback
    from hf_recipe.trainer.callback import InitialLossCallback as InitialLossCallback
    from hf_recipe.trainer.callback import LRDecayCallback as LRDecayCallback
    from hf_recipe.trainer.callback import RecipeCallback as RecipeCallback
    from hf_recipe.trainer.human import compare_with_human as compare_with_human
    from hf_recipe.tune.distillation import DistillationTrainer as DistillationTrainer
    from hf_recipe.tune.distillation_arguments import (
        DistillationTrainingArguments as DistillationTrainingArguments,
    )

__version__ = "0.1.0"

_HOMES = {
    "Augmentation": "hf_recipe.regularize.augment",
    "WeightAveraging": "hf_recipe.regularize.averaging",
    "average_weights": "hf_recipe.regularize.averaging",
    "set_dropout": "hf_recipe.regularize.dropout",
    "Simulated": "hf_recipe.regularize.simulate",
    "GradualUnfreezing": "hf_recipe.regularize.transfer",
    "layerwise_rates": "hf_recipe.regularize.transfer",
    "decay_groups": "hf_recipe.regularize.weight_decay",
    "CHECKS": "hf_recipe.catalogue",
    "DistillationTrainer": "hf_recipe.tune.distillation",
    "DistillationTrainingArguments": "hf_recipe.tune.distillation_arguments",
    "BestCheckpoints": "hf_recipe.regularize.best_checkpoints",
    "EarlyStopping": "hf_recipe.regularize.early_stopping",
    "GrowInput": "hf_recipe.complexify.growth",
    "HockeyStickCallback": "hf_recipe.trainer.callback",
    "InitialLossCallback": "hf_recipe.trainer.callback",
    "LRDecayCallback": "hf_recipe.trainer.callback",
    "RecipeCallback": "hf_recipe.trainer.callback",
    "RecipeError": "hf_recipe.trainer.border",
    "Report": "hf_recipe.core.report",
    "assert_equivalent": "hf_recipe.baselines.equivalence",
    "attach": "hf_recipe.trainer.attach",
    "compare_with_human": "hf_recipe.trainer.human",
    "explain": "hf_recipe.explanation",
    "expected_initial_loss": "hf_recipe.baselines.initial_loss",
    "group_split": "hf_recipe.data.resplit",
    "inspect_dataset": "hf_recipe.inspection",
    "seed_everything": "hf_recipe.baselines.seed",
    "set_output_bias": "hf_recipe.baselines.output_bias",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'hf_recipe' has no attribute {name!r}")
    drawn = random.getstate()
    try:
        return getattr(importlib.import_module(home), name)
    finally:
        random.setstate(drawn)  # rich draws numbers when it is imported: they are the run's


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
