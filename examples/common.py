"""What the examples share: their two flags, the Trainer's arguments, a trained teacher."""

import argparse
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments, set_seed


def asked(name: str, description: str, epochs: float) -> argparse.Namespace:
    """``--output_dir`` and ``--epochs``; the seed is set, so that every run is the same."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output_dir", default=name)
    parser.add_argument("--epochs", type=float, default=epochs)
    set_seed(0)
    return parser.parse_args()


def arguments(options: argparse.Namespace, rate: float, batch: int) -> dict[str, Any]:
    """Arguments of a short run, for teacher and student alike."""
    return {
        "output_dir": options.output_dir,
        "num_train_epochs": options.epochs,
        "learning_rate": rate,
        "per_device_train_batch_size": batch,
        "save_strategy": "no",
        "report_to": "none",
    }


def trained(teacher: nn.Module, given: dict[str, Any], rows: Any, collate: Any = None) -> nn.Module:
    """The teacher, after its own training."""
    Trainer(teacher, TrainingArguments(**given), collate, train_dataset=rows).train()
    return teacher
