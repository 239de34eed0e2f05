"""Ordinary architectures, padded where they can be: no dependency may be called a fault."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertForMaskedLM,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    RobertaConfig,
    RobertaForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from scripts.benchmark_leaks import FUTURE, ROWS, run_case
from tests.gallery.harness import alarms, everything, run
from tests.gallery.healthy import images, resnet, vit
from tests.models import VOCABULARY, arguments, bert, llama

OURS = [
    "example-leak", "future-leak", "padding-leak", "packing-leak", "input-without-gradient",
    "padded-loss-differs", "loss-broadcast", "double-softmax", "eval-nondeterministic",
    "parameter-without-gradient", "unregistered-parameter",
]  # fmt: skip
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
         "intermediate_size": 32}  # fmt: skip


def text(labels, left=False):
    """Rows of unequal length, padded with 0; labels for each row, token or next token."""
    draw = torch.Generator().manual_seed(3)
    rows = [torch.randint(2, VOCABULARY, (6 + i % 7,), generator=draw) for i in range(64)]
    made = []
    for i, row in enumerate(rows):
        gap = torch.zeros(12 - len(row), dtype=torch.long)
        ids = torch.cat([gap, row] if left else [row, gap])
        target = {"row": torch.tensor(i % 4), "token": (ids % 3).masked_fill(ids == 0, -100),
                  "next": ids.masked_fill(ids == 0, -100)}[labels]  # fmt: skip
        made.append({"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": target})
    return made


def speech():
    draw = torch.Generator().manual_seed(3)
    return [{"input_values": torch.randn(800, generator=draw), "labels": torch.tensor([3, 4])}
            for _ in range(32)]  # fmt: skip


def pairs():
    """Text that ends in the token at which CLIP reads it, and pictures."""
    made = []
    for row, picture in zip(text("row"), images(64), strict=True):
        ids = row["input_ids"].clone()
        ids[int(row["attention_mask"].sum()) - 1] = 63
        pixels = picture["pixel_values"].expand(3, -1, -1).clone()
        made.append({"input_ids": ids, "attention_mask": row["attention_mask"],
                     "pixel_values": pixels, "return_loss": True})  # fmt: skip
    return made


def collate_pairs(rows):
    batch = {k: torch.stack([r[k] for r in rows]) for k in rows[0] if k != "return_loss"}
    return {**batch, "return_loss": True}


def wav2vec2():
    return Wav2Vec2ForCTC(
        Wav2Vec2Config(
            vocab_size=8, **SIZES, conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 4),
            num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, mask_time_prob=0.05,
            mask_time_length=2, pad_token_id=0, ctc_zero_infinity=True, hidden_dropout=0.1,
        )
    )  # fmt: skip


def clip():
    tower = {**SIZES, "projection_dim": 16}
    return CLIPModel(
        CLIPConfig(
            text_config={**tower, "vocab_size": VOCABULARY, "eos_token_id": 63, "bos_token_id": 1},
            vision_config={**tower, "image_size": 8, "patch_size": 4},
            projection_dim=16,
        )
    )


ZOO = {
    "BERT": lambda: (bert(), text("row")),
    "BERT masked": lambda: (BertForMaskedLM(bert().config), text("token")),
    "RoBERTa": lambda: (
        RobertaForTokenClassification(
            RobertaConfig(vocab_size=VOCABULARY, **SIZES, pad_token_id=0, num_labels=3)
        ),
        text("token", left=True),
    ),
    "GPT-2": lambda: (
        GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4)),
        text("next"),
    ),
    "Llama": lambda: (llama(pad_token_id=0), text("next", left=True)),
    "Llama classifier": lambda: (
        LlamaForSequenceClassification(llama(pad_token_id=0, num_labels=4).config),
        text("row"),
    ),
    "T5": lambda: (
        T5ForConditionalGeneration(
            T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=32, num_layers=1,
                     num_heads=4, decoder_start_token_id=0)
        ),
        text("next"),
    ),
    "Mixtral": lambda: (
        MixtralForCausalLM(
            MixtralConfig(vocab_size=VOCABULARY, **SIZES, num_key_value_heads=4,
                          num_local_experts=8, num_experts_per_tok=2, output_router_logits=True)
        ),
        text("next"),
    ),
    "wav2vec2": lambda: (wav2vec2(), speech()),
    "CLIP": lambda: (clip(), pairs()),
}  # fmt: skip


@pytest.mark.parametrize("name", ZOO)
def test_an_ordinary_model_is_silent(name, tmp_path):
    torch.manual_seed(0)
    model, data = ZOO[name]()
    model.accepts_loss_kwargs = False
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, remove_unused_columns=False),
        train_dataset=data,
        data_collator=collate_pairs if name == "CLIP" else None,
    )
    report = run(trainer, train=False, select=OURS)
    assert alarms(report) == set(), [(f.check, f.message) for f in everything(report)]
    assert "parameter-without-gradient" in report.ran
    if name in ("GPT-2", "Llama", "T5", "Mixtral"):
        assert {"future-leak", "padding-leak", "example-leak"} <= set(report.ran), report.skipped


@pytest.mark.parametrize("build", [vit, resnet], ids=lambda f: f.__name__)
def test_a_vision_model_is_silent(build, tmp_path):
    report = run(build(tmp_path, 3), train=False, select=OURS)
    assert alarms(report) == set(), [(f.check, f.message) for f in everything(report)]
    assert {"example-leak", "input-without-gradient"} <= set(report.ran)


@pytest.mark.parametrize(
    ("name", "check", "change"),
    [
        ("Llama", "future-leak", FUTURE["a hundredth of the next position"]),
        ("BERT", "padding-leak", None),
        ("ResNet", "example-leak", ROWS["a thousandth of the next row"]),
        ("T5", "example-leak", ROWS["less the batch's mean"]),
    ],
)
def test_a_planted_leak_is_found(name, check, change):
    """A sample of the benchmark's forty."""
    assert check in run_case(name, check, change)
