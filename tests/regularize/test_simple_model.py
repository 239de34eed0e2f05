"""The simplest models as reference lines: known probabilities, and models that beat them or not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import BertForTokenClassification, Trainer

import hf_recipe
from hf_recipe.baselines.ngrams import NGram, Tagger
from hf_recipe.baselines.reference_models import Reference, ReferenceLines, fit
from hf_recipe.instruments.subject import Plan
from hf_recipe.instruments.window import Evaluation, Step, Window
from hf_recipe.regularize.simple_model import SIMPLE_MODEL_WINS as CHECK
from hf_recipe.regularize.simple_model import AgainstSimple, fold, verdict
from tests.gallery.harness import alarms
from tests.gallery.healthy import chains, vit
from tests.models import VOCABULARY, arguments, batchnorm, bert, llama, points, words

# ---------------------------------------------------------------- counting models


def test_a_bigram_mixes_by_the_number_of_kinds():
    model = NGram(2)
    rows = torch.tensor([[1, 2, 1, 2, 1, 3]])
    model.learn(rows, rows)
    # unigrams of positions 1..5: 2 twice, 1 twice, 3 once; after 1: 2 twice, 3 once
    unigram = {t: (c + 3 * 0.25) / 8 for t, c in {1: 2, 2: 2, 3: 1}.items()}
    assert model.chance([1], 2) == pytest.approx((2 + 2 * unigram[2]) / 5)
    assert model.chance([9], 3) == pytest.approx(unigram[3])
    total = sum(model.chance([1], t) for t in (1, 2, 3)) + model.chance([1], 99)
    assert total == pytest.approx(1.0)
    masked = torch.tensor([[-100, -100, -100, 2, -100, -100]])
    (loss,) = model.losses(rows, masked)
    assert loss == pytest.approx(-math.log(model.chance([1], 2)))
    assert math.isnan(model.losses(rows, torch.full_like(rows, -100))[0])
    with pytest.raises(ValueError, match="2 or 3"):
        NGram(4)


def test_a_trigram_knows_more_than_a_bigram_where_there_is_more():
    draw = np.random.default_rng(0)
    rows = draw.integers(0, 8, (400, 24))
    for t in range(2, 24):
        rows[:, t] = (rows[:, t - 1] + rows[:, t - 2]) % 8
    ids = torch.tensor(rows)
    losses = {}
    for order in (2, 3):
        model = NGram(order)
        model.learn(ids[:300], ids[:300])
        losses[order] = np.mean(model.losses(ids[300:], ids[300:]))
    assert losses[2] == pytest.approx(math.log(8), rel=0.1)
    assert losses[3] < 0.35


def test_a_tagger_counts_labels_by_token():
    model = Tagger()
    ids, labels = torch.tensor([[5, 5, 6, 7]]), torch.tensor([[0, 0, 1, -100]])
    model.learn(ids, labels)
    assert model.chance(5, 0) > 0.85
    assert model.chance(7, 0) == pytest.approx((2 + 1 / 3) / 4)
    assert model.losses(ids, labels)[0] < 0.35


def test_a_linear_fit_finds_a_line_and_not_an_exclusive_or():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(600, 2, generator=draw)
    line, crossed = (x[:, 0] > 0).long(), (x[:, 0] * x[:, 1] > 0).long()
    kind = "single_label_classification"
    assert fit(x, line, 2, kind, 0)[1] < 0.3
    assert fit(x, crossed, 2, kind, 0)[1] > 0.6
    assert fit(x, crossed, 2, kind, 64)[1] < 0.35


# ---------------------------------------------------------------- judging

RUN: dict[str, Any] = {
    "name": "linear", "simple": 0.5, "model": 0.5, "gain": 0.0, "standard_error": 0.004,
    "rows": 500, "steps": 100, "total_steps": 100,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected", "word"),
    [
        ({}, False, "as well"),
        ({"gain": -0.2, "model": 0.7}, False, "better"),
        ({"gain": 0.1, "model": 0.4}, True, None),
        ({"gain": 0.004}, None, None),
        ({"gain": 0.0, "standard_error": 0.1}, None, None),
        ({"gain": -0.2, "more_right": 0.05, "right_error": 0.01}, True, None),
        ({"gain": -0.2, "more_right": 0.01, "right_error": 0.01}, False, "better"),
        ({"steps": 10, "total_steps": 10}, False, None),
        ({"steps": 50}, False, None),
        ({"gain": math.nan}, None, None),
    ],
)
def test_the_verdict_on_numbers(changes, expected, word):
    run = AgainstSimple(**{**RUN, **changes})
    faults = list(CHECK.judge(run))
    assert verdict(run) is expected
    assert [word in fault.message for fault in faults] == ([True] if word else [])


def test_the_monitor_keeps_the_best_evaluation_and_tells_at_the_end():
    simple = Reference("linear", 0.5, (0.5, 0.4, 0.6), (1.0, 1.0, 0.0))
    seen = {"ReferenceLines": ReferenceLines("validation", 10, (simple,))}
    state: dict[str, Any] = {}
    steps = tuple(Step(i, 0.5, 1e-3) for i in (59, 60))
    told = []
    for window in (
        Window(evaluation=Evaluation(30, "validation", (0.6, 0.6, 0.6))),
        Window(
            evaluation=Evaluation(60, "validation", (0.5, 0.5, 0.5), (), {"eval_accuracy": 0.9})
        ),
        Window(evaluation=Evaluation(60, "other", (0.0, 0.0, 0.0))),
        Window(evaluation=Evaluation(60, "validation", (0.1,))),
        Window(steps=steps, ended=True, plan=Plan(60, 10, 8)),
    ):
        state, found = fold(state, window, seen)
        told += [found] if found else []
    (run,) = told
    assert (run.gain, run.rows, run.steps) == (pytest.approx(0.0), 3, 60)
    assert run.more_right == pytest.approx(0.9 - 2 / 3)
    assert fold({}, Window(ended=True), {}) == ({}, None)


# ---------------------------------------------------------------- real Trainers


def pairs(rows: int, seed: int) -> datasets.Dataset:
    """Whether two marker tokens stand in order: nothing that counts can tell."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(10, VOCABULARY, (rows, 6))
    labels = draw.integers(0, 2, rows)
    ids[:, 1] = np.where(labels == 1, 3, 4)
    ids[:, 4] = np.where(labels == 1, 4, 3)
    mask = np.ones_like(ids)
    return datasets.Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": mask.tolist(), "labels": labels.tolist()}
    )


def trained(folder: Path, model: Any, train: Any, held: Any, **changes: Any) -> Trainer:
    chosen = {"max_steps": 100, "learning_rate": 3e-3, **changes}
    return Trainer(
        model=model, args=arguments(folder, **chosen), train_dataset=train, eval_dataset=held
    )


def asked(trainer: Trainer) -> tuple[Any, Any]:
    recipe = hf_recipe.attach(trainer, select=["simple-model-wins"])
    trainer.train()
    state = torch.get_rng_state()
    run = recipe.compare_with_simple_models()
    assert recipe.report.crashed == {}
    assert torch.equal(torch.get_rng_state(), state)
    recipe.detach()
    return run, recipe.report


def test_a_model_that_reads_order_beats_counting(tmp_path: Path) -> None:
    trainer = trained(tmp_path, bert(2), pairs(1024, 1), pairs(200, 2), max_steps=250)
    run, report = asked(trainer)
    assert verdict(run) is True
    assert run.simple == pytest.approx(math.log(2), rel=0.1)
    assert alarms(report) == set()
    assert report.answers[-1].answer.startswith("yes")


def test_a_model_that_learned_nothing_loses_to_a_linear_one(tmp_path: Path) -> None:
    model = batchnorm()
    for parameter in model.body.parameters():
        torch.nn.init.zeros_(parameter)
        parameter.requires_grad_(False)
    run, report = asked(trained(tmp_path, model, points(512), points(200, seed=2)))
    assert run.gain < 0
    assert alarms(report) == {"simple-model-wins"}


def test_a_linear_world_is_answered_and_a_good_network_is_not_blamed(tmp_path: Path) -> None:
    run, report = asked(trained(tmp_path, batchnorm(), points(512), points(200, seed=2)))
    assert run.name in ("linear", "small MLP")
    assert verdict(run) is not True or run.gain > 0
    assert "Reference lines on validation" in {e.title for e in report.exhibits}


def tagging(rows: int, seed: int) -> datasets.Dataset:
    """Every token's label is told by the row's first token."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(10, VOCABULARY, (rows, 8))
    marks = draw.integers(0, 2, rows)
    ids[:, 0] = 3 + marks
    labels = np.repeat(marks[:, None], 8, axis=1)
    labels[:, 0] = -100
    return datasets.Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist(),
         "labels": labels.tolist()}
    )  # fmt: skip


def test_text_and_tags_have_their_own_simplest_models(tmp_path: Path) -> None:
    run, _ = asked(trained(tmp_path / "lm", llama(), chains(), chains(100, seed=2), max_steps=60))
    assert run.name in ("bigram", "trigram")
    assert run.simple < 2.5  # the chain's own entropy is 1.33 nats; log 62 is 4.1
    model = BertForTokenClassification(bert(3).config)
    run, _ = asked(
        trained(tmp_path / "tags", model, tagging(512, 1), tagging(100, 2), max_steps=120)
    )
    assert run.name == "tagger"
    assert verdict(run) is True


def test_reference_lines_before_training_are_compared_with_later(tmp_path: Path) -> None:
    trainer = trained(
        tmp_path, bert(2), pairs(1024, 1), pairs(200, 2), max_steps=250,
        eval_strategy="steps", eval_steps=125,
    )  # fmt: skip
    recipe = hf_recipe.attach(trainer, select=["simple-model-wins"])
    lines = recipe.compare_with_simple_models()
    assert isinstance(lines, ReferenceLines)
    assert {line.name for line in lines.lines} == {"linear", "small MLP"}
    trainer.train()
    assert recipe.report.ran["simple-model-wins"] == ["eval"]
    assert recipe.findings == []
    recipe.detach()


def test_pictures_are_pooled_and_a_set_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    trainer = vit(tmp_path, 3)
    recipe = hf_recipe.attach(trainer, select=["simple-model-wins"])
    assert recipe.compare_with_simple_models().best.loss < 0.5
    assert recipe.compare_with_simple_models("tset") is None
    assert "tset" in recipe.report.skipped["simple-model-wins"]
    recipe.detach()


def test_words_are_linear(tmp_path: Path) -> None:
    trainer = trained(tmp_path, bert(), words(), words(64, seed=2))
    recipe = hf_recipe.attach(trainer, select=["simple-model-wins"])
    assert recipe.compare_with_simple_models().best.loss < 0.3
    recipe.detach()
