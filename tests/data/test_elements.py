"""Elements of vectors: those that never vary, and the one that holds the label."""

import datasets
import numpy as np
import pytest
from sklearn.datasets import load_digits
from torch import nn

import hf_recipe
from hf_recipe.data.summaries import Summary
from hf_recipe.inspection import inspect_dataset, read_split
from tests.data import worlds


def vectors(rows=600, width=12, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, width))
    y = (x[:, :3].sum(axis=1) + rng.normal(size=rows) > 0).astype(int)
    return x, y


def data(x, y):
    return datasets.Dataset.from_dict({"features": x.tolist(), "labels": y.tolist()})


def constant(report):
    return [f for f in report.flat if f.check == "constant-input"]


def test_a_dead_element_is_noted():
    x, y = vectors()
    assert not constant(inspect_dataset(data(x, y)))
    x[:, 7], x[:, 9] = 0.0, 3.5
    (finding,) = constant(inspect_dataset(data(x, y)))
    assert finding.severity == "note"
    assert "2 of 12 elements of features" in finding.message
    assert "7, 9" in finding.message


@pytest.mark.parametrize("kind", ["pixels", "scaled", "one-hot"])
def test_borders_and_unused_categories_are_silent(kind):
    if kind == "one-hot":
        rng = np.random.default_rng(0)
        x, y = np.eye(20)[rng.integers(0, 12, 500)], rng.integers(0, 2, 500)
    else:
        x, y = load_digits(return_X_y=True)
        x = (x - x.mean()) / x.std() if kind == "scaled" else x
    assert not constant(inspect_dataset(data(x, y)))


def test_the_start_token_of_every_row_is_silent():
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 40, (300, 12))
    ids[:, 0], ids[:, 1], ids[:, 11] = 2, 4, 3
    rows = {"input_ids": ids.tolist(), "labels": rng.integers(0, 2, 300).tolist()}
    assert not constant(inspect_dataset(datasets.Dataset.from_dict(rows), label="labels"))


def test_elements_add_up():
    x, _ = vectors(rows=100)
    x[:, 4] = 2.0
    source = read_split("train", data(x, np.zeros(100, int)))
    column = source.data.with_format("arrow")[:]["features"].combine_chunks()
    parts = []
    for low, high in ((0, 30), (30, 31), (31, 100)):
        parts.append(Summary())
        parts[-1].add(column.slice(low, high - low), np.arange(low, high))
    whole = parts[0].merge(parts[1]).merge(parts[2])
    assert whole.still.tolist() == [4]
    assert parts[0].merge(Summary()).still.tolist() == [4]
    assert np.allclose(whole.element_low, x.min(axis=0))
    uneven = Summary()
    uneven.add(datasets.Dataset.from_dict({"a": [[1.0], [1.0, 2.0]]}).data.column(0).chunk(0),
               np.arange(2))  # fmt: skip
    assert not len(uneven.still)
    assert not len(whole.merge(uneven).still)


class Linear(nn.Module):
    def __init__(self, width=12):
        super().__init__()
        self.head = nn.Linear(width, 2)

    def forward(self, features=None, labels=None):
        logits = self.head(features)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("hidden", [True, False])
def test_the_label_as_an_element_is_found_before_a_run(hidden, tmp_path):
    x, y = vectors()
    if hidden:
        x[:, 5] = y
    trainer = worlds.trainer(Linear(), data(x, y).with_format("torch"), None, tmp_path)
    recipe = hf_recipe.attach(trainer, select=["target-in-input"])
    recipe.preflight()
    recipe.detach()
    assert not recipe.report.crashed
    assert [f.subject for f in recipe.report.flat] == (["features[5]"] if hidden else [])
    assert "target-in-input" in recipe.report.ran


def test_lists_within_lists_have_no_elements():
    """Four answers a row, each of as many tokens as it has."""
    rng = np.random.default_rng(0)
    choices = [[[5] * n for n in rng.integers(1, 9, 4)] for _ in range(60)]
    answers = datasets.Dataset.from_dict(
        {"input_ids": choices, "labels": rng.integers(0, 4, 60).tolist()}
    )
    report = inspect_dataset(answers, label="labels")
    assert report.crashed == {}
    assert not constant(report)
