"""Run by torchrun: a sharded model learns one batch; unequal devices agree on a batch size."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import Trainer

import hf_recipe
from hf_recipe.baselines.one_batch import overfit_one_batch
from hf_recipe.instruments.batches import rows_of_trainer
from hf_recipe.instruments.subject import Subject, trainer_loss
from tests.baselines.test_batch_size import bounded
from tests.models import arguments, bert, words
from tests.processes import a_rank


def local(model):
    return {n: p.to_local().detach().clone() for n, p in model.named_parameters()}


def sharded(folder):
    """One batch on a model whose parameters are spread over the processes."""
    trainer = Trainer(model=bert(), args=arguments(folder), train_dataset=words(32))
    model = trainer.model
    for block in model.bert.encoder.layer:
        fully_shard(block, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    subject = Subject(
        model=model,
        args=trainer.args,
        train=rows_of_trainer(trainer, trainer.train_dataset, "train"),
        evaluation={},
        trainer=trainer,
        loss_function=trainer_loss(trainer),
    )
    batch = subject.batch(size=4)
    model.eval()
    with torch.no_grad():
        loss = float(subject.compute_loss(batch.inputs))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    before = local(model)
    found = overfit_one_batch(subject)
    after = local(model)
    model.eval()
    with torch.no_grad():  # no gathered weight of the trial is left behind
        still = float(subject.compute_loss(batch.inputs)) == loss
    return {
        "world": dist.get_world_size(),
        "sharded": sum(p.numel() for p in before.values()),
        "whole": sum(p.numel() for p in model.parameters()),
        "same": all(torch.equal(before[n], after[n]) for n in before),
        "still": still,
        "end": found.end,
        "reached": found.reached,
        "gradient": found.gradient,
    }


def batch_size(folder, rank):
    """Devices that hold 37 and 21 rows."""
    trainer = bounded(folder, room=(37, 21)[rank])
    recipe = hf_recipe.attach(trainer, select=["batch-size-small"])
    found = recipe.find_batch_size(memory=2**40, seconds=0.5, noise=False)
    assert recipe.report.crashed == {}, recipe.report.crashed
    recipe.detach()
    return {"largest": found.largest, "processes": found.processes, "advised": found.advised}


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    with a_rank():
        told = {**sharded(folder), **batch_size(folder, rank)}
        (folder / f"rank{rank}.json").write_text(json.dumps(told))
