"""Healthy runs of heads and methods that strangers use: answers, speech, adapters, noise.

As in `healthy`, each builder takes (folder, seed) and returns a Trainer that is about to train
well. The suite samples this list; `scripts/benchmark.py healthy` runs it whole.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    Trainer,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from tests.gallery.healthy import RUN, Healthy, _lm
from tests.models import VOCABULARY, arguments, llama


def answers(folder: Path, seed: int) -> Trainer:
    """Four answers a row, each of a length of its own; the right one begins with its own token."""

    def data(rows: int, seed: int) -> datasets.Dataset:
        draw = np.random.default_rng(seed)
        labels = draw.integers(0, 4, rows)
        words = [[draw.integers(8, VOCABULARY, n) for n in draw.integers(2, 7, 4)] for _ in labels]
        ids = [
            [[1, 2 if k == label else 3, *answer] for k, answer in enumerate(row)]
            for label, row in zip(labels, words, strict=True)
        ]
        return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels})

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(one) for row in rows for one in row["input_ids"])
        ids = [[[*one, *[0] * (longest - len(one))] for one in row["input_ids"]] for row in rows]
        found = torch.tensor(ids)
        labels = torch.tensor([row["labels"] for row in rows])
        return {"input_ids": found, "attention_mask": (found > 0).long(), "labels": labels}

    torch.manual_seed(seed)
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1,
                        num_attention_heads=2, intermediate_size=64)  # fmt: skip
    model = BertForMultipleChoice(config)
    model.accepts_loss_kwargs = False
    return Trainer(
        model=model,
        args=arguments(folder, seed=seed, **{**RUN, "learning_rate": 3e-3}),
        train_dataset=data(256, seed + 1),
        eval_dataset=data(64, seed + 1001),
        data_collator=collate,
    )


def tones(folder: Path, seed: int) -> Trainer:
    """Tones spelt by a speech model's CTC loss."""

    def data(rows: int, seed: int) -> list[dict[str, Any]]:
        draw, found = np.random.default_rng(seed), []
        for _ in range(rows):
            letters = draw.integers(2, 5, 2)
            time = np.arange(240) / 2000
            waves = [np.sin(2 * math.pi * 110 * 2.0**k * time) for k in letters - 2]
            sound = np.concatenate(waves) + draw.normal(0, 0.1, 480)
            found.append({"input_values": torch.tensor(sound, dtype=torch.float32),
                          "labels": torch.tensor(letters)})  # fmt: skip
        return found

    torch.manual_seed(seed)
    model = Wav2Vec2ForCTC(
        Wav2Vec2Config(
            vocab_size=5, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=64, conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 4),
            num_feat_extract_layers=2, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4,
            feat_extract_norm="layer", do_stable_layer_norm=True, mask_time_prob=0.0,
            layerdrop=0.0, pad_token_id=0, ctc_loss_reduction="mean", ctc_zero_infinity=True,
        )
    )  # fmt: skip
    return Trainer(
        model=model,
        args=arguments(folder, seed=seed, **{**RUN, "learning_rate": 3e-3}),
        train_dataset=data(160, seed + 1),
        eval_dataset=data(40, seed + 1001),
    )


# ---------------------------------------------------------------- adapters


def adapted(config: Any, rate: float) -> Any:
    """A method of peft on a language model that has learnt a little."""

    def build(folder: Path, seed: int) -> Trainer:
        from peft import get_peft_model

        first = _lm(folder / "first", seed, llama(seed=seed), eval_strategy="no")
        first.train()
        torch.manual_seed(seed)
        model = get_peft_model(first.model, config())
        return _lm(folder, seed, model, learning_rate=rate)

    return build


def prompts() -> Any:
    from peft import PromptTuningConfig

    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)


def rescaled() -> Any:
    from peft import IA3Config

    return IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"],
                     feedforward_modules=["down_proj"])  # fmt: skip


HEADS = [
    Healthy("multiple choice", answers),
    Healthy("CTC", tones),
    Healthy("NEFTune", lambda f, s: _lm(f, s, llama(seed=s), neftune_noise_alpha=5)),
    Healthy("prompt tuning", adapted(prompts, 3e-2)),
    Healthy("IA3", adapted(rescaled, 1e-2)),
]
