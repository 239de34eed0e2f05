"""`hf-recipe demo`: a tiny run with three planted bugs, offline, and what the recipe says of it.

1. The optimizer was made before the head was replaced: the new head never trains.
2. Warm-up is longer than the run: the rate never reaches its peak.
3. Some of the validation rows stand in the training rows.
"""

from __future__ import annotations

import sys
from pathlib import Path

import datasets
import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from hf_recipe.trainer.attach import attach

PLANTED = ("parameter-unoptimized", "split-leak", "warmup-too-long")
ROWS, LENGTH, WORDS, STEPS = 192, 12, 40, 24


def run(folder: Path) -> int:
    """Train, report; 0 if exactly the planted bugs were found, else 1."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    trainer = planted_trainer(folder)
    recipe = attach(trainer, report_dir=folder / "recipe")
    trainer.train()
    say = sys.stdout.write
    found = {f.check for f in recipe.report.flat if f.severity != "note"}
    recipe.detach()
    say(f"\nplanted: {', '.join(PLANTED)}\n")
    missed, extra = sorted(set(PLANTED) - found), sorted(found - set(PLANTED))
    if not missed and not extra:
        say("found:   exactly these\n")
        return 0
    say(f"missed:  {', '.join(missed) or 'none'}; beside them: {', '.join(extra) or 'none'}\n")
    return 1


def planted_trainer(folder: Path) -> Trainer:
    """A BERT of 30,000 parameters on token averages, with the three bugs."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, WORDS, (ROWS, LENGTH), generator=generator)
    score = ids.float().mean(1)
    labels = score.gt(score.median()).long()
    rows = datasets.Dataset.from_dict(
        {
            "input_ids": ids.tolist(),
            "attention_mask": torch.ones_like(ids).tolist(),
            "labels": labels.tolist(),
        }
    )
    train = rows.select(range(160))
    validation = rows.select([*range(160, ROWS), *range(0, 32, 2)])  # 16 rows stand in train
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
        num_labels=2,
    )
    model = BertForSequenceClassification(config)
    model.accepts_loss_kwargs = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.classifier = torch.nn.Linear(32, 2)  # too late: the optimizer holds the old head
    peak = 10 * STEPS
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / peak))
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=16,
        eval_strategy="steps",
        eval_steps=STEPS // 2,
        save_strategy="no",
        logging_steps=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=validation,
        optimizers=(optimizer, scheduler),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer
