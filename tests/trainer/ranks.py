"""Run by torchrun: two processes, healthy, drifting apart, or on the same rows; a file per rank."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback

import hf_recipe
from tests.models import arguments, bert, words
from tests.processes import a_rank


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


def watched(cls: type[Trainer], folder: Path) -> str:
    """One run; what was found on this rank."""
    trainer = cls(
        model=bert(),
        args=arguments(folder, max_steps=10),
        train_dataset=words(),
        callbacks=[Count()],
    )
    recipe = hf_recipe.attach(trainer, select=["complexify"])
    trainer.train()
    report = recipe.report
    recipe.detach()
    found = sorted({f.check for f in report.flat if f.severity == "error"})
    ran = sum(name in report.ran for name in ("ranks-diverged", "ranks-share-data"))
    return f"steps {Count.steps} ran {ran} found {found} crashed {report.crashed}"


if __name__ == "__main__":
    with a_rank():
        place = Path(sys.argv[1])
        lines = [watched(cls, place) for cls in (Trainer, Unwrapped, Shared)]
        text = "\n".join([f"world {dist.get_world_size()}", *lines])
        (place / f"rank{dist.get_rank()}.txt").write_text(text)
