"""One way to train in the main job: everything that an experiment may change."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import SchedulerType

from hf_recipe.instruments.compare import Variant

if TYPE_CHECKING:
    from hf_recipe.runner.options import Options

# Where a fresh network begins, by the ladder that it stands on; and a checkpoint.
RATES = {
    **{"image": 2e-3, "text": 5e-4, "numbers": 3e-3, "causal": 2e-3, "seq2seq": 2e-3},
    **{"segmentation": 3e-3, "pretrained": 3e-5},
}
EPOCHS = {
    **{"image": 16.0, "text": 8.0, "numbers": 30.0, "causal": 8.0, "seq2seq": 8.0},
    **{"segmentation": 20.0, "pretrained": 3.0},
}
# Of fewer rows a fresh network sees each the more often, by the root of it: half the rows get 0.7
# of the steps. Else few rows mean few steps, and what slows learning looks as if it did not help.
FEW_ROWS = 1000


@dataclass(frozen=True)
class Setup:
    """Everything that an experiment may change. `change` gives a new one.

    Attributes:
        model: "simplest", "student", "base" or "large".
        epochs: passes over `part`.
        schedule: a name of transformers' schedules.
        warmup: share of the steps.
        part: which rows to learn from: "train" or "train+validation".
        teacher: folders of saved models to learn from (`runner.distil.together`); "" for none.
        augment: strength of the augmentation; 0: none, 1: the feed's own.
        keep: whether the weights are saved.
        share: of the input that is used: of a picture's side, a text's length, the columns.
        clip: where gradients are clipped; 0: as the user's flags say.
        rows: how many rows of `part` to learn from, all classes alike; 0: all.
        without: numbers of the columns that are hidden, as "0,3".
        depth: rate at which the deepest residual path is dropped.
        batch: share of the batch's usual size.
        simulated: share of made-up rows in the training set.
        average: whether the model ends with averaged weights.
    """

    model: str
    learning_rate: float
    epochs: float
    schedule: str = "linear"
    warmup: float = 0.05
    weight_decay: float = 0.0
    dropout: float = 0.0
    label_smoothing: float = 0.0
    augment: float = 0.0
    early_stopping: bool = False
    part: str = "train"
    teacher: str = ""
    keep: bool = False
    share: float = 1.0
    clip: float = 0.0
    rows: int = 0
    without: str = ""
    depth: float = 0.0
    batch: float = 1.0
    simulated: float = 0.0
    average: bool = False

    def change(self, **changes: Any) -> Setup:
        return replace(self, **changes)

    def variant(self, change: str, seed: int = 0) -> Variant:
        return Variant(change, asdict(self), seed)


def beginning(options: Options, ladder: str, patience: float, rows: int) -> Setup:
    """Where the recipe begins: the user's flags, or defaults that suit the input.

    Args:
        ladder: of networks that the task's come from.
        patience: how many times the epochs of its ladder the task is given.
        rows: training rows.
    """
    args, given = options.training, options.given
    pretrained = options.model.model_name_or_path is not None
    kind = "pretrained" if pretrained else ladder
    decays = "lr_scheduler_type" in given
    usual = RATES[kind] if decays else RATES[kind] / 2  # what a line to zero is in the mean
    rate = args.learning_rate if "learning_rate" in given else usual
    long = EPOCHS[kind]
    if not pretrained:
        long *= patience * math.sqrt(FEW_ROWS / min(rows, FEW_ROWS))
    epochs = args.num_train_epochs if "num_train_epochs" in given else long
    return Setup(
        "base",
        float(rate),
        float(epochs),
        # decay is tuned at the very end
        schedule=str(SchedulerType(args.lr_scheduler_type).value) if decays else "constant",
        weight_decay=float(args.weight_decay),
        dropout=float(options.model.dropout),
        label_smoothing=float(args.label_smoothing_factor),
    )
