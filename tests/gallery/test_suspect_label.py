"""Wrong labels, seen by the margins of a training run, and runs that must not raise the alarm."""

import itertools
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, make_classification
from torch import nn
from transformers import Trainer

import hf_recipe
from tests.gallery.harness import Case, assert_found, assert_silent
from tests.models import arguments, classifier


class Network(nn.Module):
    def __init__(self, inputs, classes, hidden=(64,)):
        super().__init__()
        layers, widths = [], (inputs, *hidden)
        for before, width in itertools.pairwise(widths):
            layers += [nn.Linear(before, width), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], classes))

    def forward(self, features=None, labels=None):
        logits = self.net(features)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def trainer(folder, features, labels, hidden=(64,), **changes):
    torch.manual_seed(0)
    chosen = {
        "max_steps": -1,
        "num_train_epochs": 8,
        "per_device_train_batch_size": 32,
        "learning_rate": 3e-3,
        **changes,
    }
    data = datasets.Dataset.from_dict({"features": features.tolist(), "labels": labels.tolist()})
    model = Network(features.shape[1], int(labels.max()) + 1, hidden)
    return Trainer(model=model, args=arguments(folder, **chosen), train_dataset=data)


def digits(flips, **changes):
    def build(folder: Path, faulty: bool):
        pixels, labels = load_digits(return_X_y=True)
        if faulty:
            wrong = np.random.default_rng(0).random(len(labels)) < flips
            labels = np.where(wrong, (labels + 1) % 10, labels)
        return trainer(folder, (pixels - 4.9) / 6, labels, **changes)

    return build


ONLY = {"select": ["suspect-label"]}
CASES = [
    Case("suspect-label", digits(0.1), "warning", settings=ONLY),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fault_is_found(case, tmp_path):
    report = assert_found(case, tmp_path)
    labels = load_digits().target
    wrong = np.random.default_rng(0).random(len(labels)) < 0.1
    assert wrong[list(report.findings[0].examples)].mean() >= 0.9
    stored = json.loads((tmp_path / "recipe" / "report.json").read_text())
    assert "LabelSuspects" in {m["kind"] for m in stored["measurements"]}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_twin_is_silent(case, tmp_path):
    assert_silent(case, tmp_path)


def run_quietly(run):
    recipe = hf_recipe.attach(run, **ONLY)
    run.train()
    assert not recipe.report.crashed
    return recipe


@pytest.mark.parametrize("epochs", [1, 6])
@pytest.mark.parametrize("world", ["clusters", "rare", "overlap"])
def test_hard_but_clean_runs_are_silent(world, epochs, tmp_path):
    if world == "overlap":
        draw = np.random.default_rng(1)
        labels = draw.integers(0, 2, 800)
        features = draw.normal(size=(800, 6)) + labels[:, None] * 0.5
    else:
        weights = [0.93] if world == "rare" else None
        features, labels = make_classification(
            800, 20, n_informative=5, weights=weights, flip_y=0, random_state=1
        )
    recipe = run_quietly(trainer(tmp_path, features, labels, num_train_epochs=epochs))
    assert "suspect-label" in recipe.report.ran, recipe.report.skipped
    assert recipe.findings == []


@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_a_young_run_on_clean_digits_is_silent(epochs, tmp_path):
    """Where its first half ends one digit is not learnt yet, and others are surely mistaken."""
    pixels, labels = load_digits(return_X_y=True)
    changes = {"num_train_epochs": epochs, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    recipe = run_quietly(trainer(tmp_path, pixels / 16, labels, (128, 128), seed=0, **changes))
    assert "suspect-label" in recipe.report.ran
    assert recipe.findings == []


def test_a_resumed_run_keeps_its_first_half(tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 150, "num_train_epochs": 8}
    first = digits(0.1, **changes)(tmp_path, True)
    run_quietly(first)
    again = digits(0.1, **changes)(tmp_path, True)
    recipe = hf_recipe.attach(again, **ONLY)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-300"))  # past the half
    assert [f.check for f in recipe.findings] == ["suspect-label"]
    assert "labels" not in json.dumps(
        json.loads((tmp_path / "checkpoint-300" / "trainer_state.json").read_text())[
            "stateful_callbacks"
        ]["hf_recipe"]["margins"]
    )


def test_length_grouping_and_workers_keep_rows_and_labels_together(tmp_path):
    run = classifier(
        tmp_path,
        max_steps=-1,
        num_train_epochs=1,
        train_sampling_strategy="group_by_length",
        gradient_accumulation_steps=3,
        dataloader_num_workers=1,
    )
    watch = run_quietly(run).closer_look.margins
    assert watch.reason == ""
    assert watch.counts.max() == 1  # a row early in the run, which knows nothing yet, is not taken
    assert watch.labels.tolist() == run.train_dataset["labels"][:]
