"""The main job's input at other sizes, and the architecture it begins with."""

import pytest
import torch

from hf_recipe.runner.data import load
from hf_recipe.runner.models import build
from hf_recipe.runner.options import UsageError
from tests.runner.test_data import csv, options, table


def feed_of(chosen, tmp_path):
    data = load(chosen)
    return data, data.task.feeds[data.kind](data, chosen, tmp_path)


def test_pictures(tmp_path):
    chosen = options(tmp_path)
    data, feed = feed_of(chosen, tmp_path)
    whole = feed.rows("train")[0]["pixel_values"]
    half, larger = feed.scaled(0.5), feed.scaled(1.5)
    coarse = half.rows("train")[0]["pixel_values"]
    assert half.shape == feed.shape == (1, 8, 8)
    assert coarse.shape == whole.shape
    assert coarse.var() < whole.var()
    assert coarse.mean() == pytest.approx(float(whole.mean()), abs=1e-5)
    assert larger.rows("train")[0]["pixel_values"].shape == larger.shape == (1, 12, 12)
    assert [feed.size_of(s) for s in (0.5, 1.0, 1.5)] == ["4 px", "8 px", "12 px"]
    model = build(data, larger, chosen, "larger", 0.0)
    rows = torch.stack(
        [row["pixel_values"] for row in larger.rows("validation").__getitems__([0, 1])]
    )
    assert model(pixel_values=rows).logits.shape == (2, 10)
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (128, 3)


def test_columns_go_in_the_order_of_what_they_tell(tmp_path):
    lines = [f"{i * 7919 % 13},{i % 2 + i % 3 / 10},{'ab'[i % 2]}" for i in range(120)]
    path = csv(tmp_path, "noise,told,label\n" + "\n".join(lines) + "\n")
    _, feed = feed_of(options(tmp_path, train_file=path), tmp_path)
    rows = feed.scaled(0.5).rows("train").values
    assert rows.shape == feed.rows("train").values.shape
    assert rows[:, 0].abs().max() == 0
    assert torch.equal(rows[:, 1], feed.rows("train").values[:, 1])
    assert feed.size_of(0.5) == "1 of 2"


def test_texts(tmp_path):
    _, feed = feed_of(options(tmp_path, train_file=csv(tmp_path, table())), tmp_path)
    half = feed.scaled(0.5)
    longest = max(len(ids) for ids in half.rows("train")["input_ids"])
    assert longest == half.max_length == max(4, round(feed.max_length * 0.5))
    assert longest < max(len(ids) for ids in feed.rows("train")["input_ids"])


def test_an_architecture_by_name(tmp_path):
    chosen = options(tmp_path, architecture="vit-96x2")
    data, feed = feed_of(chosen, tmp_path)
    assert build(data, feed, chosen, "base", 0.0).config.hidden_size == 96
    assert build(data, feed, chosen, "student", 0.0).config.hidden_size == 64
    wrong = options(tmp_path, architecture="vit-tinny")
    with pytest.raises(UsageError, match="--architecture: no image architecture 'vit-tinny'"):
        build(data, feed, wrong, "base", 0.0)
