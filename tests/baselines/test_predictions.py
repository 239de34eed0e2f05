"""Prediction dynamics: the fixed rows' numbers are the model's, and drawn as they moved."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer

import hf_recipe
from hf_recipe.baselines import predictions
from hf_recipe.baselines.predictions import CHANGES, SAMPLES, PredictionsFollowed
from hf_recipe.core.check import Skip
from hf_recipe.instruments.quiet import quiet
from hf_recipe.report import tracking
from hf_recipe.trainer.preflight import subject_of_trainer
from tests.models import arguments, bert, classifier, llama, progressions, words


class Letters:
    """A tokenizer as far as decoding goes: token 2 is "a", 3 is "b", ..."""

    def __len__(self) -> int:
        return 64

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(95 + i) for i in ids)


def subject_of(trainer: Trainer) -> Any:
    subject = subject_of_trainer(trainer, fresh=True)
    subject.processing_class = Letters()
    return subject


def test_the_numbers_are_the_model_s_own(tmp_path):
    trainer = classifier(tmp_path)
    subject = subject_of(trainer)
    with quiet(trainer.model, trainer=trainer):
        followed = PredictionsFollowed.begin(subject)
        batch = subject.batch("validation", size=8)
        trainer.model.eval()
        with torch.no_grad():
            chances = trainer.model(**batch.inputs).logits.softmax(-1)
    labels = batch.inputs["labels"]
    assert followed.split == "validation"
    assert followed.chances[0] == pytest.approx(chances[range(8), labels].tolist(), rel=1e-5)
    assert followed.said[0] == chances.argmax(-1).tolist()
    assert followed.texts[0] == [f"LABEL_{k}" for k in chances.argmax(-1).tolist()]
    assert followed.truths == [f"LABEL_{k}" for k in labels.tolist()]
    assert followed.numbers() == dict(
        zip([f"row {r}" for r in batch.rows], followed.chances[0], strict=True)
    )
    assert followed.exhibits() == []  # one moment is no course


def test_each_run_begins_anew_and_moments_are_thinned(tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "MOMENTS", 4)
    trainer = classifier(tmp_path)
    subject = subject_of(trainer)
    with quiet(trainer.model, trainer=trainer):
        first = PredictionsFollowed.begin(subject)
        for step in range(1, 7):
            first.look(subject, step)
        second = PredictionsFollowed.begin(subject)
    assert first.steps == [0, 4, 6]
    assert len(first.texts) == len(first.chances) == len(first.said) == 3
    assert second.steps == [0]
    assert first is not second


def test_the_largest_change_comes_first():
    followed = PredictionsFollowed(
        split="validation", steps=[0, 10, 20], rows=(7, 9), task="classification",
        chances=[[0.2, 0.5], [0.3, 0.9], [0.4, 0.1]], said=[[0, 1], [0, 0], [0, 1]],
        texts=[["cat", "dog"], ["cat", "cat"], ["cat", "dog"]], truths=["cat", "cat"],
    )  # fmt: skip
    curve, changes, samples = followed.exhibits()
    assert [line.name for line in curve.lines] == ["row 7", "row 9"]
    assert changes.title == CHANGES
    assert changes.rows[0] == ("row 9", 0.5, 0.1, pytest.approx(0.8), "10 to 20", 2)
    assert samples.title == SAMPLES
    assert samples.private
    assert samples.columns == ("row", "truth", "step 0", "step 10", "step 20")
    assert samples.rows[1] == (9, "cat", "dog", "cat", "dog")
    assert followed.numbers()["largest change"] == pytest.approx(0.8)


def test_next_tokens_are_decoded_beside_the_truth(tmp_path):
    data = progressions(64)
    trainer = Trainer(
        model=llama(), args=arguments(tmp_path, max_steps=60), train_dataset=data,
        eval_dataset=data,
    )  # fmt: skip
    subject = subject_of(trainer)
    with quiet(trainer.model, trainer=trainer):
        followed = PredictionsFollowed.begin(subject)
    assert followed.truths[0] == Letters().decode(data[followed.rows[0]]["input_ids"][1:])
    assert len(followed.texts[0][0]) == len(followed.truths[0]) == 15


class Run:
    """Takes what a run of W&B takes."""

    id = "1"

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def define_metric(self, name: str, **options: Any) -> None:
        pass

    def log_artifact(self, artifact: Any) -> None:
        pass


@pytest.mark.parametrize("consent", [False, True])
def test_a_run_of_wandb_gets_numbers_and_with_consent_samples(consent, tmp_path, monkeypatch):
    run = Run()
    monkeypatch.setattr(tracking, "wandb_run", lambda: run)
    trainer = classifier(tmp_path, max_steps=6, eval_strategy="steps", eval_steps=3)
    recipe = hf_recipe.attach(trainer, log_samples=consent)
    trainer.train()
    recipe.detach()
    assert recipe.report.crashed == {}
    followed = [
        values for values in run.logged if any("/predictions/row" in name for name in values)
    ]
    assert [values["train/global_step"] for values in followed] == [3, 6]
    assert all("recipe/predictions/largest change" in values for values in followed)
    tables = {name for values in run.logged for name in values if "predictions" in name}
    assert "recipe/largest-changes-of-predictions" in tables
    assert ("recipe/predictions-decoded" in tables) == consent


def test_what_has_no_prediction_of_its_own_is_left_alone(tmp_path):
    trainer = Trainer(
        model=bert(), args=arguments(tmp_path), train_dataset=words(32).to_iterable_dataset()
    )
    with pytest.raises(Skip, match="stream"):
        PredictionsFollowed.begin(subject_of(trainer))
    head = SimpleNamespace(task="segmentation")
    assert predictions.spoken(head, torch.zeros(3), 2, None) == ["", ""]
