"""One step of distilling 8 ragged rows on this many processes; rank 0 saves the weights."""

import sys
from pathlib import Path

import torch

from hf_recipe.tune.distillation import DistillationTrainer
from tests.processes import a_rank
from tests.tune.heads_zoo import pair
from tests.tune.test_distillation import arguments, weights

if __name__ == "__main__":
    with a_rank():
        folder, processes = Path(sys.argv[1]), int(sys.argv[2])
        for head in ("sequence", "token", "llama", "gpt2"):
            student, teacher, rows = pair(head)
            args = arguments(
                folder / "run",
                per_device_train_batch_size=2,
                gradient_accumulation_steps=4 // processes,
                distill_chunked=head == "llama",
            )
            assert args.world_size == processes
            trainer = DistillationTrainer(student, args, train_dataset=rows, teacher=teacher)
            trainer.train()
            if trainer.is_world_process_zero():
                torch.save(weights(trainer), folder / f"{head}-{processes}.pt")
