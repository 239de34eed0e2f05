"""Distil an encoder-decoder: a T5 that writes its input's digits backwards.

python examples/distil_seq2seq.py          # under a minute on a processor, nothing to download
"""

import torch
from common import arguments, asked, trained
from transformers import T5Config, T5ForConditionalGeneration

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


def main() -> None:
    """Train the teacher, distil it, say what has arrived."""
    options = asked("distil_seq2seq", __doc__, epochs=15)
    end = torch.tensor([END])
    rows = []
    for digits in torch.randint(2, 12, (1200, LENGTH)):
        ids = torch.cat([digits, end])
        labels = torch.cat([digits.flip(0), end])
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    train, validation = rows[:1000], rows[1000:]
    given = arguments(options, rate=3e-3, batch=25)
    teacher, student = trained(t5(48), given, train), t5(24)
    trainer = DistillationTrainer(
        student,
        DistillationTrainingArguments(**given),
        teacher=teacher,
        train_dataset=train,
        eval_dataset=validation,
    )
    trainer.train()
    found, _ = fidelity(trainer)
    print(f"agreement {found.agreement:.3f}, student's error {found.student_error:.3f}")


if __name__ == "__main__":
    main()
