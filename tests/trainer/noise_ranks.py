"""Run by torchrun: augmentation drawn alike or apart, BatchNorm synchronised or not."""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import Trainer

import hf_recipe
from tests.models import arguments, batchnorm, points
from tests.processes import a_rank


class Jittered(torch.utils.data.Dataset):
    """Points with a little noise, drawn from numpy's generator or from entropy anew."""

    def __init__(self, alike: bool) -> None:
        self.rows, self.alike = points(), alike

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index]
        noise = np.random if self.alike else np.random.default_rng()
        jitter = noise.normal(scale=0.1, size=8)
        features = torch.tensor(row["features"]) + torch.tensor(jitter, dtype=torch.float32)
        return {"features": features, "labels": row["labels"]}


def watched(folder: Path, data, **changes) -> str:
    trainer = Trainer(
        model=batchnorm(), args=arguments(folder, max_steps=10, **changes), train_dataset=data
    )
    recipe = hf_recipe.attach(trainer, select=["complexify"])
    trainer.train()
    report = recipe.report
    recipe.detach()
    found = sorted({f.check for f in report.flat if f.severity != "note"})
    names = ("ranks-share-noise", "batchnorm-ranks-differ")
    ran = sum(name in report.ran for name in names)
    return f"ran {ran} found {found} crashed {report.crashed}"


if __name__ == "__main__":
    with a_rank():
        place = Path(sys.argv[1])
        lines = [
            watched(place, Jittered(alike=False)),
            watched(place, Jittered(alike=True)),
            watched(place, Jittered(alike=True), dataloader_num_workers=1),
            watched(place, points(), ddp_broadcast_buffers=False),
        ]
        text = "\n".join([f"world {dist.get_world_size()}", *lines])
        (place / f"rank{dist.get_rank()}.txt").write_text(text)
