"""Distil an encoder-decoder: a T5 that writes its input's digits backwards.

python examples/distil_seq2seq.py          # under a minute on a processor, nothing to download
"""

import argparse

import torch
from transformers import (
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_recipe import DistillationTrainer, DistillationTrainingArguments
from hf_recipe.tune.teacher_gain import fidelity

LENGTH, END = 4, 1


def t5(width: int) -> T5ForConditionalGeneration:
    """A small T5 over ten digits, padding (0) and end (1)."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=12,
            d_model=width,
            d_kv=width // 2,
            d_ff=2 * width,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )


def main() -> dict[str, float]:
    """Train the teacher, distil it; returns agreement and errors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", default="distil_seq2seq")
    parser.add_argument("--epochs", type=float, default=15)
    options = parser.parse_args()
    set_seed(0)
    end = torch.tensor([END])
    rows = []
    for digits in torch.randint(2, 12, (1200, LENGTH)):
        ids = torch.cat([digits, end])
        labels = torch.cat([digits.flip(0), end])
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    train, validation = rows[:1000], rows[1000:]
    common = {
        "output_dir": options.output_dir,
        "num_train_epochs": options.epochs,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 25,
        "save_strategy": "no",
        "report_to": "none",
    }
    teacher, student = t5(48), t5(24)
    Trainer(teacher, TrainingArguments(**common), train_dataset=train).train()
    trainer = DistillationTrainer(
        student,
        DistillationTrainingArguments(**common),
        teacher=teacher,
        train_dataset=train,
        eval_dataset=validation,
    )
    trainer.train()
    found, _ = fidelity(trainer)
    print(f"agreement {found.agreement:.3f}, student's error {found.student_error:.3f}")
    return {"agreement": found.agreement, "student_error": found.student_error}


if __name__ == "__main__":
    main()
