"""One way to train in the main job: everything that an experiment may change."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from hf_recipe.instruments.compare import Variant

# Where a fresh network begins, by the ladder that it stands on; and a checkpoint.
RATES = {
    **{"image": 2e-3, "text": 5e-4, "numbers": 3e-3, "causal": 2e-3, "seq2seq": 2e-3},
    **{"segmentation": 3e-3, "pretrained": 3e-5},
}
EPOCHS = {
    **{"image": 16.0, "text": 8.0, "numbers": 30.0, "causal": 8.0, "seq2seq": 8.0},
    **{"segmentation": 20.0, "pretrained": 3.0},
}


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
    augment: bool = False
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
