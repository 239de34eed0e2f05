"""Run by torchrun: ranks whose metrics differ stop together, cool down together, keep alike."""

import sys
from pathlib import Path

import torch.distributed as dist

import hf_recipe
from tests.processes import a_rank
from tests.regularize.test_early_stopping import trainer_of

WSD = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 20}}


def turned(step):
    """Rank 0's metric turns at step 10; rank 1's falls for ever."""
    return 1 + abs(step - 10) / 10 if dist.get_rank() == 0 else 1 / step


if __name__ == "__main__":
    with a_rank():
        folder, lines = Path(sys.argv[1]), []
        for name, settings, options in (
            ("stopped", {}, {"save_strategy": "steps", "save_steps": 1}),
            ("cooled", {"cool_down": 0.25}, WSD),
        ):
            stopping, best = hf_recipe.EarlyStopping(**settings), hf_recipe.BestCheckpoints(2)
            trainer = trainer_of(folder / name, stopping, turned, 60, **options)
            trainer.add_callback(best)
            trainer.train()
            rule = stopping.rule.best_evaluation, stopping.rule.best
            lines.append(f"{trainer.state.global_step} {rule} {best.kept} {stopping.reason}")
        number = dist.get_rank()
        text = "\n".join([f"world {dist.get_world_size()}", *lines])
        (folder / f"rank{number}.txt").write_text(text)
