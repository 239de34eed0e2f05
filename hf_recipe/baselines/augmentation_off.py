"""The recipe's line "turn off data augmentation": for a while, and put back.

What draws at random on the way from a row to the batch may stand in three places: a data set's
transform (that of the evaluation set takes its place, or its random members are left out), the
data set's own code (its draws are fixed by the row's number: each row comes out one way), and the
model's inputs (SpecAugment). Collators that mask tokens are left alone: masking is the task.
"""

from __future__ import annotations

import functools
import random
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import datasets
import numpy as np
import torch

from hf_recipe.instruments.batches import has_rows
from hf_recipe.instruments.quiet import restore_random_state, save_random_state

PLACES = ("transform", "transforms", "augment", "augmentation", "augmentations")
RANDOM = re.compile(
    r"^(random|rand|auto_?augment|augmix|trivial_?augment|color_?jitter|gaussian_?(noise|blur)"
    r"|elastic|cutout|coarse_?dropout|mix_?up|cut_?mix|jitter|time_?mask|frequency_?mask"
    r"|horizontal_?flip|vertical_?flip|shift_?scale_?rotate)",
    re.IGNORECASE,
)
TRIED = 3  # reads of a row that must agree


@contextmanager
def without_augmentation(trainer: Any, transform: Any = None) -> Iterator[tuple[str, ...]]:
    """Take the random transforms off a Trainer's training rows inside; yields what was done.

    Args:
        trainer: its ``train_dataset`` is looked at, and put back.
        transform: what to use in the place of the training rows' transform; default: as above.
    """
    done: list[str] = []
    with ExitStack() as undo:
        dataset = trainer.train_dataset
        undo.callback(setattr, trainer, "train_dataset", dataset)
        if transform is not None:
            _replace(trainer, dataset, transform, undo)
            done.append("the transform that was given")
        elif has_rows(dataset) and len(dataset) and _varies(dataset):
            done += _take_off(trainer, dataset, undo)
        done += _inputs_of_the_model(trainer.model, undo)
        yield tuple(done)


def _take_off(trainer: Any, dataset: Any, undo: ExitStack) -> list[str]:
    found = _of_evaluation(trainer, dataset)
    if found is not None:
        _replace(trainer, dataset, found, undo)
        if not _varies(trainer.train_dataset):
            return ["the evaluation rows' transform"]
        trainer.train_dataset = dataset
    named = _leave_out(dataset, undo)
    if named and not _varies(dataset):
        return [f"without {name}" for name in named]
    trainer.train_dataset = _fixed(dataset)
    return [*(f"without {name}" for name in named), "draws fixed by the row's number"]


def _of_evaluation(trainer: Any, dataset: Any) -> Any:
    """The transform of an evaluation set of the same kind, where it has one of its own."""
    sets = trainer.eval_dataset
    sets = list(sets.values()) if type(sets) is dict else [sets]
    other = next((each for each in sets if type(each) is type(dataset)), None)
    if other is None:
        return None
    if isinstance(dataset, datasets.Dataset):
        found = other.format["format_kwargs"].get("transform")
        return found if other.format["type"] == "custom" else None
    name = _place(dataset)
    return None if name is None else getattr(other, name, None)


def _place(dataset: Any) -> str | None:
    kept = vars(dataset) if hasattr(dataset, "__dict__") else {}
    return next((name for name in PLACES if callable(kept.get(name))), None)


def _replace(trainer: Any, dataset: Any, transform: Any, undo: ExitStack) -> None:
    if isinstance(dataset, datasets.Dataset):
        trainer.train_dataset = dataset.with_transform(transform)
        return
    name = _place(dataset)
    if name is None:
        raise ValueError(
            f"the training set ({type(dataset).__name__}) has no transform that could be replaced; "
            f"looked for {', '.join(PLACES)}"
        )
    undo.callback(setattr, dataset, name, getattr(dataset, name))
    setattr(dataset, name, transform)


def _leave_out(dataset: Any, undo: ExitStack) -> list[str]:
    """Take random members out of a composed transform; their names."""
    name = None if isinstance(dataset, datasets.Dataset) else _place(dataset)
    members = getattr(getattr(dataset, name), "transforms", None) if name else None
    if not isinstance(members, list):
        return []
    out = [m for m in members if RANDOM.match(type(m).__name__)]
    undo.callback(members.__setitem__, slice(None), list(members))
    members[:] = [m for m in members if m not in out]
    return [type(m).__name__ for m in out]


class FixedDraws(torch.utils.data.Dataset[Any]):
    """A data set whose rows come out one way: each is read from a random state of its own."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return _drawn_once(lambda: self.dataset[index], int(index))


def _fixed(dataset: Any) -> Any:
    if not isinstance(dataset, datasets.Dataset):
        return FixedDraws(dataset)
    inner = dataset.format["format_kwargs"]["transform"]

    def transform(rows: dict[str, Any]) -> Any:
        # A batch of rows is read row by row, so that one row's draws do not depend on others.
        count = len(next(iter(rows.values())))
        single = [{name: [values[i]] for name, values in rows.items()} for i in range(count)]
        parts = [_drawn_once(functools.partial(inner, one), _number(one)) for one in single]
        return {name: [v for part in parts for v in part[name]] for name in parts[0]}

    return dataset.with_transform(transform)


def _number(row: dict[str, Any]) -> int:
    """A number out of a row's own values: its index is not told to a transform."""
    return zlib.crc32(repr(sorted(row.items())).encode())


def _drawn_once(read: Callable[[], Any], seed: int) -> Any:
    state = save_random_state()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        return read()
    finally:
        restore_random_state(state)


def _varies(dataset: Any) -> bool:
    """Whether any of a few rows comes out differently when it is read again."""
    state = save_random_state()
    try:
        for index in {0, len(dataset) // 2, len(dataset) - 1}:
            first = dataset[index]
            if any(not _same(first, dataset[index]) for _ in range(TRIED)):
                return True
        return False
    finally:
        restore_random_state(state)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, (torch.Tensor, np.ndarray, int, float)):
        return np.array_equal(np.asarray(a), np.asarray(b), equal_nan=_is_real(a))
    return bool(a == b)


def _is_real(value: Any) -> bool:
    return np.asarray(value).dtype.kind in "fc"


def _inputs_of_the_model(model: Any, undo: ExitStack) -> list[str]:
    """SpecAugment masks the inputs inside of the model."""
    config: Any = getattr(model, "config", None)
    if not getattr(config, "apply_spec_augment", False):
        return []
    undo.callback(setattr, config, "apply_spec_augment", True)
    config.apply_spec_augment = False
    return ["SpecAugment"]
