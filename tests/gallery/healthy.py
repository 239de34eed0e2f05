"""Healthy but tricky runs: legitimate ones that careless checks flag. All must stay silent.

Each builder takes (folder, seed) and returns a Trainer that is about to train well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from tests.models import (
    VOCABULARY,
    BatchNormMLP,
    NormConfig,
    arguments,
    batchnorm,
    bert,
    llama,
    points,
    words,
)

Build = Callable[[Path, int], Trainer]

RUN: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 20, "max_steps": 60}


@dataclass(frozen=True)
class Healthy:
    """A healthy run, and the alarms that may rightly be raised on it (none, as a rule)."""

    name: str
    build: Build
    may: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


def chains(rows: int = 512, length: int = 16, seed: int = 1) -> datasets.Dataset:
    """Walks of a noisy Markov chain: learnable, with an entropy floor, and no two alike."""
    draw = np.random.default_rng(seed)
    ids = np.empty((rows, length), dtype=np.int64)
    ids[:, 0] = draw.integers(2, VOCABULARY, rows)
    for t in range(1, length):
        follows = (ids[:, t - 1] * 5 + 3) % (VOCABULARY - 2) + 2
        noise = draw.integers(2, VOCABULARY, rows)
        ids[:, t] = np.where(draw.random(rows) < 0.8, follows, noise)
    return datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def images(rows: int = 256, side: int = 8, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Noisy pictures of one of four bright quadrants."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (rows,), generator=draw)
    pixels = torch.randn(rows, 1, side, side, generator=draw) * 0.5
    half = side // 2
    for i, label in enumerate(labels.tolist()):
        top, left = divmod(label, 2)
        pixels[i, 0, top * half : top * half + half, left * half : left * half + half] += 1.0
    return [{"pixel_values": p, "labels": y} for p, y in zip(pixels, labels, strict=True)]


def _classifier(folder: Path, seed: int, model: Any = None, **changes: Any) -> Trainer:
    return Trainer(
        model=model if model is not None else bert(seed=seed),
        args=arguments(folder, seed=seed, **{**RUN, **changes}),
        train_dataset=words(seed=seed + 1),
        eval_dataset=words(64, seed=seed + 1001),
    )


def trained_head(folder: Path, seed: int) -> Trainer:
    model = bert(seed=seed)
    _classifier(folder / "first", seed, model, max_steps=150, eval_strategy="no").train()
    model.save_pretrained(folder / "saved")
    again = type(model).from_pretrained(folder / "saved")
    again.accepts_loss_kwargs = False
    return _classifier(folder, seed, again)


def pretrained_lm(folder: Path, seed: int) -> Trainer:
    first = _lm(folder / "first", seed, llama(seed=seed), max_steps=100, eval_strategy="no")
    first.train()
    first.model.save_pretrained(folder / "saved")
    return _lm(folder, seed, type(first.model).from_pretrained(folder / "saved"))


def _lm(folder: Path, seed: int, model: Any, **changes: Any) -> Trainer:
    return Trainer(
        model=model,
        args=arguments(folder, seed=seed, **{**RUN, "learning_rate": 3e-3, **changes}),
        train_dataset=chains(seed=seed + 1),
        eval_dataset=chains(64, seed=seed + 1001),
    )


def _t5(folder: Path, seed: int, **config: Any) -> Trainer:
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=1,
            num_heads=4,
            decoder_start_token_id=0,
            **config,
        )
    )
    model.accepts_loss_kwargs = False
    chosen = arguments(folder, seed=seed, **{**RUN, "learning_rate": 3e-3}).to_dict()
    known = {
        k: v
        for k, v in chosen.items()
        if k in RUN
        or k
        in (
            "output_dir",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "learning_rate",
            "use_cpu",
            "save_strategy",
            "disable_tqdm",
            "log_level",
            "seed",
        )
    }
    return Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(**known, report_to="none"),
        train_dataset=chains(seed=seed + 1),
        eval_dataset=chains(64, seed=seed + 1001),
    )


def imbalanced(folder: Path, seed: int) -> Trainer:
    def data(rows: int, seed: int) -> datasets.Dataset:
        draw = np.random.default_rng(seed)
        labels = (draw.random(rows) < 0.03).astype(int)
        labels[:4] = 1
        features = draw.normal(size=(rows, 8)) + 2.5 * labels[:, None]
        return datasets.Dataset.from_dict(
            {"features": features.tolist(), "labels": labels.tolist()}
        )

    return Trainer(
        model=batchnorm(classes=2, seed=seed),
        args=arguments(folder, seed=seed, **RUN),
        train_dataset=data(600, seed + 1),
        eval_dataset=data(300, seed + 1001),
    )


def prior_bias(folder: Path, seed: int) -> Trainer:
    model = bert(seed=seed)
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([0.25] * 4).log())
    return _classifier(folder, seed, model)


def flipped_labels(folder: Path, seed: int) -> Trainer:
    def data(rows: int, seed: int) -> datasets.Dataset:
        base = points(rows, classes=2, seed=seed)
        draw = np.random.default_rng(seed)
        labels = np.asarray(base["labels"])
        flip = draw.random(rows) < 0.3
        return datasets.Dataset.from_dict(
            {"features": base["features"], "labels": np.where(flip, 1 - labels, labels).tolist()}
        )

    return Trainer(
        model=batchnorm(classes=2, seed=seed),
        args=arguments(folder, seed=seed, **RUN),
        train_dataset=data(400, seed + 1),
        eval_dataset=data(200, seed + 1001),
    )


class Regression(BatchNormMLP):
    def forward(self, features: Any = None, labels: Any = None) -> SequenceClassifierOutput:
        value = self.head(self.body(features)).squeeze(-1)
        loss = None if labels is None else nn.functional.mse_loss(value, labels)
        return SequenceClassifierOutput(loss=loss, logits=value)


def _regression(folder: Path, seed: int, scale: float = 1.0) -> Trainer:
    def data(rows: int, seed: int) -> datasets.Dataset:
        features = torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))
        target = features @ torch.linspace(-1, 1, 8) * scale
        return datasets.Dataset.from_dict(
            {"features": features.tolist(), "labels": target.tolist()}
        )

    torch.manual_seed(seed)
    return Trainer(
        model=Regression(NormConfig(num_labels=1)),
        args=arguments(folder, seed=seed, **RUN),
        train_dataset=data(256, seed + 1),
        eval_dataset=data(64, seed + 1001),
    )


def multi_label(folder: Path, seed: int) -> Trainer:
    def data(rows: int, seed: int) -> datasets.Dataset:
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(2, VOCABULARY, (rows, 12), generator=draw)
        labels = torch.stack([(ids == k + 2).any(1) for k in range(20)], 1).float()
        return datasets.Dataset.from_dict(
            {
                "input_ids": ids.tolist(),
                "attention_mask": torch.ones_like(ids).tolist(),
                "labels": labels.tolist(),
            }
        )

    return Trainer(
        model=bert(20, seed=seed, problem_type="multi_label_classification"),
        args=arguments(folder, seed=seed, **RUN),
        train_dataset=data(256, seed + 1),
        eval_dataset=data(64, seed + 1001),
    )


def lora(folder: Path, seed: int) -> Trainer:
    from peft import LoraConfig, get_peft_model

    base = llama(seed=seed)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    return _lm(folder, seed, adapted)


def linear_probe(folder: Path, seed: int) -> Trainer:
    model = bert(seed=seed)
    model.bert.requires_grad_(False)
    return _classifier(folder, seed, model)


def tied(folder: Path, seed: int) -> Trainer:
    return _lm(folder, seed, llama(seed=seed, tie_word_embeddings=True))


def experts(folder: Path, seed: int) -> Trainer:
    torch.manual_seed(seed)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_local_experts=8,
            num_experts_per_tok=1,
            max_position_embeddings=64,
            output_router_logits=True,
        )
    )
    return _lm(folder, seed, model)


def accumulation(folder: Path, seed: int) -> Trainer:
    return _lm(folder, seed, llama(seed=seed), gradient_accumulation_steps=4)


def long_warmup(folder: Path, seed: int) -> Trainer:
    return _classifier(folder, seed, warmup_steps=18)


def schedules(kind: str, **kwargs: Any) -> Build:
    def build(folder: Path, seed: int) -> Trainer:
        return _classifier(
            folder, seed, lr_scheduler_type=kind, lr_scheduler_kwargs=kwargs, warmup_steps=4
        )

    return build


def gpt2(folder: Path, seed: int) -> Trainer:
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    return _lm(folder, seed, GPT2LMHeadModel(config))


def masked_lm(folder: Path, seed: int) -> Trainer:
    from tokenizers import Tokenizer, models

    vocabulary = {f"w{i}": i for i in range(4, VOCABULARY)}
    vocabulary |= {"[PAD]": 0, "[UNK]": 1, "[MASK]": 2, "[CLS]": 3}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")),
        pad_token="[PAD]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        cls_token="[CLS]",
    )
    torch.manual_seed(seed)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=32,
        )
    )
    model.accepts_loss_kwargs = False
    data = chains(seed=seed + 1).remove_columns("labels")
    return Trainer(
        model=model,
        args=arguments(folder, seed=seed, **RUN),
        train_dataset=data,
        eval_dataset=chains(64, seed=seed + 1001).remove_columns("labels"),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
        processing_class=tokenizer,
    )


def completion_only(folder: Path, seed: int) -> Trainer:
    def data(rows: int, seed: int) -> datasets.Dataset:
        ids = np.asarray(chains(rows, seed=seed)["input_ids"])
        labels = ids.copy()
        labels[:, :12] = -100
        return datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})

    trainer = _lm(folder, seed, llama(seed=seed))
    trainer.train_dataset, trainer.eval_dataset = data(512, seed + 1), data(64, seed + 1001)
    return trainer


def tokens(folder: Path, seed: int) -> Trainer:
    def data(rows: int, seed: int) -> datasets.Dataset:
        ids = np.asarray(chains(rows, seed=seed)["input_ids"])
        labels = ids % 3
        labels[:, 0] = -100
        return datasets.Dataset.from_dict(
            {
                "input_ids": ids.tolist(),
                "attention_mask": np.ones_like(ids).tolist(),
                "labels": labels.tolist(),
            }
        )

    torch.manual_seed(seed)
    model = BertForTokenClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=32,
            num_labels=3,
        )
    )
    model.accepts_loss_kwargs = False
    return Trainer(
        model=model,
        args=arguments(folder, seed=seed, **RUN),
        train_dataset=data(256, seed + 1),
        eval_dataset=data(64, seed + 1001),
    )


def vit(folder: Path, seed: int) -> Trainer:
    torch.manual_seed(seed)
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=8,
            patch_size=4,
            num_channels=1,
            num_labels=4,
        )
    )
    model.accepts_loss_kwargs = False
    return Trainer(
        model=model,
        args=arguments(folder, seed=seed, **RUN),
        train_dataset=images(seed=seed + 1),
        eval_dataset=images(64, seed=seed + 1001),
    )


def resnet(folder: Path, seed: int) -> Trainer:
    torch.manual_seed(seed)
    model = ResNetForImageClassification(
        ResNetConfig(
            num_channels=1,
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            layer_type="basic",
            num_labels=4,
        )
    )
    model.accepts_loss_kwargs = False
    return Trainer(
        model=model,
        args=arguments(folder, seed=seed, **RUN),
        train_dataset=images(side=16, seed=seed + 1),
        eval_dataset=images(64, side=16, seed=seed + 1001),
    )


def streamed(folder: Path, seed: int) -> Trainer:
    trainer = _classifier(folder, seed, eval_strategy="no")
    trainer.train_dataset = words(seed=seed + 1).to_iterable_dataset()
    trainer.eval_dataset = None
    return trainer


def custom_dict(folder: Path, seed: int) -> Trainer:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))

        def forward(self, features: Any = None, labels: Any = None) -> dict[str, Any]:
            logits = self.net(features)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    torch.manual_seed(seed)
    return Trainer(
        model=Plain(),
        args=arguments(folder, seed=seed, **RUN),
        train_dataset=points(seed=seed + 1),
        eval_dataset=points(64, seed=seed + 1001),
    )


HEALTHY = [
    Healthy("N01 trained head", trained_head),
    Healthy("N02 pretrained causal LM", pretrained_lm),
    Healthy("N03 T5, tied", lambda f, s: _t5(f, s)),
    Healthy(
        "N03 T5 v1.1, untied",
        lambda f, s: _t5(f, s, tie_word_embeddings=False, feed_forward_proj="gated-gelu"),
    ),
    Healthy("N04 label smoothing", lambda f, s: _classifier(f, s, label_smoothing_factor=0.1)),
    Healthy("N06 imbalance", imbalanced, ("output-bias-unset", "hockey-stick")),
    Healthy("N07 bias set to the prior", prior_bias),
    Healthy("N08 flipped labels", flipped_labels),
    Healthy("regression", _regression),
    Healthy("N09 huge targets", lambda f, s: _regression(f, s, 1e6), ("unscaled-target",)),
    Healthy("N10 tiny targets", lambda f, s: _regression(f, s, 1e-4), ("unscaled-target",)),
    Healthy("N11 multi-label", multi_label, ("output-bias-unset", "hockey-stick")),
    Healthy("N12 LoRA", lora),
    Healthy("N13 linear probe", linear_probe),
    Healthy("N15 tied embeddings", tied),
    Healthy("N17 experts", experts),
    Healthy("N20 accumulation", accumulation),
    Healthy("N21 long warm-up", long_warmup),
    Healthy("N22 cosine", schedules("cosine")),
    Healthy("N23 restarts", schedules("cosine_with_restarts", num_cycles=3)),
    Healthy("N23 constant", schedules("constant")),
    Healthy("N23 WSD", schedules("warmup_stable_decay", num_decay_steps=12)),
    Healthy("N24 bf16 autocast", lambda f, s: _classifier(f, s, bf16=True)),
    Healthy("N27 dropout", lambda f, s: _classifier(f, s, bert(seed=s, hidden_dropout_prob=0.3))),
    Healthy("N28 BatchNorm", resnet),
    Healthy("N32 masked LM", masked_lm),
    Healthy("N34 completion only", completion_only),
    Healthy("N39 stream", streamed),
    Healthy("GPT-2", gpt2),
    Healthy("token classification", tokens),
    Healthy("ViT", vit),
    Healthy("plain module returning a dict", custom_dict),
    Healthy(
        "SGD with momentum",
        lambda f, s: _classifier(f, s, optim="sgd", optim_args="momentum=0.9", learning_rate=0.1),
    ),
    Healthy("Adafactor", lambda f, s: _classifier(f, s, optim="adafactor")),
    Healthy(
        "activation checkpointing", lambda f, s: _classifier(f, s, gradient_checkpointing=True)
    ),
    Healthy("one step", lambda f, s: _classifier(f, s, max_steps=1, eval_strategy="no")),
]
