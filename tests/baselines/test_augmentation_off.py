"""Random transforms off for a while, wherever they stand, and put back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

import hf_recipe
from tests.models import arguments, batchnorm, bert, points, words


class Rows(torch.utils.data.Dataset):
    def __init__(self, transform: Any = None) -> None:
        draw = torch.Generator().manual_seed(0)
        self.values = torch.randn(16, 8, generator=draw)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        value = self.values[index]
        return {"features": self.transform(value) if self.transform else value, "labels": index % 4}


class RandomNoise:
    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        return value + torch.randn(value.shape)


class Halve:
    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        return value / 2


class Compose:
    def __init__(self, *transforms: Any) -> None:
        self.transforms = list(transforms)

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        for transform in self.transforms:
            value = transform(value)
        return value


def attached(folder: Path, train: Any, evaluation: Any = None) -> tuple[Trainer, Any]:
    trainer = Trainer(
        model=bert() if "input_ids" in train[0] else batchnorm(),
        args=arguments(folder),
        train_dataset=train,
        eval_dataset=evaluation,
    )
    return trainer, hf_recipe.attach(trainer)


def twice(trainer: Trainer, row: int = 3) -> tuple[Any, Any]:
    return trainer.train_dataset[row]["features"], trainer.train_dataset[row]["features"]


def test_random_members_of_a_composed_transform_are_left_out(tmp_path: Path) -> None:
    data = Rows(Compose(Halve(), RandomNoise()))
    trainer, recipe = attached(tmp_path, data)
    state = torch.get_rng_state()
    with recipe.without_augmentation() as done:
        assert done == ("without RandomNoise",)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(trainer.train_dataset[3]["features"], data.values[3] / 2)
    assert [type(t).__name__ for t in data.transform.transforms] == ["Halve", "RandomNoise"]
    assert trainer.train_dataset is data
    recipe.detach()


def test_the_evaluation_rows_transform_takes_the_place(tmp_path: Path) -> None:
    data = Rows(lambda v: v * torch.rand(1))
    halve = Halve()
    trainer, recipe = attached(tmp_path, data, Rows(halve))
    own = data.transform
    with recipe.without_augmentation() as done:
        assert done == ("the evaluation rows' transform",)
        assert trainer.train_dataset.transform is halve
    assert data.transform is own
    recipe.detach()


def test_a_transform_of_ones_own_has_its_draws_fixed_by_row(tmp_path: Path) -> None:
    trainer, recipe = attached(tmp_path, Rows(lambda v: v + torch.randn(8)))
    with recipe.without_augmentation() as done:
        assert done == ("draws fixed by the row's number",)
        assert len(trainer.train_dataset) == 16
        first, second = twice(trainer)
        assert torch.equal(first, second)
        trainer.train()  # and it trains
    first, second = twice(trainer)
    assert not torch.equal(first, second)
    recipe.detach()


def test_a_transform_of_a_hub_dataset(tmp_path: Path) -> None:
    def noisy(rows: dict[str, Any]) -> dict[str, Any]:
        values = torch.tensor(rows["features"])
        return {**rows, "features": list(values + torch.randn(values.shape))}

    def plain(rows: dict[str, Any]) -> dict[str, Any]:
        return {**rows, "features": [torch.tensor(v) for v in rows["features"]]}

    data = points(16).with_transform(noisy)
    trainer, recipe = attached(tmp_path, data)
    with recipe.without_augmentation() as done:
        assert done == ("draws fixed by the row's number",)
        one, again = twice(trainer)
        assert torch.equal(one, again)
        many = trainer.train_dataset[[1, 3]]["features"][1]
        assert torch.equal(one, many)
    with recipe.without_augmentation(plain) as done:
        assert done == ("the transform that was given",)
        assert torch.equal(twice(trainer)[0], torch.tensor(points(16)[3]["features"]))
    trainer.eval_dataset = points(8).with_transform(plain)
    with recipe.without_augmentation() as done:
        assert done == ("the evaluation rows' transform",)
    assert trainer.train_dataset is data
    recipe.detach()


def test_rows_that_do_not_vary_and_masks_are_left_alone(tmp_path: Path) -> None:
    data = words()
    trainer, recipe = attached(tmp_path, data)
    with recipe.without_augmentation() as done:
        assert done == ()
        assert trainer.train_dataset is data
    trainer.model.config.apply_spec_augment = True
    with recipe.without_augmentation() as done:
        assert done == ("SpecAugment",)
        assert not trainer.model.config.apply_spec_augment
    assert trainer.model.config.apply_spec_augment
    trainer.train_dataset = list(data)
    with pytest.raises(ValueError, match="no transform"), recipe.without_augmentation(Halve()):
        pass
    recipe.detach()


def test_it_is_put_back_after_an_error(tmp_path: Path) -> None:
    data = Rows(Compose(RandomNoise()))
    _, recipe = attached(tmp_path, data)
    with pytest.raises(KeyError), recipe.without_augmentation():
        raise KeyError
    assert len(data.transform.transforms) == 1
    recipe.detach()


# ---------------------------------------------------------------- seeds


def test_seeds_reach_the_model_and_the_run(tmp_path: Path) -> None:
    def weights(seed: int) -> torch.Tensor:
        hf_recipe.seed_everything(seed)
        return torch.nn.Linear(4, 4).weight

    assert torch.equal(weights(7), weights(7))
    assert not torch.equal(weights(7), weights(8))
    trainer, recipe = attached(tmp_path, words())
    recipe.seed_everything(11)
    assert trainer.args.seed == 11
    drawn = torch.rand(1)
    recipe.seed_everything(11)
    assert torch.equal(torch.rand(1), drawn)
    recipe.detach()


@pytest.mark.parametrize(
    ("seed", "error"), [(-1, ValueError), (2**32, ValueError), ("3", TypeError)]
)
def test_a_seed_that_is_none_is_refused(seed, error):
    with pytest.raises(error, match="seed"):
        hf_recipe.seed_everything(seed)
