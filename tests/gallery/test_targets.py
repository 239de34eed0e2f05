"""Which token each output is pulled to: a shift forgotten, made twice, and losses done right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    BertForMaskedLM,
    BertForTokenClassification,
    LlamaForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)

from hf_recipe.data.targets import TargetsRead, targets_misplaced
from tests.gallery.harness import Case, alarms, assert_found, assert_silent, everything, run
from tests.models import VOCABULARY, arguments, bert, llama, progressions

NAME = "labels-shifted"


@pytest.mark.parametrize(
    ("seen", "word"),
    [
        (TargetsRead(40, 40, 2, 0, causal=True, reads_own=True), "copy its input"),
        (TargetsRead(40, 1, 2, 40, causal=True, reads_own=True), "shifted twice"),
        (TargetsRead(40, 1, 40, 2), None),
        (TargetsRead(40, 40, 40, 40, causal=True, reads_own=True), None),  # one repeated token
        (TargetsRead(40, 40, 2, 0, causal=False, reads_own=True), None),  # an autoencoder
        (TargetsRead(40, 40, 2, 0, causal=True, reads_own=False), None),  # shifted inside
        (TargetsRead(40, 30, 2, 0, causal=True, reads_own=True), None),  # distilled, denoised
        (TargetsRead(8, 8, 0, 0, causal=True, reads_own=True), None),
        (TargetsRead(0, 0, 0, 0), None),
    ],
)
def test_judging(seen, word):
    told = [fault.message for fault in targets_misplaced(seen)]
    assert len(told) == bool(word)
    assert word is None or word in told[0]


# ---------------------------------------------------------------- whole runs


class OwnLoss(Trainer):
    """Cross-entropy of a user's own, shifted or not."""

    shifts = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
        if self.shifts:
            logits, labels = logits[:, :-1], labels[:, 1:]
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
        return (loss, outputs) if return_outputs else loss


class Unshifted(OwnLoss):
    shifts = False


def trainer_of(folder, model, data, kind=Trainer, **given):
    model.accepts_loss_kwargs = False
    return kind(model=model, args=arguments(folder, max_steps=3), train_dataset=data, **given)


def forgotten(folder, faulty):
    return trainer_of(folder, llama(), progressions(64), Unshifted if faulty else OwnLoss)


def ahead(row: dict[str, Any]) -> dict[str, Any]:
    return {"labels": [*row["input_ids"][1:], -100]}


def twice(folder, faulty):
    """Labels that the data set shifts already, and a loss that shifts them too or does not."""
    kind = OwnLoss if faulty else Unshifted
    return trainer_of(folder, llama(), progressions(64).map(ahead), kind)


class Recurrent(nn.Module):
    """A language model of one's own, which takes no labels at all."""

    def __init__(self, shifts: bool, early: bool = False) -> None:
        super().__init__()
        self.shifts, self.early = shifts, early
        self.table = nn.Embedding(VOCABULARY, 16)
        self.body = nn.GRU(16, 16, batch_first=True)
        self.out = nn.Linear(16, VOCABULARY)

    def forward(self, input_ids=None, labels=None):
        hidden = self.table(input_ids)
        if self.early:  # each output reads what stands before its own token
            hidden = torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], 1)
        logits = self.out(self.body(hidden)[0])
        scores, ids = (logits[:, :-1], input_ids[:, 1:]) if self.shifts else (logits, input_ids)
        return {
            "loss": functional.cross_entropy(scores.flatten(0, 1), ids.flatten()),
            "logits": logits,
        }


def own_module(folder, faulty):
    torch.manual_seed(0)
    return trainer_of(folder, Recurrent(not faulty), progressions(64))


def t5():
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
                 decoder_start_token_id=0)
    )  # fmt: skip


def decoder_reads_its_labels(folder, faulty):
    data = progressions(64)
    if faulty:
        data = data.add_column("decoder_input_ids", data["labels"])
    return trainer_of(folder, t5(), data)


CASES = [
    Case(NAME, forgotten, "error", train=False, name="forgotten"),
    Case(NAME, twice, "error", train=False, name="twice"),
    Case(NAME, own_module, "error", train=False, name="own-module"),
    Case(NAME, decoder_reads_its_labels, "error", train=False, name="decoder"),
]
for case in CASES:
    case.settings.setdefault("select", [NAME])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fault_is_found(case, tmp_path):
    assert_found(case, tmp_path)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fixed_twin_is_silent(case, tmp_path):
    report = assert_silent(case, tmp_path)
    assert "probe" in report.ran[NAME]


def half(row: dict[str, Any]) -> dict[str, Any]:
    return {"labels": [-100] * 8 + row["input_ids"][8:]}


def masked(row: dict[str, Any]) -> dict[str, Any]:
    return {"input_ids": [1 if i % 5 == 2 else t for i, t in enumerate(row["input_ids"])]}


def tags(row: dict[str, Any]) -> dict[str, Any]:
    return {"labels": [t % 4 for t in row["input_ids"]]}


HEALTHY = {
    "prompt masked": lambda: (llama(), progressions(64).map(half), OwnLoss),
    "masked language model": lambda: (
        BertForMaskedLM(bert().config), progressions(64).map(masked), Unshifted
    ),
    "autoencoder": lambda: (BertForMaskedLM(bert().config), progressions(64), Unshifted),
    "tagger": lambda: (
        BertForTokenClassification(bert().config), progressions(64).map(tags), Trainer
    ),
    "causal tagger": lambda: (
        LlamaForTokenClassification(llama(num_labels=4).config),
        progressions(64).map(tags),
        Unshifted,
    ),
    "shifted inside": lambda: (Recurrent(False, early=True), progressions(64), Trainer),
}  # fmt: skip


@pytest.mark.parametrize("name", HEALTHY)
def test_losses_that_are_right_raise_no_alarm(name, tmp_path):
    model, data, kind = HEALTHY[name]()
    report = run(trainer_of(tmp_path, model, data, kind), train=False, select=[NAME])
    assert alarms(report) == set(), [f.message for f in everything(report)]
    assert "probe" in report.ran[NAME], report.skipped
