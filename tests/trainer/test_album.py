"""First-layer pictures and followed predictions: planted filters named, the run untouched."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import Trainer

import hf_recipe
from hf_recipe.baselines.first_layer import (
    FirstLayer,
    answer,
    first_layer,
    odd_filters,
    principal_shares,
    sheet,
    smoothness,
)
from hf_recipe.core.check import Probe
from hf_recipe.trainer.progress import shown
from tests.gallery.healthy import resnet, vit
from tests.models import arguments, bert, classifier, signature, words


def filters(count: int = 16, side: int = 7, smooth: bool = True) -> torch.Tensor:
    """Smooth waves, or noise of the same size."""
    draw = torch.Generator().manual_seed(0)
    grid = torch.linspace(-1, 1, side)
    angles = torch.rand(count, 3, generator=draw) * math.pi
    waves = torch.stack([
        torch.cos(a * 2 * grid[:, None] + b * 2 * grid[None] + c) for a, b, c in angles.tolist()
    ])  # fmt: skip
    noise = torch.randn(count, side, side, generator=draw)
    made = waves if smooth else noise
    return (
        (made / made.flatten(1).norm(dim=1)[:, None, None])[:, None].expand(-1, 3, -1, -1).clone()
    )


def layer(weights: torch.Tensor) -> FirstLayer:
    return FirstLayer("conv", "filters", weights, weights.flatten(1).norm(dim=1))


def test_planted_filters_are_named():
    weights = filters()
    weights[3] *= 0.001
    weights[5] *= 40
    weights[9] = filters(smooth=False)[9]
    assert odd_filters(layer(weights)) == {"dead": [3], "saturated": [5], "noisy": [9]}
    before = layer(filters(smooth=False))
    text = answer(before, layer(weights)).answer
    assert "1 dead (3); 1 saturated (5); 1 noisy (9)" in text
    weights[0, 0, 0, 0] = math.nan
    assert 0 in odd_filters(layer(weights))["saturated"]


def test_filters_as_they_should_be_are_not_odd():
    good, drawn = layer(filters()), layer(filters(smooth=False))
    assert odd_filters(good) == {"dead": [], "saturated": [], "noisy": []}
    assert sum(smoothness(good)) / 16 > 0.4 > 0.2 > abs(sum(smoothness(drawn)) / 16)
    assert "none is odd" in answer(drawn, good).answer
    assert "none is odd" in answer(drawn, drawn).answer  # rough pictures make rough filters
    assert smoothness(layer(filters(side=3))) == []


def test_principal_directions_of_known_rows():
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 8, generator=draw) * torch.tensor([3.0, 1, 1, 1, 1, 1, 1, 1])
    shares = principal_shares(rows)
    assert shares[0] == pytest.approx(9 / 16, abs=0.06)
    assert sum(shares) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("model", "name", "kind"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 5), nn.Flatten(), nn.Linear(8, 2)), "0", "filters"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 2)), "1", "weights"),
        (nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 2)), "0", "embeddings"),
    ],
)
def test_the_layer_that_the_inputs_meet(model, name, kind):
    found = first_layer(model)
    assert (found.name, found.kind) == (name, kind)
    if kind != "embeddings":
        picture = Image.open(io.BytesIO(base64.b64decode(sheet(found))))
        assert min(picture.size) >= 16
    assert first_layer(nn.Sequential(nn.ReLU())) is None
    assert first_layer(bert()).name == "bert.embeddings.word_embeddings"


# ---------------------------------------------------------------- whole runs


def attached(trainer: Trainer, **settings: Any) -> Any:
    recipe = hf_recipe.attach(trainer, **settings)
    trainer.train()
    assert recipe.report.crashed == {}
    recipe.detach()
    return recipe.report


def titles(report: Any) -> set[str]:
    return {exhibit.title for exhibit in report.exhibits}


def test_the_report_draws_pictures_and_predictions(tmp_path: Path) -> None:
    report = attached(vit(tmp_path, 3))
    curve = next(e for e in report.exhibits if e.title.startswith("Predictions of 8"))
    assert [len(line.x) for line in curve.lines] == [4] * 8  # before step 1, at 20, 40 and 60
    assert all(0 <= y <= 1 for line in curve.lines for y in line.y)
    assert sum(line.y[-1] for line in curve.lines) > sum(line.y[0] for line in curve.lines)
    (picture,) = [e for e in report.exhibits if e.title.startswith("First layer")]
    assert picture.labels == ("before training", "after training")
    assert not picture.private
    assert any("first layer" in a.question for a in report.answers)
    report.to_html(tmp_path / "page.html")
    assert "Largest changes of predictions" in (tmp_path / "page.html").read_text()


def test_a_dead_filter_of_a_real_run_is_named(tmp_path: Path) -> None:
    trainer = resnet(tmp_path, 3)
    convolution = next(m for m in trainer.model.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        convolution.weight[2] = 0
    convolution.weight.register_hook(lambda g: g.index_fill(0, torch.tensor([2]), 0.0))
    report = attached(trainer)
    told = next(a for a in report.answers if "first layer" in a.question)
    assert told.evidence["dead"] == [2]


def test_the_run_is_the_same_and_selected_checks_look_at_nothing(tmp_path: Path) -> None:
    changes = {"eval_strategy": "steps", "eval_steps": 5, "max_steps": 10}
    bare = classifier(tmp_path / "bare", **changes)
    bare.train()
    watched = classifier(tmp_path / "watched", **changes)
    report = attached(watched)
    assert signature(watched) == signature(bare)
    assert any(title.startswith("Predictions of 8") for title in titles(report))
    report = attached(classifier(tmp_path / "few", **changes), select=["hockey-stick"])
    assert not any(title.startswith(("Predictions", "First")) for title in titles(report))


def test_streams_and_own_modules_do_without(tmp_path: Path) -> None:
    trainer = Trainer(
        model=bert(),
        args=arguments(tmp_path, max_steps=2),
        train_dataset=words().to_iterable_dataset(),
    )
    assert not any(title.startswith("Predictions") for title in titles(attached(trainer)))


# ---------------------------------------------------------------- the bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("patience", "drawn"), [(0.0, True), (60.0, False)])
def test_the_bar_comes_after_a_while_and_at_a_terminal(patience, drawn):
    probes = [Probe(f"look at {i}", "static", (), lambda subject: ()) for i in range(3)]
    stream = Terminal()
    assert list(shown(probes, enabled=True, stream=stream, patience=patience)) == probes
    assert ("preflight" in stream.getvalue()) == drawn
    quiet = Terminal()
    assert list(shown(probes, enabled=False, stream=quiet, patience=0.0)) == probes
    assert list(shown(probes, enabled=True, stream=io.StringIO(), patience=0.0)) == probes
    assert quiet.getvalue() == ""
