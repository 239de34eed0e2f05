"""The task's data: bundled digits, local files, a folder of images or the hub, in three parts.

Tuning, stopping and choosing see validation only; test is kept apart until the end. Where a part
is missing it is cut from the training rows: by a hash of each row's input and the seed, class by
class, so that equal inputs never fall on both sides and the cut is the same on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from hf_recipe.runner.cutting import cut, row_bytes
from hf_recipe.runner.examples import EXAMPLES, Example
from hf_recipe.runner.options import Options, UsageError
from hf_recipe.runner.reading import from_files, from_hub
from hf_recipe.runner.tasks import TASKS, task_for
from hf_recipe.runner.tasks.base import Task

VALIDATION_SHARE, TEST_SHARE = 0.2, 0.2


@dataclass
class Data:
    """What is to be learned.

    Attributes:
        name: of the data set.
        task: what is to be made of it.
        kind: what goes in: "image", "text" or "numbers".
        splits: "train", "validation" and "test", with the columns `inputs` and `targets`.
        inputs: the input columns ("image"; a text column; numeric columns).
        targets: what is to be told from them; none where the input is its own target.
        classes: class names; empty where there are none.
        best: what is known of the lowest loss that can be reached, in words; "" mostly.
        center, scale: mean and standard deviation of a regression's training targets.
    """

    name: str
    task: Task
    kind: str
    splits: Mapping[str, datasets.Dataset]
    inputs: tuple[str, ...]
    targets: tuple[str, ...] = ("label",)
    classes: tuple[str, ...] = ()
    best: str = ""
    center: float = 0.0
    scale: float = 1.0

    def labels(self, split: str) -> np.ndarray[Any, Any]:
        """Targets as the network gets them, where each row has one."""
        return self.task.labels(self, split)

    @property
    def fingerprint(self) -> str:
        """Changes when any row of any part does."""
        digest = hashlib.sha256(self.task.name.encode())
        for name in sorted(self.splits):
            split = self.splits[name]
            digest.update(f"{name}{len(split)}".encode())
            for row in row_bytes(split, [*self.inputs, *self.targets]):
                digest.update(row)
        return digest.hexdigest()[:16]


def load(options: Options) -> Data:
    """The data that `options` name.

    Raises:
        UsageError: one line that names the file, column or value that cannot work.
    """
    chosen, seed = options.data, int(options.training.seed)
    best: Mapping[str, str] = {}
    if chosen.train_file:
        parts, name = from_files(chosen), Path(chosen.train_file).stem
    elif chosen.dataset_name and chosen.dataset_name not in EXAMPLES:
        parts, name = from_hub(chosen), chosen.dataset_name
    else:
        example = _example(options)
        parts, name, best = example.parts(), example.title, example.best
    task = task_for(parts["train"], chosen)
    read = task.read(parts, chosen, name)
    parts = dict(read.parts)
    if "test" not in parts:
        parts["train"], parts["test"] = _cut(task, parts["train"], read.inputs, TEST_SHARE, seed)
    if "validation" not in parts:
        share = VALIDATION_SHARE / (1 - TEST_SHARE)
        halves = _cut(task, parts["train"], read.inputs, share, seed)
        parts["train"], parts["validation"] = halves
    for part in ("train", "validation", "test"):
        if len(parts[part]) < 8:
            raise UsageError(f"{name}: only {len(parts[part])} rows in {part}; 8 are the least")
    data = Data(
        name,
        task,
        read.kind,
        parts,
        read.inputs,
        read.targets,
        read.classes,
        best.get(task.name, ""),
    )
    task.settle(data)
    return data


def _cut(
    task: Task, rows: datasets.Dataset, inputs: tuple[str, ...], share: float, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    return cut(rows, inputs, share, seed, task.strata(rows))


def _example(options: Options) -> Example:
    """The bundled rows that were named, or those of the task; the digits else."""
    chosen = options.data
    if chosen.dataset_name:
        return EXAMPLES[chosen.dataset_name]
    if chosen.task is None:
        return EXAMPLES["digits"]
    known = [example for example in EXAMPLES.values() if chosen.task in example.best]
    if not known:
        raise UsageError(
            f"--task {chosen.task}: no rows are bundled for it; give --train_file or --dataset_name"
        )
    assert chosen.task in TASKS
    return known[0]
