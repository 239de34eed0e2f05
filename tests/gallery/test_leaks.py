"""Dependencies that must not be: planted through real Trainers, and their fixed twins."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    DataCollatorWithFlattening,
    Trainer,
)

from tests.gallery.harness import Case, assert_found, assert_silent
from tests.models import VOCABULARY, arguments, bert, llama, points, progressions, words

OURS = ["example-leak", "future-leak", "padding-leak", "packing-leak"]


def trainer_of(folder, model, data, collator=None, kind=Trainer, **changes):
    chosen = {"max_steps": 3, **changes}
    return kind(
        model=model,
        args=arguments(folder, **chosen),
        train_dataset=data,
        data_collator=collator,
    )


# ---------------------------------------------------------------- rows


class Recurrent(nn.Module):
    """An LSTM that takes the batch axis for time."""

    def __init__(self, faulty):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.rnn = nn.LSTM(8, 8, batch_first=not faulty)
        self.head = nn.Linear(8, 4)

    def forward(self, input_ids=None, labels=None):
        logits = self.head(self.rnn(self.embed(input_ids))[0][:, -1])
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def batch_as_time(folder, faulty):
    torch.manual_seed(0)
    return trainer_of(folder, Recurrent(faulty), words(64))


class Norm(nn.Module):
    """Statistics over the batch, in evaluation too."""

    def __init__(self, faulty):
        super().__init__()
        self.faulty = faulty
        self.body = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, features=None, labels=None):
        hidden = self.body(features)
        hidden = hidden - hidden.mean(0) if self.faulty else self.norm(hidden)
        logits = self.head(hidden.relu())
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def centred_over_the_batch(folder, faulty):
    torch.manual_seed(0)
    return trainer_of(folder, Norm(faulty), points(64))


# ---------------------------------------------------------------- the future


def unmasked(folder, faulty):
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, is_decoder=not faulty,
    )  # fmt: skip
    torch.manual_seed(0)
    return trainer_of(folder, BertLMHeadModel(config), progressions(64))


class Own(nn.Module):
    """A language model of one's own, whose mask lets each position see the next."""

    def __init__(self, faulty):
        super().__init__()
        self.diagonal = 2 if faulty else 1
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, input_ids=None, labels=None):
        hidden = self.embed(input_ids)
        length = input_ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).triu(self.diagonal)
        logits = self.head(hidden + self.attend(hidden, hidden, hidden, attn_mask=mask)[0])
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


def off_by_one(folder, faulty):
    torch.manual_seed(0)
    return trainer_of(folder, Own(faulty), progressions(64))


# ---------------------------------------------------------------- padding


def ragged(rows=64):
    draw = torch.Generator().manual_seed(3)
    made = []
    for i in range(rows):
        length = 6 + i % 7
        ids = torch.randint(6, VOCABULARY, (length,), generator=draw)
        ids[1] = 2 + i % 4
        made.append({"input_ids": ids.tolist(), "labels": i % 4})
    return made


def padded(mask, left=False):
    def collate(rows):
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        for line, row in zip(ids, rows, strict=True):
            place = (
                slice(width - len(row["input_ids"]), None) if left else slice(len(row["input_ids"]))
            )
            line[place] = torch.tensor(row["input_ids"])
        batch = {"input_ids": ids, "labels": torch.tensor([row["labels"] for row in rows])}
        made = {"right": (ids != 0).long(), "ones": torch.ones_like(ids)}
        made["inverted"] = 1 - made["right"]
        return batch | ({"attention_mask": made[mask]} if mask in made else {})

    return collate


def masked(kind):
    def build(folder, faulty):
        collate = padded(kind if faulty else "right")
        return trainer_of(folder, bert(), ragged(), collate, remove_unused_columns=False)

    return build


class Forgetful(Trainer):
    """Calls the model without the mask that is in the batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], labels=inputs["labels"])
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def mask_lost_on_the_way(folder, faulty):
    kind = Forgetful if faulty else Trainer
    return trainer_of(folder, bert(), ragged(), padded("right"), kind)


class Pooling(BertForSequenceClassification):
    """A mean over all positions, or over the real ones."""

    def __init__(self, config, faulty=False):
        super().__init__(config)
        self.faulty = faulty

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        weight = torch.ones_like(attention_mask) if self.faulty else attention_mask
        weight = weight[..., None].float()
        logits = self.classifier((hidden * weight).sum(1) / weight.sum(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def pooled_over_padding(folder, faulty):
    torch.manual_seed(0)
    model = Pooling(bert().config, faulty)
    return trainer_of(folder, model, ragged(), padded("right"))


# ---------------------------------------------------------------- packing


def lines(rows=64):
    return [
        {"input_ids": row["input_ids"][: 5 + i % 6], "labels": row["labels"][: 5 + i % 6]}
        for i, row in enumerate(progressions(rows))
    ]


class Masked(DataCollatorWithFlattening):
    """Returns an attention mask of ones besides the positions."""

    def __call__(self, rows):
        batch = super().__call__(rows)
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


def packed(folder, faulty):
    collate = Masked() if faulty else DataCollatorWithFlattening()
    return trainer_of(folder, llama(), lines(), collate)


def packed_with_cache(folder, faulty):
    return trainer_of(folder, llama(), lines(), DataCollatorWithFlattening(), use_cache=faulty)


CASES = [
    Case("example-leak", batch_as_time, "error", train=False, name="batch-as-time"),
    Case("example-leak", centred_over_the_batch, "error", train=False, name="centred"),
    Case("future-leak", unmasked, "error", train=False, name="no-causal-mask"),
    Case("future-leak", off_by_one, "error", train=False, name="mask-off-by-one"),
    Case("padding-leak", masked("absent"), "error", train=False, name="mask-absent"),
    Case("padding-leak", masked("ones"), "error", train=False, name="mask-ones"),
    Case("padding-leak", masked("inverted"), "error", train=False, name="mask-inverted"),
    Case("padding-leak", mask_lost_on_the_way, "error", train=False, name="mask-lost"),
    Case("padding-leak", pooled_over_padding, "error", train=False, name="pooled-over-padding"),
    Case("packing-leak", packed, "error", train=False, name="mask-of-ones"),
    Case("packing-leak", packed_with_cache, "error", train=False, name="cache"),
]
for case in CASES:  # our own checks alone: others have their own cases
    case.settings.setdefault("select", OURS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fault_is_found(case, tmp_path):
    assert_found(case, tmp_path)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fixed_twin_is_silent(case, tmp_path):
    assert_silent(case, tmp_path)
