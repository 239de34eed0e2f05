"""Run by torchrun: two processes, healthy, drifting apart, or on the same rows; a file per rank."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback

import hf_recipe
from tests.models import arguments, bert, words


class Unwrapped(Trainer):
    """Its loss goes around the wrapper, so gradients are never averaged."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return super().compute_loss(self.model, inputs, return_outputs, **kwargs)


class Shared(Trainer):
    """Its dataloader was never prepared: every process reads all rows, in the same order."""

    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(
            self.train_dataset.with_format("torch"), batch_size=8, collate_fn=self.data_collator
        )


class Count(TrainerCallback):
    steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        Count.steps = state.global_step


if __name__ == "__main__":
    kind, folder = sys.argv[1], Path(sys.argv[2])
    cls = {"healthy": Trainer, "unwrapped": Unwrapped, "shared": Shared}[kind]
    trainer = cls(
        model=bert(),
        args=arguments(folder, max_steps=10),
        train_dataset=words(),
        callbacks=[Count()],
    )
    recipe = hf_recipe.attach(trainer, select=["complexify"])
    trainer.train()
    report = recipe.report
    found = sorted({f.check for f in report.flat if f.severity == "error"})
    ran = [name for name in ("ranks-diverged", "ranks-share-data") if name in report.ran]
    text = f"world {dist.get_world_size()} steps {Count.steps} ran {ran} found {found} "
    text += f"crashed {report.crashed}"
    (folder / f"rank{trainer.args.process_index}.txt").write_text(text)
