import os
from dataclasses import dataclass

import datasets
import pytest
import torch

from hf_recipe.core.check import Measurement
from hf_recipe.data import cache
from hf_recipe.data.cache import (
    dataset_fingerprint,
    recalled_measurement,
    remembered_measurement,
)


@dataclass(frozen=True)
class Costly(Measurement):
    rows: tuple[int, ...]
    share: float


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_RECIPE_CACHE", str(tmp_path / "kept"))


def data(n=5):
    return datasets.Dataset.from_dict({"x": list(range(n))})


def test_the_second_launch_reads_what_the_first_measured():
    calls = []

    def compute():
        calls.append(1)
        return Costly((1, 2), float("nan"))

    name = dataset_fingerprint(data(), about=("x",))
    assert recalled_measurement(name, Costly) is None
    first = remembered_measurement(name, Costly, compute)
    again = remembered_measurement(dataset_fingerprint(data(), about=("x",)), Costly, compute)
    assert len(calls) == 1
    assert again.rows == first.rows
    assert again.share != again.share
    remembered_measurement(dataset_fingerprint(data(), about=("y",)), Costly, compute)
    remembered_measurement(dataset_fingerprint(data(6), about=("x",)), Costly, compute)
    remembered_measurement(name, Costly, compute, name="validation")
    assert len(calls) == 4


def test_no_fingerprint_is_never_remembered():
    torch_data = torch.utils.data.TensorDataset(torch.zeros(3))
    assert dataset_fingerprint(torch_data) is None
    assert dataset_fingerprint(data(), torch_data) is None
    assert dataset_fingerprint() is None
    assert remembered_measurement(None, Costly, lambda: Costly((), 0.0)) == Costly((), 0.0)
    assert cache.folder() is not None
    assert not cache.folder().exists()


def test_a_broken_or_closed_cache_is_no_error(tmp_path, monkeypatch):
    name = dataset_fingerprint(data())
    remembered_measurement(name, Costly, lambda: Costly((3,), 0.5))
    (file,) = cache.folder().glob("*.json")
    file.write_text("{")
    assert recalled_measurement(name, Costly) is None
    assert remembered_measurement(name, Costly, lambda: Costly((4,), 0.5)).rows == (4,)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_RECIPE_CACHE", str(tmp_path / "file"))
    assert remembered_measurement(name, Costly, lambda: Costly((5,), 0.5)).rows == (5,)
    monkeypatch.setenv("HF_RECIPE_CACHE", "off")
    assert cache.folder() is None
    assert remembered_measurement(name, Costly, lambda: Costly((6,), 0.5)).rows == (6,)


def test_the_oldest_are_forgotten(monkeypatch):
    monkeypatch.setattr(cache, "MOST_FILES", 3)
    for i in range(5):
        cache.remember(str(i), "n", i)
        for age, file in enumerate(sorted(cache.folder().glob("*.json"))):
            os.utime(file, (age, age))
    assert len(list(cache.folder().iterdir())) == 3
