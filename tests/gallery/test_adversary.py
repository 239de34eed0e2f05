"""Runs that once slipped through, or once were flagged for nothing; each stands for its cause."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMultipleChoice, Trainer

from tests.gallery.harness import Case, alarms, assert_found, everything, run
from tests.models import VOCABULARY, arguments, batchnorm, bert, points, words

EVALUATED: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 20}


def classifier(folder: Path, train: Any, evaluation: Any = None, **changes: Any) -> Trainer:
    if evaluation is None:
        evaluation = words(64, seed=2)
    return Trainer(
        model=bert(),
        args=arguments(folder, **{**EVALUATED, **changes}),
        train_dataset=train,
        eval_dataset=evaluation,
    )


# ---------------------------------------------------------------- faulty


def shuffled(folder: Path, faulty: bool) -> Trainer:
    """Labels that belong to other rows; the start's few rows are a poor sample of them."""

    def data(rows: int, seed: int) -> datasets.Dataset:
        found = words(rows, seed=seed)
        order = np.random.default_rng(seed).permutation(rows)
        labels = np.asarray(found["labels"])[order].tolist()
        return found.remove_columns("labels").add_column("labels", labels)

    return classifier(folder, data(400, 1), data(200, 2), max_steps=120, eval_steps=60)


def unread(folder: Path, faulty: bool) -> Trainer:
    """A head that gets zeros whatever comes in, with many classes."""
    model = batchnorm(classes=10)
    body = model.body.forward
    model.body.forward = lambda features: body(features) * 0
    return Trainer(
        model=model,
        args=arguments(folder, max_steps=80, **EVALUATED),
        train_dataset=points(600, classes=10),
        eval_dataset=points(300, classes=10, seed=2),
    )


class StepsTheScheduler(Trainer):
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        self.lr_scheduler.step()
        return loss


def hurried(accumulation: int) -> Any:
    def build(folder: Path, faulty: bool) -> Trainer:
        return StepsTheScheduler(
            model=bert(),
            args=arguments(folder, max_steps=30, gradient_accumulation_steps=accumulation),
            train_dataset=words(),
        )

    return build


def out_of_range(folder: Path, faulty: bool) -> Trainer:
    data = words()
    labels = [label + 1 for label in data["labels"]]
    return classifier(folder, data.remove_columns("labels").add_column("labels", labels))


def renamed(folder: Path, faulty: bool) -> Trainer:
    def named(rows: int, seed: int, names: list[str]) -> datasets.Dataset:
        feature = datasets.ClassLabel(names=names)
        return words(rows, seed=seed).cast_column("labels", feature)

    return classifier(folder, named(256, 1, ["a", "b", "c", "d"]), named(64, 2, list("acbd")))


FAULTY = [
    Case("input-ignored", shuffled, "warning", name="labels of other rows"),
    Case("input-without-gradient", unread, "warning", name="zeros into the head"),
    Case("schedule-decays-early", hurried(1), "error", name="training_step steps the scheduler"),
    Case("schedule-decays-early", hurried(2), "error", name="the same, accumulating"),
    Case("label-out-of-range", out_of_range, "error", train=False),
    Case("label-name-mismatch", renamed, "error", name="splits name classes in another order"),
]


@pytest.mark.parametrize("case", FAULTY, ids=str)
def test_the_fault_is_found_and_no_other(case: Case, tmp_path: Path) -> None:
    assert_found(case, tmp_path)


def test_nothing_is_run_on_rows_that_no_model_can_take(tmp_path: Path) -> None:
    report = run(out_of_range(tmp_path, True), train=False)
    assert "label-out-of-range" in report.skipped["initial-loss-unexpected"]


def test_a_nan_from_the_start_is_one_finding(tmp_path: Path) -> None:
    trainer = classifier(tmp_path, words(), max_steps=5)
    with torch.no_grad():
        trainer.model.classifier.weight[0, 0] = float("nan")
    report = run(trainer, select=["initial-loss-unexpected", "loss-not-finite"])
    assert alarms(report) == {"loss-not-finite"}
    assert "initial-loss-unexpected" in {f.check for f in everything(report)}


# ---------------------------------------------------------------- healthy


def transformed(folder: Path) -> Trainer:
    """Rows made on the fly: the stored label column has another name than the batch's."""

    def data(rows: int, seed: int) -> datasets.Dataset:
        found = words(rows, seed=seed).rename_column("labels", "label")

        def rename(rows: dict[str, Any]) -> dict[str, Any]:
            return {("labels" if k == "label" else k): v for k, v in rows.items()}

        found.set_transform(rename)
        return found

    return classifier(folder, data(256, 1), data(64, 2), remove_unused_columns=False)


def choices(folder: Path) -> Trainer:
    """One output per candidate, and as many classes as candidates."""

    def data(rows: int, seed: int) -> datasets.Dataset:
        draw = np.random.default_rng(seed)
        labels = draw.integers(0, 3, rows)
        ids = draw.integers(10, VOCABULARY, (rows, 3, 8))
        ids[np.arange(rows), labels, :2] = 4
        columns = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": labels}
        return datasets.Dataset.from_dict({k: v.tolist() for k, v in columns.items()})

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=1,
    )
    return Trainer(
        model=BertForMultipleChoice(config),
        args=arguments(folder, **EVALUATED),
        train_dataset=data(128, 1),
        eval_dataset=data(64, 2),
    )


def hardly_trained(folder: Path) -> Trainer:
    """Sixty small steps: a little better than blind, surely, and no more."""
    return classifier(folder, words(), words(300, seed=2), max_steps=60, learning_rate=2e-4)


@pytest.mark.parametrize("build", [transformed, choices, hardly_trained])
def test_a_healthy_run_is_left_alone(build: Any, tmp_path: Path) -> None:
    report = run(build(tmp_path))
    assert alarms(report) == set(), [(f.check, f.message) for f in everything(report)]
