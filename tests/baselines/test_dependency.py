"""Rows that see each other, and rows that do not."""

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration, TrainingArguments

from hf_recipe.baselines.dependency import RowDependence, example_leak, row_dependence
from hf_recipe.core.config import Settings
from hf_recipe.examiner import Examiner
from hf_recipe.instruments.batches import Rows
from hf_recipe.instruments.quiet import quiet
from hf_recipe.instruments.subject import Subject
from tests.baselines.test_one_batch import Tokens, bert, stack


def test_judging_numbers():
    assert list(example_leak(RowDependence(4, 0.3, 0.0, "pixel_values"))) == []
    assert list(example_leak(RowDependence(4, 0.3, 1e-7, "pixel_values"))) == []
    assert list(example_leak(RowDependence(4, 0.0, 0.0, "pixel_values"))) == []
    assert len(list(example_leak(RowDependence(4, 0.3, 0.01, "pixel_values")))) == 1
    assert list(example_leak(RowDependence(4, 0.3, float("nan"), "x"))) == []  # proves nothing


class Mixing(nn.Module):
    """A view where a permute belongs: the batch axis is mixed; or BatchNorm, which is no fault."""

    def __init__(self, mixes):
        super().__init__()
        self.mixes = mixes
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x, labels=None):
        if self.mixes:
            x = x.t().reshape(x.shape)
        logits = self.head(self.norm(x))
        return (
            {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
            if (labels is not None)
            else {"logits": logits}
        )


class Numbers:
    def __init__(self):
        self.x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"x": self.x[index], "labels": torch.tensor(index % 3)}


def examine(model, data, tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    subject = Subject(model, arguments, Rows(data, data, stack, "train"), {})
    examiner = Examiner(Settings())
    examiner.examine(row_dependence, subject, guard=lambda: quiet(model))
    assert not examiner.report.crashed
    assert examiner.report.ran.get("example-leak") == ["probe"]
    return examiner.report.findings


@pytest.mark.parametrize("mixes", [False, True])
def test_a_view_in_the_place_of_a_permute(tmp_path, mixes):
    found = examine(Mixing(mixes), Numbers(), tmp_path)
    assert [f.check for f in found] == (["example-leak"] if mixes else [])


def test_a_healthy_bert_is_silent(tmp_path):
    assert examine(bert(), Tokens([0, 1, 2, 0]), tmp_path) == []


def test_softmax_over_the_batch_is_found(tmp_path):
    model = bert()
    model.classifier = nn.Sequential(model.classifier, nn.Softmax(dim=0))
    assert [f.check for f in examine(model, Tokens([0, 1, 2, 0]), tmp_path)] == ["example-leak"]


class NeedsLabels(nn.Module):
    """Computes its loss whether or not there are labels, and looks ids up by itself."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.embed(input_ids).mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def seq2seq():
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
            decoder_start_token_id=0,
        )
    )  # fmt: skip


class Pairs(Tokens):
    def __getitem__(self, index):
        row = super().__getitem__(index)
        return {**row, "labels": row["input_ids"].clone()}


def test_a_forward_that_needs_its_labels_is_silent(tmp_path):
    assert examine(NeedsLabels(), Tokens([0, 1, 2, 0]), tmp_path) == []


def test_an_encoder_decoder_is_silent(tmp_path):
    assert examine(seq2seq(), Pairs([0, 1, 2, 0]), tmp_path) == []
