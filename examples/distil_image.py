"""Distil an image classifier: a ViT on the digits into one of half its width.

    python examples/distil_image.py            # under a minute on a processor, nothing to download

A tenth of the student's rows keep their labels; the rest (-100) are taught by the teacher alone.
"""

import argparse
import copy

import torch
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from hf_recipe import DistillationTrainer, DistillationTrainingArguments
from hf_recipe.tune.teacher_gain import class_table, fidelity


def vit(width: int) -> ViTForImageClassification:
    """A small ViT over 8 x 8 pixels."""
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=2 * width,
            image_size=8,
            patch_size=4,
            num_channels=1,
            num_labels=10,
            hidden_dropout_prob=0.0,
        )
    )


def main() -> dict[str, float]:
    """Train the teacher, distil it; returns agreement and errors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", default="distil_image")
    parser.add_argument("--epochs", type=float, default=12)
    options = parser.parse_args()
    set_seed(0)
    data = load_digits()
    pixels = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
    order = torch.randperm(len(pixels)).tolist()
    rows = [{"pixel_values": pixels[i], "labels": int(data.target[i])} for i in order]
    train, validation = rows[:1437], rows[1437:]
    few = [r if i % 10 == 0 else {**r, "labels": -100} for i, r in enumerate(train)]
    common = {
        "output_dir": options.output_dir,
        "num_train_epochs": options.epochs,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 32,
        "save_strategy": "no",
        "report_to": "none",
    }
    teacher, student = vit(48), vit(24)
    Trainer(teacher, TrainingArguments(**common), train_dataset=train).train()
    trainer = DistillationTrainer(
        student,
        DistillationTrainingArguments(**common, alpha=0.9, distill_temperature=4.0),
        teacher=copy.deepcopy(teacher),
        train_dataset=few,
        eval_dataset=validation,
    )
    trainer.train()
    found, _ = fidelity(trainer)
    for row in class_table(found).rows[:3]:
        print("class {}: {} rows, teacher {:.3f}, student {:.3f} nats".format(*row[:4]))
    print(f"agreement {found.agreement:.3f}, {found.parameters_ratio:.1f} x smaller")
    return {"agreement": found.agreement, "student_error": found.student_error}


if __name__ == "__main__":
    main()
