"""What goes into the loss, and whether it can be trusted: planted, with fixed twins."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

from hf_recipe.baselines.loss_operands import (
    LogitsGiven,
    Operands,
    probabilities_given,
    shapes_broadcast,
)
from hf_recipe.baselines.loss_pairs import PulledClasses, padding_counts, pairs_mixed
from hf_recipe.baselines.repeatability import Repeated, passes_differ
from hf_recipe.baselines.vectorise import OneByOne, batched_differs
from tests.gallery.harness import Case, alarms, assert_found, assert_silent, everything, run
from tests.models import VOCABULARY, arguments, points, progressions

OURS = ["loss-broadcast", "double-softmax", "eval-nondeterministic", "padded-loss-differs"]


# ---------------------------------------------------------------- literal numbers


def test_shapes():
    assert list(shapes_broadcast(Operands((), (), (), 4))) == []
    assert list(shapes_broadcast(Operands(("-",), ((1, 1),), ((1,),), 1))) == []
    assert len(list(shapes_broadcast(Operands(("mse_loss",), ((4, 1),), ((4,),), 4)))) == 1


def test_probabilities():
    assert list(probabilities_given(LogitsGiven(3))) == []
    (fault,) = probabilities_given(LogitsGiven(1, ("cross_entropy",), ("softmax",), 4))
    assert "a softmax's output" in fault.message
    (fault,) = probabilities_given(LogitsGiven(1, ("nll_loss",), ("softmax",), 4))
    assert "expects log-probabilities" in fault.message
    assert "log_softmax" in fault.fix


@pytest.mark.parametrize(
    ("measured", "severity"),
    [
        (Repeated((1.0, 1.0), 0.0, (), True), None),
        (Repeated((1.0, 1.0 + 1e-6), 1e-6, (), True), None),
        (Repeated((1.0, 1.001), 5e-3, (), True, half=True), None),
        (Repeated((1.0, 1.1), 0.2, ("dropout(p=0.3)",), True), "error"),
        (Repeated((1.0, 1.1), 0.2, (), True), "error"),
        (Repeated((1.0, 1.1), 0.0, (), True), "note"),
        (Repeated((1.0, 1.1), None, (), False), "note"),
        (Repeated((1.0, 1.0), math.nan, (), True), "error"),
    ],
)
def test_two_passes(measured, severity):
    assert [f.severity for f in passes_differ(measured)] == [severity] * bool(severity)


def rows(batched, difference=0.0, alone=(1.0, 2.0), supervised=(1, 3), left=False, padded=4):
    return OneByOne(batched, alone, supervised, (4, 8), 8, difference, left, padded)


@pytest.mark.parametrize(
    ("measured", "severity"),
    [
        (rows(1.5), []),  # each row weighs the same
        (rows(1.75), []),  # each label weighs the same
        (rows(1.9), []),  # weighted in a way of its own
        (rows(0.0, alone=(0.0, 0.0)), []),
        (rows(3.0), ["warning"]),
        (rows(1.75 * 12 / 16), ["warning"]),
        (rows(1.75, difference=0.4, left=True), ["warning"]),
        (rows(1.75, difference=0.4), ["note"]),
        (rows(math.nan), []),
    ],
)
def test_batched_against_one_by_one(measured, severity):
    assert [f.severity for f in batched_differs(measured)] == severity


@pytest.mark.parametrize(
    ("seen", "mixed", "padding"),
    [
        (PulledClasses(40, 40, 40, 4, 20, 0), 0, 0),
        (PulledClasses(40, 40, 18, 4, 20, 0), 1, 0),  # view() for transpose()
        (PulledClasses(40, 36, 36, 4, 20, 0), 0, 0),  # next tokens: one a row less
        (PulledClasses(40, 800, 2, 4, 20, 0), 0, 0),  # a teacher's distribution
        (PulledClasses(40, 800, 2, 4, 20, 20), 0, 1),  # ... on padding too
        (PulledClasses(40, 40, 40, 4, 5, 4), 0, 0),  # left padding's last place
        (PulledClasses(8, 8, 2, 4, 0, 0), 0, 0),
    ],
)
def test_outputs_and_the_labels_that_they_are_compared_with(seen, mixed, padding):
    assert (len(list(pairs_mixed(seen))), len(list(padding_counts(seen)))) == (mixed, padding)


# ---------------------------------------------------------------- planted


def trainer_of(folder, model, data, collator=None, kind=Trainer, **changes):
    return kind(
        model=model,
        args=arguments(folder, **{"max_steps": 3, **changes}),
        train_dataset=data,
        data_collator=collator,
    )


class Net(nn.Module):
    """A small network that returns its outputs through `last`."""

    def __init__(self, outputs, last, loss, noise=False):
        super().__init__()
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, outputs)
        self.last, self.loss, self.noise = last, loss, noise

    def forward(self, features=None, labels=None):
        hidden = self.body(features).tanh()
        hidden = nn.functional.dropout(
            hidden, 0.3, **({} if self.noise else {"training": self.training})
        )
        logits = self.last(self.head(hidden))
        return {"loss": self.loss(logits, labels), "logits": logits}


def targets(rows=64):
    return points(rows).map(lambda row: {"labels": float(sum(row["features"]))})


def squared(logits, labels):
    return ((logits - labels) ** 2).mean()


def broadcasting(loss):
    def build(folder, faulty):
        torch.manual_seed(0)
        last = nn.Identity() if faulty else nn.Flatten(0)
        return trainer_of(folder, Net(1, last, loss), targets())

    return build


def squashed(last):
    def build(folder, faulty):
        torch.manual_seed(0)
        chosen = last if faulty else nn.LogSoftmax(-1)
        return trainer_of(folder, Net(4, chosen, nn.CrossEntropyLoss()), points(64))

    return build


def binary(folder, faulty):
    def loss(logits, labels):
        return nn.functional.binary_cross_entropy_with_logits(
            logits, nn.functional.one_hot(labels, 4).float()
        )

    torch.manual_seed(0)
    last = nn.Sigmoid() if faulty else nn.Identity()
    return trainer_of(folder, Net(4, last, loss), points(64))


def without_the_logarithm(loss):
    def build(folder, faulty):
        torch.manual_seed(0)
        last = nn.Softmax(-1) if faulty else nn.LogSoftmax(-1)
        return trainer_of(folder, Net(4, last, loss), points(64))

    return build


def divergence(logs, labels):
    truth = nn.functional.one_hot(labels, 4).float() * 0.96 + 0.01
    return nn.functional.kl_div(logs, truth, reduction="batchmean")


def dropout_left_on(folder, faulty):
    torch.manual_seed(0)
    net = Net(4, nn.Identity(), nn.CrossEntropyLoss(), noise=faulty)
    return trainer_of(folder, net, points(64))


def summed(folder, faulty):
    torch.manual_seed(0)
    loss = nn.CrossEntropyLoss(reduction="sum" if faulty else "mean")
    return trainer_of(folder, Net(4, nn.Identity(), loss), points(64))


def ragged(rows=64):
    return [
        {"input_ids": row["input_ids"][: 6 + i % 7], "labels": row["labels"][: 6 + i % 7]}
        for i, row in enumerate(progressions(rows))
    ]


def padded(left=True, with_positions=False):
    def collate(rows):
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        for line, row in zip(ids, rows, strict=True):
            size = len(row["input_ids"])
            place = slice(width - size, None) if left else slice(size)
            line[place] = torch.tensor(row["input_ids"])
        mask = (ids != 0).long()
        batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": ids.masked_fill(ids == 0, -100),
        }
        if with_positions:
            batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        return batch

    return collate


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    return GPT2LMHeadModel(config)


def positions_from_the_padding(folder, faulty):
    return trainer_of(folder, gpt2(), ragged(), padded(with_positions=not faulty))


class Diluted(Trainer):
    """Divides the loss by all positions, padding included."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**{k: v for k, v in inputs.items() if k != "labels"})
        labels = inputs["labels"][:, 1:]
        each = nn.functional.cross_entropy(
            outputs.logits[:, :-1].transpose(1, 2), labels, reduction="none"
        )
        loss = each.sum() / (
            inputs["attention_mask"].numel() if self.faulty else (labels != -100).sum()
        )
        return (loss, outputs) if return_outputs else loss


def padding_counted(folder, faulty):
    trainer = trainer_of(folder, gpt2(), ragged(), padded(left=False), Diluted)
    trainer.faulty = faulty
    return trainer


CASES = [
    Case("loss-broadcast", broadcasting(squared), "error", train=False, name="difference"),
    Case("loss-broadcast", broadcasting(nn.functional.mse_loss), "error", train=False, name="mse"),
    Case("double-softmax", squashed(nn.Softmax(-1)), "error", train=False, name="softmax"),
    Case("double-softmax", squashed(nn.Sigmoid()), "error", train=False, name="sigmoid"),
    Case("double-softmax", binary, "error", train=False, name="binary"),
    Case("double-softmax", without_the_logarithm(nn.NLLLoss()), "error", train=False, name="nll"),
    Case("double-softmax", without_the_logarithm(divergence), "error", train=False, name="kl"),
    Case("eval-nondeterministic", dropout_left_on, "error", train=False, name="dropout"),
    Case("padded-loss-differs", summed, "warning", train=False, name="sum"),
    Case("padded-loss-differs", padding_counted, "warning", train=False, name="diluted"),
    Case("padded-loss-differs", positions_from_the_padding, "warning", train=False, name="left"),
]
for case in CASES:
    case.settings.setdefault("select", OURS)


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fault_is_found(case, tmp_path):
    assert_found(case, tmp_path)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fixed_twin_is_silent(case, tmp_path):
    assert_silent(case, tmp_path)


# ---------------------------------------------------------------- healthy, though odd


def weighted(logits, labels):
    return nn.functional.cross_entropy(logits, labels, weight=torch.tensor([1.0, 5.0, 0.2, 2.0]))


def contrastive(logits, labels):
    near = nn.functional.normalize(logits, dim=-1)
    return nn.functional.cross_entropy(near @ near.T / 0.1, torch.arange(len(near)))


def ranked(logits, labels):
    score = logits[:, 0]
    apart = score.unsqueeze(1) - score.unsqueeze(0)
    wanted = (labels.unsqueeze(1) - labels.unsqueeze(0)).sign()
    return nn.functional.softplus(-apart * wanted).mean()


@pytest.mark.parametrize("loss", [weighted, contrastive, ranked], ids=lambda f: f.__name__)
def test_losses_that_compare_or_weigh_rows_raise_no_alarm(loss, tmp_path):
    torch.manual_seed(0)
    trainer = trainer_of(tmp_path, Net(4, nn.Identity(), loss), points(64))
    report = run(trainer, train=False, select=[*OURS, "example-leak"])
    assert alarms(report) == set(), [f.message for f in everything(report)]
    assert set(OURS) <= set(report.ran)
