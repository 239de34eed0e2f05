"""The model against the recorded human baseline, on exactly the rows that were answered."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from hf_recipe.baselines.human import HumanBaseline, human_baseline, read_answers
from hf_recipe.instruments.row_losses import logits_of
from hf_recipe.trainer import preflight
from hf_recipe.trainer.recipe import Recipe


def compare_with_human(
    recipe: Recipe,
    journals: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    split: str = "validation",
) -> HumanBaseline:
    """Let the model answer the rows of `split` that people answered; the report says who is better.

    Args:
        recipe: what `hf_recipe.attach` returned, after training.
        journals: one file of `hf-recipe human` for each annotator.

    Raises:
        ValueError: no Trainer, no such split, or rows that the split does not have.
    """
    paths = [journals] if isinstance(journals, (str, os.PathLike)) else list(journals)
    if recipe.trainer is None:
        raise ValueError("a callback alone cannot do this: use hf_recipe.attach(trainer)")
    subject = preflight.subject_of_trainer(recipe.trainer, fresh=False)
    if split != "train" and split not in subject.evaluation:
        raise ValueError(f"no split {split!r}; there are train, {', '.join(subject.evaluation)}")
    answers = [read_answers(path) for path in paths]
    rows = subject.rows(split)
    wanted = sorted({row for one in answers for row in one.first})
    if wanted and wanted[-1] >= len(rows):
        raise ValueError(f"row {wanted[-1]} was answered, but {split} has {len(rows)} rows")
    labels: dict[int, Any] = {}
    model: dict[int, Any] = {}
    was_training = subject.model.training
    with preflight.guard_of(subject), torch.no_grad():
        subject.model.eval()
        for batch in rows.batches(wanted, 32):
            held = batch.to(subject.device)
            logits = logits_of(subject.compute_loss(held.inputs, outputs=True)[1])
            if logits is None or logits.ndim != 2 or held.labels is None:
                raise ValueError("the model gives no class for each row")
            labels |= dict(zip(batch.rows, held.labels.reshape(-1).tolist(), strict=True))
            model |= dict(zip(batch.rows, logits.argmax(-1).tolist(), strict=True))
    subject.model.train(was_training)
    seen = human_baseline(answers, labels, model)
    recipe.examiner.judge(seen, "end", split=split)
    recipe.closing.write()
    return seen
