"""Run by torchrun: trains with or without the recipe, and writes one file per rank."""

import sys
from pathlib import Path

import torch.distributed as dist

import hf_recipe
from tests.models import signature
from tests.processes import a_rank
from tests.trainer.test_no_trace import _trainer

if __name__ == "__main__":
    with a_rank():
        kind, watch, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
        trainer = _trainer(folder, kind, average_tokens_across_devices=False)
        recipe = None
        if watch == "watched":
            recipe = hf_recipe.attach(trainer)
            recipe.preflight()
            assert recipe.overfit_one_batch(max_steps=5) is not None
            assert recipe.find_batch_size(seconds=0.2, noise=False) is not None
            assert recipe.check_determinism(steps=1).equal
        trainer.train()
        if recipe is not None:
            assert recipe.report.crashed == {}, recipe.report.crashed
            assert len(recipe.recorder.curves["loss"].y) == 12
        world = dist.get_world_size()
        text = f"world {world} {signature(trainer)}"
        (folder / f"rank{trainer.args.process_index}.txt").write_text(text)
