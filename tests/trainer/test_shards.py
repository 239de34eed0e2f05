"""Sharded parameters: local sums, added up by one collective, are the whole tensors' sums."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from hf_recipe.core.config import Settings
from hf_recipe.examiner import Examiner
from hf_recipe.instruments.record import Recorder
from hf_recipe.trainer.closer_look import CloserLook
from tests.processes import torchrun


@pytest.mark.slow
def test_two_processes_sum_their_shards(tmp_path):
    torchrun(Path(__file__).with_name("shards.py"), tmp_path)
    for rank in (0, 1):
        text = (tmp_path / f"rank{rank}.txt").read_text()
        assert text == "world 2 layers 8 apart True"


@pytest.mark.parametrize(("deepspeed", "reason"), [(True, "DeepSpeed"), (False, "sharded")])
def test_what_cannot_be_seen_is_skipped_with_its_reason(deepspeed, reason):
    examiner = Examiner(Settings())
    trainer = SimpleNamespace(
        is_fsdp_enabled=not deepspeed,
        is_deepspeed_enabled=deepspeed,
        accelerator=SimpleNamespace(parallelism_config=None),
        args=SimpleNamespace(torch_compile=False, n_gpu=0),
        train_dataset=None,
    )
    CloserLook(examiner, trainer, Recorder()).begin(nn.Linear(2, 2))
    for name in ("update-too-small", "ranks-diverged", "gradient-accumulates"):
        assert reason in examiner.report.skipped[name]
