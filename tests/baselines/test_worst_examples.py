import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import Trainer

import hf_recipe
from hf_recipe.baselines.worst_examples import Verdicts, confusions, slices, worst
from tests.models import arguments


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, pixels=None, labels=None):
        logits = self.net(pixels)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def rows_of(x, y):
    return [{"pixels": torch.tensor(a, dtype=torch.float32) / 16, "labels": int(b)}
            for a, b in zip(x, y, strict=True)]  # fmt: skip


def verdicts(**changes):
    values = {
        "rows": np.arange(6), "losses": np.array([0.1, 2.0, np.nan, 3.0, 0.2, np.inf]),
        "labels": np.array([0, 0, 1, 1, 2, 2]), "said": np.array([0, 1, 1, 0, 2, 1]),
        "sure": np.full(6, 0.9), "lengths": np.zeros(6, np.int64), "texts": ("",) * 6,
        "names": ("a", "b", "c"),
    }  # fmt: skip
    return Verdicts(**{**values, **changes})


def test_tables_of_literal_numbers():
    table = worst(verdicts(), "test")
    assert [row[0] for row in table.rows] == [5, 3, 1, 4, 0]
    assert table.private
    assert table.rows[1][:5] == (3, 3.0, "b", "a", 0.9)
    pairs = confusions(verdicts(), "test").rows
    assert {row[:3] for row in pairs} == {("a", "b", 1), ("b", "a", 1), ("c", "b", 1)}
    assert pairs[0][3] == 0.5
    plain = verdicts(said=np.full(6, -1))
    assert worst(plain, "test").columns == ("row", "loss", "")
    losses = np.array([*[0.1] * 20, *[2.0] * 20])
    long = Verdicts(
        np.arange(40), losses, np.full(40, -1), np.full(40, -1), np.full(40, np.nan),
        np.array([*range(5, 25), *range(100, 120)]), ("",) * 40, (),
    )  # fmt: skip
    shown = slices(long, "test").rows
    assert shown[0][0] == "all"
    assert shown[1][2] > 1.9
    assert "119 tokens" in shown[1][0] or "119 tokens" in shown[2][0]


def test_a_planted_confusable_pair_heads_the_list(tmp_path):
    x, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(y))
    x, y = x[order], y[order]
    swapped = np.isin(y, (3, 5)) & (rng.random(len(y)) < 0.4)
    noisy = np.where(swapped, 8 - y, y)
    trainer = Trainer(
        model=Small(),
        args=arguments(tmp_path, max_steps=120, learning_rate=1e-2,
                       per_device_train_batch_size=64, per_device_eval_batch_size=128),
        train_dataset=rows_of(x[:1200], y[:1200]),
        eval_dataset=rows_of(x[1200:], noisy[1200:]),
    )  # fmt: skip
    recipe = hf_recipe.attach(trainer)
    trainer.train()
    assert not recipe.report.crashed
    shown = {e.title: e for e in recipe.report.exhibits}
    pair = shown["Confusion pairs of validation"].rows[0]
    assert {pair[0], pair[1]} == {"3", "5"}
    for title in ("Highest losses of validation", "Most confident mistakes of validation"):
        top = [row[0] for row in shown[title].rows[:10]]
        assert np.mean(swapped[1200:][top]) >= 0.8
    assert shown["Slices of validation"].rows[1][0] in ("label 3", "label 5")


@pytest.mark.parametrize("name", ["Highest losses", "Confusion pairs", "Slices"])
def test_they_are_never_sent_away(name):
    made = {"Highest losses": worst, "Confusion pairs": confusions, "Slices": slices}[name]
    assert made(verdicts(), "test").private
