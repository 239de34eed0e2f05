"""Tiny models, data and Trainers, built from configs: seconds on a CPU, nothing downloaded."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_recipe.testing import traces

VOCABULARY = 64


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Arguments of a short, silent CPU run that reports nowhere."""
    chosen: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "max_steps": 20,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1000,
        "log_level": "error",
        "seed": 3,
    }
    return TrainingArguments(**{**chosen, **changes})


def words(rows: int = 256, length: int = 12, classes: int = 4, seed: int = 1) -> datasets.Dataset:
    """Token ids whose label is a learnable rule: the class of the most frequent marker token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(classes + 2, VOCABULARY, (rows, length), generator=generator)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    for place in (0, 3, 7):
        ids[:, place] = labels + 2
    return datasets.Dataset.from_dict(
        {
            "input_ids": ids.tolist(),
            "attention_mask": torch.ones_like(ids).tolist(),
            "labels": labels.tolist(),
        }
    )


def progressions(rows: int = 256, length: int = 16, seed: int = 1) -> datasets.Dataset:
    """Arithmetic progressions modulo 61: each next token follows from the two before."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 61, (rows, 1), generator=generator)
    step = torch.randint(1, 5, (rows, 1), generator=generator)
    ids = (start + step * torch.arange(length)) % 61 + 2
    return datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def bert(classes: int = 4, seed: int = 0, **changes: Any) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    chosen = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
        "num_labels": classes,
    }
    # Its head takes **kwargs and ignores num_items_in_batch; the Trainer then does not divide.
    model = BertForSequenceClassification(BertConfig(**{**chosen, **changes}))
    model.accepts_loss_kwargs = False
    return model


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    chosen = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**{**chosen, **changes}))


class NormConfig(PreTrainedConfig):
    model_type = "batchnorm_mlp"


class BatchNormMLP(PreTrainedModel):
    """An MLP with BatchNorm and dropout: buffers that a careless probe would change."""

    config_class = NormConfig
    main_input_name = "features"

    def __init__(self, config: NormConfig) -> None:
        super().__init__(config)
        width = getattr(config, "width", 16)
        self.body = nn.Sequential(
            nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2)
        )
        self.head = nn.Linear(width, config.num_labels)
        self.post_init()

    def forward(self, features: Any = None, labels: Any = None) -> SequenceClassifierOutput:
        logits = self.head(self.body(features))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def points(rows: int = 256, classes: int = 4, seed: int = 1) -> datasets.Dataset:
    """Gaussian clusters in eight dimensions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    centres = torch.randn(classes, 8, generator=torch.Generator().manual_seed(99)) * 1.5
    features = centres[labels] + torch.randn(rows, 8, generator=generator)
    return datasets.Dataset.from_dict({"features": features.tolist(), "labels": labels.tolist()})


def batchnorm(classes: int = 4, seed: int = 0) -> BatchNormMLP:
    torch.manual_seed(seed)
    return BatchNormMLP(NormConfig(num_labels=classes))


def classifier(folder: Path, **changes: Any) -> Trainer:
    """A healthy BERT classifier on `words`, with an evaluation set."""
    return Trainer(
        model=bert(),
        args=arguments(folder, **changes),
        train_dataset=words(),
        eval_dataset=words(64, seed=2),
    )


def signature(trainer: Trainer) -> str:
    """A hash of what the run left: weights, optimizer state, random states, logged losses."""
    digest = hashlib.sha256()
    for name, value in traces(trainer).items():
        digest.update(name.encode() + value)
    return digest.hexdigest()
