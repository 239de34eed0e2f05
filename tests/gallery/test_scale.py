"""Inputs and targets far from unit scale, and their healthy twins, through a real Trainer."""

import datasets
import pytest
import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import nn
from transformers import Trainer
from transformers.modeling_outputs import SequenceClassifierOutput

from tests.gallery.harness import Case, assert_found, assert_silent, everything, run
from tests.gallery.healthy import Regression, images, resnet, vit
from tests.models import BatchNormMLP, NormConfig, arguments


def _vit(folder, factor, make=vit):
    trainer = make(folder, 5)
    if factor is None:
        return trainer

    def change(rows):
        # 0..1 as pictures are, times the factor
        return [
            {**row, "pixel_values": ((row["pixel_values"] + 2) / 5).clamp(0, 1) * factor}
            for row in rows
        ]

    trainer.train_dataset = change(images(seed=6, side=16 if make is resnet else 8))
    trainer.eval_dataset = change(images(64, seed=1006, side=16 if make is resnet else 8))
    return trainer


def raw_pixels(folder, faulty):
    return _vit(folder, 255.0 if faulty else None)


def scaled_twice(folder, faulty):
    return _vit(folder, 1 / 255 if faulty else None, resnet)


class Plain(nn.Module):
    """An MLP without any normalisation of its own, or with one first."""

    def __init__(self, width, outputs=4, first=None):
        super().__init__()
        self.first = first or nn.Identity()
        self.body = nn.Sequential(nn.Linear(width, 32), nn.Tanh())
        self.head = nn.Linear(32, outputs)
        self.outputs = outputs

    def forward(self, features=None, labels=None):
        z = self.head(self.body(self.first(features)))
        if self.outputs == 1:
            z = z.squeeze(-1)
            loss = nn.functional.mse_loss(z, labels) if labels is not None else None
        else:
            loss = nn.functional.cross_entropy(z, labels) if labels is not None else None
        return SequenceClassifierOutput(loss=loss, logits=z)


def _digits(folder, factor=1 / 16, first=None):
    x, y = load_digits(return_X_y=True)
    data = datasets.Dataset.from_dict({"features": (x * factor).tolist(), "labels": y.tolist()})
    torch.manual_seed(0)
    return Trainer(
        model=Plain(64, 10, first),
        args=arguments(folder, max_steps=60),
        train_dataset=data.select(range(1000)),
        eval_dataset=data.select(range(1000, 1300)),
    )


def digits_of_255(folder, faulty):
    return _digits(folder, 255 / 16 if faulty else 1 / 16)


def raw_units(folder, faulty):
    """One column of five in square metres."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(300, 5, generator=draw)
    y = (x[:, 0] > 0).long()
    if faulty:
        x[:, 2] = x[:, 2] * 900 + 4000
    data = datasets.Dataset.from_dict({"features": x.tolist(), "labels": y.tolist()})
    torch.manual_seed(0)
    return Trainer(
        model=Plain(5, 2),
        args=arguments(folder, max_steps=40),
        train_dataset=data.select(range(240)),
        eval_dataset=data.select(range(240, 300)),
    )


INPUTS = [
    Case("unscaled-input", raw_pixels, "warning", train=False, name="raw pixels into a ViT"),
    Case("unscaled-input", scaled_twice, "warning", train=False, name="pixels over 255 twice"),
    Case("unscaled-input", digits_of_255, "warning", train=False, name="digits times 255"),
    Case("unscaled-input", raw_units, "warning", name="raw units"),
]


def diabetes(folder, scale, model=None):
    x, y = load_diabetes(return_X_y=True)
    y = (y - y.mean()) / y.std() if scale == 1.0 else y * scale
    data = datasets.Dataset.from_dict({"features": (x * 20).tolist(), "labels": y.tolist()})
    torch.manual_seed(0)
    return Trainer(
        model=model if model is not None else Plain(10, 1),
        args=arguments(folder, max_steps=60, eval_strategy="steps", eval_steps=20),
        train_dataset=data.select(range(350)),
        eval_dataset=data.select(range(350, 442)),
    )


TARGETS = [
    Case("unscaled-target", lambda f, x: diabetes(f, 1e4 if x else 1.0), "warning", name="N09"),
    Case("unscaled-target", lambda f, x: diabetes(f, 1e-5 if x else 1.0), "warning", name="N10"),
    Case("unscaled-target", lambda f, x: diabetes(f, 1.001 if x else 1.0), "warning", name="152"),
]


@pytest.mark.parametrize("case", [*INPUTS, *TARGETS], ids=str)
def test_fault_is_found(case, tmp_path):
    assert_found(case, tmp_path)


@pytest.mark.parametrize("case", [*INPUTS, *TARGETS], ids=str)
def test_twin_is_silent(case, tmp_path):
    if case.check == "unscaled-target" and case.name != "N09":
        pytest.skip("the same twin")
    assert_silent(case, tmp_path)


def _silent(trainer, check, train=False):
    report = run(trainer, train=train)
    told = [(f.check, f.message) for f in everything(report)]
    assert check not in {name for name, _ in told}, told
    return report


class Rescale(nn.Module):
    def forward(self, x):
        return x / 255


class BatchNormFirst(BatchNormMLP):
    def __init__(self, config):
        super().__init__(config)
        self.body = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 16), nn.ReLU())


@pytest.mark.parametrize("first", [Rescale(), nn.BatchNorm1d(64), nn.LayerNorm(64)])
def test_a_model_that_scales_its_inputs_is_left_alone(first, tmp_path):
    report = _silent(_digits(tmp_path, 255 / 16, first), "unscaled-input")
    assert "unscaled-input" in report.ran


def test_one_hot_small_features_and_ids_are_left_alone(tmp_path):
    hot = torch.eye(500)[torch.randint(0, 500, (200,))]
    data = datasets.Dataset.from_dict({"features": hot.tolist(), "labels": [0, 1] * 100})
    trainer = Trainer(model=Plain(500, 2), args=arguments(tmp_path), train_dataset=data)
    report = _silent(trainer, "unscaled-input")
    assert "unscaled-input" in report.ran
    x, y = load_diabetes(return_X_y=True)  # as sklearn gives it: deviation 0.048
    data = datasets.Dataset.from_dict({"features": x.tolist(), "labels": (y > 150).astype(int)})
    trainer = Trainer(model=Plain(10, 2), args=arguments(tmp_path), train_dataset=data)
    _silent(trainer, "unscaled-input")


def test_a_trained_head_and_a_target_scaled_inside_are_left_alone(tmp_path):
    model = Plain(10, 1)
    trainer = diabetes(tmp_path, 1.001, model)
    trainer.args.max_steps, trainer.args.learning_rate = 600, 0.1
    trainer.train()
    _silent(diabetes(tmp_path, 1.001, model), "unscaled-target")

    class Inside(Plain):
        def forward(self, features=None, labels=None):
            return super().forward(features, None if labels is None else (labels - 152) / 77)

    report = _silent(diabetes(tmp_path, 1.001, Inside(10, 1)), "unscaled-target")
    assert "unscaled-target" in report.ran


@pytest.mark.parametrize(("mean", "spread"), [(2.6, 1.5), (7.0, 2.0), (0.5, 0.05), (0.0, 1.0)])
def test_ratings_and_shares_are_left_alone(mean, spread, tmp_path):
    x, _ = load_diabetes(return_X_y=True)
    y = mean + spread * x[:, 0] * 21
    data = datasets.Dataset.from_dict({"features": (x * 20).tolist(), "labels": y.tolist()})
    for model in (Plain(10, 1), _eight()):
        rows = data if isinstance(model, Plain) else _first_eight(data)
        trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=rows)
        _silent(trainer, "unscaled-target")


def _eight():
    return Regression(NormConfig(num_labels=1))


def _first_eight(data):
    return data.map(lambda row: {"features": row["features"][:8]})
