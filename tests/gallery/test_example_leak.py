"""Rows that see each other, in many ways, and rows that may: found, and left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_recipe.baselines.dependency import RowDependence, example_leak
from tests.gallery.harness import alarms, everything, run
from tests.models import arguments, batchnorm, bert, points, words

LENGTH, WIDTH, CLASSES = 6, 8, 4


class Reader(nn.Module):
    """Sequences of numbers -> one class a row; `mix` does to (rows, length, width) what it does."""

    def __init__(self, mix: Any = None, last: Any = None, parts: Any = None) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.parts = parts
        self.mix, self.last = mix, last

    def forward(self, x: Any = None, labels: Any = None) -> SequenceClassifierOutput:
        h = torch.tanh(self.first(x))
        if self.mix is not None:
            h = self.mix(self, h)
        logits = self.head(h.mean(1))
        if self.last is not None:
            logits = self.last(logits)
        return SequenceClassifierOutput(loss=F.cross_entropy(logits, labels), logits=logits)


def lstm(batch_first: bool) -> nn.Module:
    return nn.LSTM(WIDTH, WIDTH, batch_first=batch_first)


def through_lstm(self: Any, h: torch.Tensor) -> torch.Tensor:
    return self.parts(h)[0]


def attention(self: Any, h: torch.Tensor) -> torch.Tensor:
    flat = h.reshape(1, -1, WIDTH)  # all rows as one sequence, and no mask between them
    return F.scaled_dot_product_attention(flat, flat, flat).reshape(h.shape)


def row_0(self: Any, h: torch.Tensor) -> torch.Tensor:
    return h + 0.01 * h[:1]


def neighbour(self: Any, h: torch.Tensor) -> torch.Tensor:
    return torch.cat([h[1:], h[:1]]) * 1e-3 + h


LEAKS: dict[str, Any] = {
    "LSTM along the batch": lambda: Reader(through_lstm, parts=lstm(False)),
    "a view in the place of a permute": lambda: Reader(
        lambda self, h: h.transpose(0, 1).reshape(len(h), LENGTH, WIDTH)
    ),
    "softmax over the rows": lambda: Reader(last=lambda z: z.softmax(0)),
    "attention over all rows": lambda: Reader(attention),
    "less the batch's mean": lambda: Reader(lambda self, h: h - h.mean(0, keepdim=True)),
    "row 0 in every row": lambda: Reader(row_0),
    "a thousandth of the next row": lambda: Reader(neighbour),
    "a sum that runs along the rows": lambda: Reader(lambda self, h: h.cumsum(0)),
    "scaled by the batch's largest": lambda: Reader(lambda self, h: h / h.abs().amax((0, 1))),
    "batch statistics in evaluation too": lambda: Reader(
        lambda self, h: self.parts(h.transpose(1, 2)).transpose(1, 2),
        parts=nn.BatchNorm1d(WIDTH, track_running_stats=False),
    ),
}


def unlike(self: Any, h: torch.Tensor) -> torch.Tensor:
    return self.parts(h.transpose(1, 2)).transpose(1, 2)


def experts(self: Any, h: torch.Tensor) -> torch.Tensor:
    """Top-1 routing; the balance between experts is the batch's affair, and a term of the loss."""
    weights = self.parts[0](h).softmax(-1)
    best = weights.argmax(-1)
    made = torch.stack([expert(h) for expert in self.parts[1:]], -2)
    return made.gather(-2, best[..., None, None].expand(*best.shape, 1, WIDTH))[..., 0, :]


HEALTHY: dict[str, Any] = {
    "plain": Reader,
    "LSTM along the sequence": lambda: Reader(through_lstm, parts=lstm(True)),
    "BatchNorm": lambda: Reader(unlike, parts=nn.BatchNorm1d(WIDTH)),
    "GroupNorm": lambda: Reader(unlike, parts=nn.GroupNorm(2, WIDTH)),
    "InstanceNorm": lambda: Reader(unlike, parts=nn.InstanceNorm1d(WIDTH)),
    "attention within a row": lambda: Reader(
        lambda self, h: F.scaled_dot_product_attention(h, h, h)
    ),
    "experts": lambda: Reader(
        experts, parts=nn.ModuleList([nn.Linear(WIDTH, 3), *[nn.Linear(WIDTH, WIDTH)] * 3])
    ),
}


def sequences(rows: int = 64) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(rows, LENGTH, WIDTH, generator=draw)
    return [{"x": v, "labels": torch.tensor(i % CLASSES)} for i, v in enumerate(values)]


def looked_at(folder: Path, model: nn.Module, data: Any, **changes: Any) -> Any:
    trainer = Trainer(
        model=model, args=arguments(folder, max_steps=2, **changes), train_dataset=data
    )
    return run(trainer, train=False, select=["example-leak", "loss-broadcast"])


@pytest.mark.parametrize("name", LEAKS)
def test_a_leak_is_found(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    report = looked_at(tmp_path, LEAKS[name](), sequences())
    assert alarms(report) == {"example-leak"}, report.skipped


@pytest.mark.parametrize("name", HEALTHY)
def test_rows_apart_are_silent(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    report = looked_at(tmp_path, HEALTHY[name](), sequences())
    assert everything(report) == []
    assert "example-leak" in report.ran, report.skipped


class Pairs(nn.Module):
    """Two towers: every row's partner against all others of the batch."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.whole = whole

    def forward(self, x: Any = None, labels: Any = None) -> dict[str, torch.Tensor]:
        a, b = (F.normalize(t(x).mean(1), dim=-1) for t in (self.left, self.right))
        scores = 10 * a @ b.T
        loss = F.cross_entropy(scores, torch.arange(len(x)))
        return {"loss": loss, "logits": scores if self.whole else a}


@pytest.mark.parametrize("whole", [True, False])
def test_negatives_in_the_batch_are_declared_or_in_the_loss(whole: bool, tmp_path: Path) -> None:
    report = looked_at(tmp_path, Pairs(whole), sequences())
    assert everything(report) == []
    assert not whole or "by design" in report.skipped["example-leak"]


class Squared(Trainer):
    """(rows, 1) against (rows,): every row with every row's target."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**inputs)
        loss = (outputs.logits[:, :1] - inputs["labels"].float()).square().mean()
        return (loss, outputs) if return_outputs else loss


def test_targets_that_broadcast_are_told_as_such(tmp_path: Path) -> None:
    trainer = Squared(
        model=Reader(), args=arguments(tmp_path, max_steps=2), train_dataset=sequences()
    )
    report = run(trainer, train=False, select=["example-leak", "loss-broadcast"])
    assert alarms(report) == {"loss-broadcast"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("build", [lambda: (bert(), words()), lambda: (batchnorm(), points())])
def test_broken_numbers_are_no_leak(build: Any, value: float, tmp_path: Path) -> None:
    model, data = build()
    with torch.no_grad():
        next(iter(model.parameters())).view(-1)[:] = value
    leaks = ["example-leak", "future-leak", "padding-leak", "input-without-gradient"]
    trainer = Trainer(model=model, args=arguments(tmp_path, max_steps=2), train_dataset=data)
    report = run(trainer, train=False, select=leaks)
    assert everything(report) == []
    assert "not finite" in report.skipped["example-leak"]


def test_numbers_that_are_none_are_not_judged() -> None:
    nan = float("nan")
    assert list(example_leak(RowDependence(4, nan, nan, "x"))) == []
    assert list(example_leak(RowDependence(4, 1.0, nan, "x"))) == []
    assert len(list(example_leak(RowDependence(4, 1.0, 1e-3, "x")))) == 1
    assert len(list(example_leak(RowDependence(4, 0.0, 1e-3, "x")))) == 1
