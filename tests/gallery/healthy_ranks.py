"""Run by torchrun: healthy runs on two processes, bare and watched; a file per rank.

Uneven tails (97 rows on two processes), dropout, BatchNorm, accumulation, a stream of rows.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from transformers import Trainer

import hf_recipe
from tests.models import arguments, batchnorm, bert, points, signature, words
from tests.processes import a_rank

TAIL = {"max_steps": 26, "eval_strategy": "steps", "eval_steps": 13}


def build(name: str, folder: Path) -> Trainer:
    if name == "stream":
        return Trainer(
            model=bert(),
            args=arguments(folder, max_steps=20),
            train_dataset=words(200).to_iterable_dataset(num_shards=2),
        )
    statistics = name == "BatchNorm"
    data = points if statistics else words
    changes = (
        {"gradient_accumulation_steps": 2, "max_steps": 12, "eval_steps": 6}
        if name == "accumulated"
        else {}
    )
    return Trainer(
        model=batchnorm() if statistics else bert(),
        args=arguments(folder, **{**TAIL, **changes}, average_tokens_across_devices=False),
        train_dataset=data(97),
        eval_dataset=data(33, seed=2),
    )


def compared(name: str, folder: Path) -> dict:
    bare = build(name, folder / f"{name}-bare")
    bare.train()
    watched = build(name, folder / f"{name}-watched")
    recipe = hf_recipe.attach(watched)
    watched.train()
    report = recipe.report
    recipe.detach()
    return {
        "same": signature(bare) == signature(watched),
        "alarms": [(f.check, f.message) for f in report.findings if f.severity != "note"],
        "crashed": report.crashed,
        "ran": len(report.ran),
    }


if __name__ == "__main__":
    with a_rank():
        place = Path(sys.argv[1])
        found = {name: compared(name, place) for name in sys.argv[2:]}
        (place / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
