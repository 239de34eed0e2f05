"""Run by torchrun: two processes, a row count that needs padding; every rank knows every margin."""

import sys
from pathlib import Path

import numpy as np
import torch.distributed as dist
from transformers import Trainer

import hf_recipe
from tests.models import arguments, bert, words
from tests.processes import a_rank

if __name__ == "__main__":
    with a_rank():
        place, data = Path(sys.argv[1]), words(101)
        changes = {"max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 2}
        trainer = Trainer(model=bert(), args=arguments(place, **changes), train_dataset=data)
        recipe = hf_recipe.attach(trainer, select=["suspect-label"])
        trainer.train()
        watch = recipe.closer_look.margins
        same = sum(
            int(a == b) for a, b in zip(watch.labels.tolist(), data["labels"][:], strict=True)
        )
        known = int((watch.labels >= 0).sum())  # margins are taken once the run knows something
        text = f"seen {known} same {same} sum {np.nansum(watch.scores()):.4f}"
        state = f"reason {watch.reason!r} crashed {recipe.report.crashed}"
        (place / f"rank{dist.get_rank()}.txt").write_text(f"{text} {state}")
