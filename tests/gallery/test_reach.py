"""What the loss does not reach: planted through real Trainers, and their fixed twins."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertModel,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
)

from hf_recipe.baselines.gradient_reach import (
    ReachedParameters,
    Unreached,
    UnregisteredTensors,
    never_reached,
    outside_the_model,
)
from tests.gallery.harness import Case, alarms, assert_found, assert_silent, everything, run
from tests.gallery.healthy import images, vit
from tests.models import VOCABULARY, arguments, bert, llama, points, progressions, words

OURS = ["parameter-without-gradient", "unregistered-parameter"]


def trainer_of(folder, model, data, **changes):
    return Trainer(model=model, args=arguments(folder, **{"max_steps": 3, **changes}),
                   train_dataset=data)  # fmt: skip


# ---------------------------------------------------------------- literal numbers


def part(**changes):
    chosen = {"name": "extra", "tensors": 2, "elements": 20, "called": False, "own": True,
              "sparse": False, "adapter": False}  # fmt: skip
    return Unreached(**{**chosen, **changes})


def reach(*unreached, reached=10, trainable=12, zero=False, cut=False, reentrant=False):
    return ReachedParameters(trainable, reached, zero, cut, reentrant, unreached)


@pytest.mark.parametrize(
    ("measured", "severities"),
    [
        (reach(reached=12), []),
        (reach(reached=0), ["error"]),
        (reach(zero=True), ["error"]),
        (reach(part()), ["warning"]),
        (reach(part(own=False)), ["note"]),
        (reach(part(sparse=True)), []),
        (reach(part(called=True, own=False), cut=True), ["error"]),
        (reach(part(called=True, tensors=8), reached=4), ["error"]),
        (reach(part(adapter=True, own=False, called=True), reentrant=True), ["error"]),
    ],
)
def test_what_is_never_reached(measured, severities):
    assert [f.severity for f in never_reached(measured)] == severities


def test_outside_the_model():
    assert list(outside_the_model(UnregisteredTensors((), 0, 4))) == []
    (fault,) = outside_the_model(UnregisteredTensors(("layers[0].weight",), 12, 4))
    assert fault.subject == "layers"
    assert "12 numbers" in fault.message


# ---------------------------------------------------------------- planted


class Net(nn.Module):
    """A small network with one of several flaws."""

    def __init__(self, flaw=""):
        super().__init__()
        self.flaw = flaw
        self.body = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.head = nn.Linear(16, 4)
        layers = [nn.Linear(16, 16), nn.Linear(16, 16)]
        self.layers = layers if flaw == "list" else nn.ModuleList(layers)
        if flaw == "unused":
            self.extra = nn.Linear(16, 16)

    def forward(self, features=None, labels=None):
        hidden = self.body(features)
        for layer in self.layers:
            hidden = hidden + layer(hidden).tanh()
        if self.flaw == "detached":
            hidden = hidden.detach()
        logits = self.head(hidden)
        loss = nn.functional.cross_entropy(logits, labels)
        if self.flaw == "constant":
            loss = loss * 0 + 1.0
        return {"loss": loss, "logits": logits}


def net(flaw):
    def build(folder, faulty):
        torch.manual_seed(0)
        return trainer_of(folder, Net(flaw if faulty else ""), points(64))

    return build


def added_to_a_library_model(folder, faulty):
    model = bert()
    if faulty:
        model.projection = nn.Linear(32, 32)
    return trainer_of(folder, model, words(64))


def reentrant_checkpoints(folder, faulty):
    """Frozen embeddings: a checkpoint whose input needs no gradient gives none to its inside."""
    model = vit(folder, 0).model
    model.vit.embeddings.requires_grad_(False)
    return trainer_of(
        folder,
        model,
        images(64),
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": faulty},
    )


class Checkpointed(nn.Module):
    """Checkpoints its first block by hand; its inputs are data and need no gradient."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.body = nn.Linear(8, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, features=None, labels=None):
        if self.training:
            hidden = checkpoint(self.body, features, use_reentrant=self.reentrant)
        else:
            hidden = self.body(features)
        logits = self.head(hidden.tanh())
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def checkpointed_by_hand(folder, faulty):
    torch.manual_seed(0)
    return trainer_of(folder, Checkpointed(faulty), points(64))


CASES = [
    Case("parameter-without-gradient", net("unused"), "warning", train=False, name="unused"),
    Case("parameter-without-gradient", net("detached"), "error", train=False, name="detached"),
    Case("parameter-without-gradient", net("constant"), "error", train=False, name="constant"),
    Case("parameter-without-gradient", added_to_a_library_model, "warning", train=False,
         name="added"),
    Case("parameter-without-gradient", checkpointed_by_hand, "error", train=False, name="by-hand"),
    Case("parameter-without-gradient", reentrant_checkpoints, "error",
         name="reentrant"),
    Case("unregistered-parameter", net("list"), "error", train=False, name="list"),
]  # fmt: skip
for case in CASES:
    case.settings.setdefault("select", OURS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fault_is_found(case, tmp_path):
    assert_found(case, tmp_path)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fixed_twin_is_silent(case, tmp_path):
    assert_silent(case, tmp_path)


# ---------------------------------------------------------------- healthy, though odd


class Mean(nn.Module):
    """A mean over the last hidden states: the pooler that comes with BERT stays unused."""

    def __init__(self):
        super().__init__()
        self.bert = BertModel(bert().config)
        self.head = nn.Linear(32, 4)

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        logits = self.head(self.bert(input_ids, attention_mask).last_hidden_state.mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Experts(nn.Module):
    """Two experts of eight see a row."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 4) for _ in range(8))

    def forward(self, features=None, labels=None):
        weight, chosen = self.router(features).softmax(-1).topk(1)
        rows = [w * self.experts[int(c)](x) for w, c, x in zip(weight, chosen, features)]  # noqa: B905
        logits = torch.stack(rows)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def adapted():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def mixtral():
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, num_local_experts=8,
            num_experts_per_tok=1, output_router_logits=True,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("build", "data", "notes"),
    [
        (Mean, words, 1),
        (Experts, points, 0),
        (adapted, progressions, 0),
        (mixtral, progressions, 0),
    ],
    ids=["pooler", "experts", "LoRA", "mixtral"],
)
def test_sparse_and_optional_parts_raise_no_alarm(build, data, notes, tmp_path):
    report = run(trainer_of(tmp_path, build(), data(64)), train=False, select=OURS)
    assert alarms(report) == set(), [f.message for f in everything(report)]
    assert set(OURS) <= set(report.ran)
    assert len(everything(report)) == notes
