"""Distil an image classifier: a ViT on the digits into one of half its width.

    python examples/distil_image.py            # under a minute on a processor, nothing to download

A tenth of the student's rows keep their labels; the rest (-100) are taught by the teacher alone.
"""

import torch
from common import arguments, asked, trained
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification

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


def main() -> None:
    """Train the teacher, distil it, say what has arrived."""
    options = asked("distil_image", __doc__, epochs=12)
    data = load_digits()
    pixels = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
    order = torch.randperm(len(pixels)).tolist()
    rows = [{"pixel_values": pixels[i], "labels": int(data.target[i])} for i in order]
    train, validation = rows[:1437], rows[1437:]
    few = [r if i % 10 == 0 else {**r, "labels": -100} for i, r in enumerate(train)]
    given = arguments(options, rate=3e-3, batch=32)
    teacher, student = trained(vit(48), given, train), vit(24)
    trainer = DistillationTrainer(
        student,
        DistillationTrainingArguments(**given, alpha=0.9, distill_temperature=4.0),
        teacher=teacher,
        train_dataset=few,
        eval_dataset=validation,
    )
    trainer.train()
    found, _ = fidelity(trainer)
    for row in class_table(found).rows[:3]:
        print("class {}: {} rows, teacher {:.3f}, student {:.3f} nats".format(*row[:4]))
    print(f"agreement {found.agreement:.3f}, {found.parameters_ratio:.1f} x smaller")


if __name__ == "__main__":
    main()
