"""One batch: the floor on known labels, healthy models at it, broken ones with their cause."""

import math

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import hf_recipe
from hf_recipe.baselines.one_batch import (
    OneBatch,
    judge_one_batch,
    likeliest_cause,
    overfit_one_batch,
)
from hf_recipe.instruments.batches import Rows
from hf_recipe.instruments.subject import Subject
from scripts.benchmark_one_batch import attempt, healthy
from scripts.benchmark_one_batch import broken as faulty_losses
from tests.models import arguments, words
from tests.models import bert as tiny_bert

HEALTHY = {
    "rows": 8,
    "start": 2.3,
    "end": 0.01,
    "floor": 0.0,
    "scale": 2.0,
    "steps": 60,
    "rate": 0.03,
    "constant": 2.0,
    "gradient": 1.5,
    "spread": 3.0,
}


def measured(**changes):
    return OneBatch(**{**HEALTHY, **changes})


def test_at_the_floor_is_silent():
    assert list(judge_one_batch(measured())) == []
    assert list(judge_one_batch(measured(end=0.7, floor=0.69))) == []


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"end": 2.0}, "labels' frequencies"),
        ({"end": 2.3, "gradient": math.nan}, "detached"),
        ({"end": 2.3, "gradient": 0.0}, "exactly zero"),
        ({"end": 1.5, "repeatable": False}, "drawn anew"),
        ({"end": 2.0, "spread": 0.0}, "does not reach"),
        ({"end": 1.5, "trainable": 0.01}, "too few"),
        ({"end": 9.0}, "rises"),
        ({"start": -1.4, "end": -1.4, "negative": True}, "sign is turned"),
        ({"end": math.nan}, ""),
        ({"start": math.nan, "end": math.nan}, "not finite before"),
    ],
)
def test_above_the_floor_speaks_and_names_a_cause(changes, cause):
    (fault,) = judge_one_batch(measured(**changes))
    assert cause in fault.message
    assert cause in likeliest_cause(measured(**changes))[0]


# ------------------------------------------------------------------ real models


class Tokens:
    """Rows of tokens with a label each."""

    def __init__(self, labels, same=False):
        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(5, 30, (len(labels), 8), generator=generator)
        self.ids = ids[:1].expand_as(ids).clone() if same else ids
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": torch.tensor(self.labels[index])}


def stack(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def bert(**changes):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        num_labels=3,
        **changes,
    )
    return BertForSequenceClassification(config)


def subject(model, tmp_path, labels=(0, 1, 2, 0, 1, 2, 0, 1), same=False, loss=None, **args):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **args)
    data = Tokens(list(labels), same)
    return Subject(model, arguments, Rows(data, data, stack, "train"), {}, loss_function=loss)


def test_a_healthy_bert_reaches_it_and_is_put_back(tmp_path):
    model = bert()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    batch = overfit_one_batch(subject(model, tmp_path))
    assert batch.reached
    assert batch.accuracy == 1.0
    assert batch.steps <= 150
    assert list(judge_one_batch(batch)) == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_conflicting_labels_have_a_floor_and_reach_it(tmp_path):
    batch = overfit_one_batch(subject(bert(), tmp_path, (0, 0, 0, 1), same=True))
    assert batch.floor == pytest.approx(0.5623, abs=1e-3)  # entropy of 3/4, 1/4
    assert batch.conflicts == 4


def test_smoothing_has_a_floor(tmp_path):
    target = subject(bert(), tmp_path, label_smoothing_factor=0.1)

    def smooth(model, inputs, return_outputs=False):
        outputs = model(input_ids=inputs["input_ids"])
        loss = nn.functional.cross_entropy(outputs.logits, inputs["labels"], label_smoothing=0.1)
        return (loss, outputs) if return_outputs else loss

    target.loss_function = smooth
    batch = overfit_one_batch(target)
    p = 0.9 + 0.1 / 3
    q = 0.1 / 3
    assert batch.floor == pytest.approx(-p * math.log(p) - 2 * q * math.log(q), rel=1e-4)
    assert batch.reached


def broken(kind):
    def loss(model, inputs, return_outputs=False):
        outputs = model(input_ids=inputs["input_ids"])
        logits, labels = outputs.logits, inputs["labels"]
        if kind == "detached":
            logits = logits.detach()
        if kind == "shuffled":
            labels = labels[torch.randperm(len(labels))]
        if kind == "blind":
            logits = logits.mean(0, keepdim=True).expand_as(logits)
            outputs.logits = logits
        value = nn.functional.cross_entropy(logits, labels)
        value = -value if kind == "sign" else value
        return (value, outputs) if return_outputs else value

    return loss


@pytest.mark.parametrize(
    ("kind", "cause"),
    [("detached", "detached"), ("shuffled", "drawn anew"), ("blind", "does not reach")],
)
def test_broken_losses_are_found_with_their_cause(tmp_path, kind, cause):
    batch = overfit_one_batch(subject(bert(), tmp_path, loss=broken(kind)), max_steps=60)
    assert not batch.reached
    (fault,) = judge_one_batch(batch)
    assert cause in fault.message


def test_a_frozen_model_is_named(tmp_path):
    model = bert().requires_grad_(False)
    (fault,) = judge_one_batch(overfit_one_batch(subject(model, tmp_path)))
    assert "no parameter trains" in fault.message


def test_parameters_held_elsewhere_are_skipped_with_the_reason(tmp_path):
    trainer = Trainer(model=tiny_bert(), args=arguments(tmp_path), train_dataset=words(32))
    recipe = hf_recipe.attach(trainer)
    trainer.model.classifier.weight.ds_id = 1
    assert recipe.overfit_one_batch() is None
    assert "held elsewhere" in recipe.report.skipped["one-batch-not-overfit"]
    recipe.detach()


def test_targets_far_from_zero_and_masked_words_are_no_bug():
    """What SGD at its first rate does not reach; the benchmark has all nine kinds."""
    for name in ("BERT masked", "regression around 50"):
        found, same = attempt(*healthy()[name](), None)
        assert found.reached, (name, found.end)
        assert same
    found, same = attempt(*healthy()["BERT classifier"](), faulty_losses()["sign"])
    assert not found.reached
    assert same
