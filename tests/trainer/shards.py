"""Run by torchrun: numbers by layer of a model under `fully_shard`, against the whole model's."""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_recipe.instruments.layers import LayerWatch, is_sharded, whole
from hf_recipe.instruments.record import Recorder
from tests.processes import a_rank


def numbers(model, rows, labels):
    """(the layers of one step, the gradient's norm as the recorder reads it)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    watch, recorder = LayerWatch(), Recorder()
    loss = nn.functional.cross_entropy(model(rows), labels)
    loss.backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    watch.before(model, optimizer)
    optimizer.step()
    sample = watch.after(1, float(loss), float(whole(norm)), 1.0)
    recorder.add(loss.detach())
    recorder.norm = norm
    recorder.end_step(1)
    (step,) = recorder.flush(float)
    return sample, step.grad_norm


if __name__ == "__main__":
    dist.init_process_group("gloo")
    with a_rank():
        torch.manual_seed(0)
        # five and seven rows: shards of unequal size, and one that is empty
        plain = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5), nn.Linear(5, 1))
        plain.append(nn.Linear(1, 3))
        rows, labels = torch.randn(16, 6), torch.randint(0, 3, (16,))
        spread = copy.deepcopy(plain)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(spread, mesh=mesh)
        assert all(is_sharded(p) for p in spread.parameters())
        (one, norm), (other, spread_norm) = (numbers(m, rows, labels) for m in (plain, spread))
        apart = [abs(norm - spread_norm)]
        for a, b in zip(one.layers, other.layers, strict=True):
            assert (a.name, a.sampled, a.reached, a.still) == (
                b.name,
                b.sampled,
                b.reached,
                b.still,
            )
            apart += [abs(getattr(a, k) - getattr(b, k)) for k in ("gradient", "weight", "update")]
        text = f"world {dist.get_world_size()} layers {len(one.layers)} apart {max(apart) < 1e-5}"
        (Path(sys.argv[1]) / f"rank{dist.get_rank()}.txt").write_text(text)
