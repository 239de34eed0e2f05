"""Distil a language model, its teacher asked once: a byte-level Llama on the Zen of Python.

    python examples/distil_causal_lm.py        # under a minute on a processor, nothing to download

The student sees the data set's own rows (off-policy). To let it learn on text that it writes
itself, take TRL's class of the same name: ``from trl import DistillationTrainer``.
"""

import codecs
import contextlib
import io

import torch
from common import arguments, asked, trained
from transformers import LlamaConfig, LlamaForCausalLM, default_data_collator

from hf_recipe import DistillationTrainer, DistillationTrainingArguments
from hf_recipe.tune.teacher_cache import cache_teacher
from hf_recipe.tune.teacher_gain import fidelity

with contextlib.redirect_stdout(io.StringIO()):
    import this

LENGTH = 32


def llama(width: int) -> LlamaForCausalLM:
    """A small Llama over bytes."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
        )
    )


def main() -> None:
    """Train the teacher, cache what it says, distil, say what has arrived."""
    options = asked("distil_causal_lm", __doc__, epochs=12)
    text = torch.tensor(list(codecs.decode(this.s, "rot13").encode()))
    rows = [text[i : i + LENGTH] for i in range(0, len(text) - LENGTH, 4)]
    data = [{"input_ids": r, "attention_mask": torch.ones_like(r), "labels": r} for r in rows]
    given = arguments(options, rate=5e-3, batch=16)
    teacher, student = trained(llama(64), given, data), llama(32)
    folder = f"{options.output_dir}/teacher"
    cached = cache_teacher(teacher, data, default_data_collator, folder, temperature=1.0, top=12)
    trainer = DistillationTrainer(
        student,
        DistillationTrainingArguments(**given, alpha=0.5, distill_temperature=1.0),
        teacher=cached,
        train_dataset=data,
        eval_dataset=data,
    )
    trainer.train()
    found, _ = fidelity(trainer)
    print(f"agreement {found.agreement:.3f}, KL {found.divergence:.3f} nats")


if __name__ == "__main__":
    main()
