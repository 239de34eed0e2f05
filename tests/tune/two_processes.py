"""One step of distilling 8 ragged rows on this many processes; rank 0 saves the weights.

On two processes also with teachers whose weights are split over them.
"""

import sys
from pathlib import Path

import torch
from transformers import default_data_collator

from hf_recipe.tune.distillation import DistillationTrainer
from hf_recipe.tune.teacher_cache import cache_teacher
from tests.processes import a_rank
from tests.tune.heads_zoo import pair
from tests.tune.test_distillation import arguments, weights

if __name__ == "__main__":
    with a_rank():
        folder, processes = Path(sys.argv[1]), int(sys.argv[2])
        cases = [(head, False) for head in ("sequence", "token", "llama", "gpt2")]
        cases += [(head, True) for head in ("token", "llama", "gpt2") if processes == 2]
        for head, sharded in cases:
            student, teacher, rows = pair(head)
            args = arguments(
                folder / "run",
                per_device_train_batch_size=2,
                gradient_accumulation_steps=4 // processes,
                distill_chunked=head == "llama",
                distill_shard_teacher=sharded,
            )
            whole = sum(p.numel() for p in teacher.parameters())
            assert args.world_size == processes
            if head == "sequence":  # asked by one process, waited for by the other
                cache = folder / f"cache-{processes}"
                teacher = cache_teacher(teacher, rows, default_data_collator, cache, temperature=2)
            trainer = DistillationTrainer(student, args, train_dataset=rows, teacher=teacher)
            trainer.train()
            if sharded:
                mine = sum(p.to_local().numel() for p in teacher.parameters())
                assert mine < 0.6 * whole, (head, mine, whole)
            if trainer.is_world_process_zero():
                torch.save(
                    weights(trainer), folder / f"{head}-{processes}{'-sharded' * sharded}.pt"
                )
