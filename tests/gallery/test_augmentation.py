"""Augmentation in the data set, in the collator and in workers alone; and switched off."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, default_data_collator

import hf_recipe
from hf_recipe.baselines.augmentation import Redrawn, augmentation_on
from tests.gallery.harness import everything, run
from tests.models import arguments, batchnorm, points

NAME = "augmentation-on"


@pytest.mark.parametrize(
    ("drawn", "severity"),
    [
        (Redrawn("train", 4, (), False, True), "silent"),
        (Redrawn("train", 4, ("features",), False, True), None),
        (Redrawn("train", 4, ("features",), False, True, baseline=True), "warning"),
        (Redrawn("train", 4, ("input_ids",), True, True, baseline=True), None),
        (Redrawn("validation", 4, ("pixel_values",), False, False), "warning"),
    ],
)
def test_judging(drawn, severity):
    assert [f.severity for f in augmentation_on(drawn)] == [severity] * (severity != "silent")


class Jittered(torch.utils.data.Dataset):
    """Rows with noise on them, everywhere or in workers alone."""

    def __init__(self, where):
        self.rows, self.where = points(64), where

    def __len__(self):
        return 64

    def __getitem__(self, index):
        row = self.rows[index]
        features = torch.tensor(row["features"])
        in_worker = torch.utils.data.get_worker_info() is not None
        if self.where == "rows" or (self.where == "workers" and in_worker):
            features = features + 0.1 * torch.randn(8)
        return {"features": features, "labels": row["labels"]}


def noisy(rows):
    batch = default_data_collator(rows)
    return {**batch, "features": batch["features"] + 0.1 * torch.randn(len(rows), 8)}


def trainer_of(folder, where, workers=0):
    return Trainer(
        model=batchnorm(),
        args=arguments(folder, max_steps=2, dataloader_num_workers=workers),
        train_dataset=Jittered(where),
        data_collator=noisy if where == "collator" else default_data_collator,
    )


@pytest.mark.parametrize(
    ("where", "workers", "found"),
    [
        ("rows", 0, True),
        ("collator", 0, True),
        ("workers", 1, True),
        ("workers", 0, False),  # no worker ever reads them
        ("nowhere", 1, False),
    ],
)
def test_the_place_that_draws_is_found(where, workers, found, tmp_path):
    report = run(trainer_of(tmp_path, where, workers), train=False, select=[NAME])
    told = [f.message for f in everything(report)]
    assert len(told) == found
    assert report.ran[NAME] == ["batch"]
    assert ("worker" in "".join(told)) == (where == "workers" and found)
    assert torch.utils.data.get_worker_info() is None


def test_switched_off_inside_the_run_sees_fixed_rows(tmp_path):
    trainer = trainer_of(tmp_path, "rows")
    recipe = hf_recipe.attach(trainer, select=[NAME])
    with recipe.without_augmentation() as done:
        assert done == ("draws fixed by the row's number",)
        recipe.preflight()
        assert recipe.findings == []
        trainer.train()
    assert recipe.findings == []
    assert isinstance(trainer.train_dataset, Jittered)
    recipe.detach()
