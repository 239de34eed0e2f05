"""More healthy but tricky runs: losses, samplers, precisions and methods that authors write.

As in `healthy`, each builder takes (folder, seed) and returns a Trainer that is about to train
well. The numbers N05 to N44 are those of the list of tricky runs; what is not there stands in
`healthy`, or needs two processes (`healthy_ranks`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Sampler
from transformers import (
    BertModel,
    CLIPConfig,
    CLIPModel,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
)

from tests.gallery.healthy import RUN, Healthy, _classifier, _lm, chains, images
from tests.models import VOCABULARY, arguments, bert, llama, words

# ---------------------------------------------------------------- losses of one's own


class ClassWeights(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = functional.cross_entropy(
            outputs.logits, labels, weight=torch.tensor([0.5, 1.0, 1.5, 2.0])
        )
        return (loss, outputs) if return_outputs else loss


def focal(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    loss = functional.cross_entropy(outputs.logits, labels, reduction="none")
    return ((1 - (-loss).exp()) ** 2 * loss).mean()


def of(cls: type[Trainer], folder: Path, seed: int, model: Any = None, **given: Any) -> Trainer:
    """The classifier of `healthy` in a Trainer of another class, or with other arguments."""
    trainer = _classifier(folder, seed, model)
    return cls(
        model=trainer.model,
        args=trainer.args,
        train_dataset=trainer.train_dataset,
        eval_dataset=trainer.eval_dataset,
        **given,
    )


class LogProbabilities(nn.Module):
    """Returns log-probabilities, which cross-entropy leaves as they are."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        logits = self.inner(input_ids, attention_mask=attention_mask).logits.log_softmax(-1)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


# ---------------------------------------------------------------- pairs and towers


def clip(folder: Path, seed: int) -> Trainer:
    def data(rows: int, seed: int) -> list[dict[str, Any]]:
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(4, 32, (rows, 6), generator=draw)
        pixels = torch.randn(rows, 3, 8, 8, generator=draw) * 0.2
        pixels[:, 0, :, :6] += ids[:, None].float() / 16 - 1.1
        ends = torch.full((rows, 1), 2)
        ids = torch.cat([torch.ones_like(ends), ids, ends], 1)
        return [
            {"input_ids": i, "pixel_values": p, "attention_mask": torch.ones(8).long()}
            for i, p in zip(ids, pixels, strict=True)
        ]

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {k: torch.stack([row[k] for row in rows]) for k in rows[0]} | {"return_loss": True}

    torch.manual_seed(seed)
    part = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    part["intermediate_size"] = 64
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = CLIPConfig(
        text_config={**part, **special, "vocab_size": 32, "max_position_embeddings": 16},
        vision_config={**part, "image_size": 8, "patch_size": 4},
        projection_dim=32,
    )
    return Trainer(
        model=CLIPModel(config),
        args=arguments(folder, seed=seed, **RUN, remove_unused_columns=False),
        train_dataset=data(256, seed + 1),
        eval_dataset=data(64, seed + 1001),
        data_collator=collate,
    )


class Ranked(nn.Module):
    """Rows 2i and 2i + 1 are a pair, of which the first is preferred."""

    def __init__(self) -> None:
        super().__init__()
        self.score = bert(1)

    def forward(self, input_ids=None, attention_mask=None):
        value = self.score(input_ids, attention_mask=attention_mask).logits.squeeze(-1)
        return {"loss": -functional.logsigmoid(value[0::2] - value[1::2]).mean(), "scores": value}


def pairs(folder: Path, seed: int) -> Trainer:
    def data(rows: int, seed: int) -> datasets.Dataset:
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(8, VOCABULARY, (rows, 2, 12), generator=draw)
        ids[:, 0, ::3] = 2
        return datasets.Dataset.from_dict(
            {"chosen": ids[:, 0].tolist(), "rest": ids[:, 1].tolist()}
        )

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids = torch.tensor([ids for row in rows for ids in (row["chosen"], row["rest"])])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    torch.manual_seed(seed)
    return Trainer(
        model=Ranked(),
        args=arguments(folder, seed=seed, max_steps=60, remove_unused_columns=False),
        train_dataset=data(256, seed + 1),
        data_collator=collate,
    )


class Pooled(nn.Module):
    """Reads hidden states, so that the pooler under it never trains; skips layers at random."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.bert = BertModel(config)
        self.head = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        if self.training and torch.rand(()) < 0.2:
            hidden = hidden.detach()
        logits = self.head(hidden.mean(1))
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


# ---------------------------------------------------------------- samplers


class FewClasses(Sampler[int]):
    """Batches of two classes, four rows each, all classes in turn."""

    def __init__(self, labels: list[int], seed: int) -> None:
        self.labels, self.draw = np.asarray(labels), np.random.default_rng(seed)

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[int]:
        for _ in range(len(self.labels) // 8):
            for label in self.draw.choice(4, 2, replace=False):
                rows = np.flatnonzero(self.labels == label)
                yield from (int(i) for i in self.draw.choice(rows, 4, replace=False))


class MetricLearning(Trainer):
    def _get_train_sampler(self, dataset=None):
        return FewClasses(list(self.train_dataset["labels"]), self.args.seed)


def resumed(folder: Path, seed: int) -> Trainer:
    class Halfway(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 30

    class Resumes(Trainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            return super().train(resume_from_checkpoint=True)

    def build(cls: type[Trainer], **given: Any) -> Trainer:
        trainer = _classifier(folder, seed, save_strategy="steps", save_steps=30)
        return cls(model=trainer.model, args=trainer.args, train_dataset=trainer.train_dataset,
                   eval_dataset=trainer.eval_dataset, **given)  # fmt: skip

    build(Trainer, callbacks=[Halfway()]).train()
    return build(Resumes)


def long_words(rows: int, seed: int) -> datasets.Dataset:
    """Words of many lengths."""
    lengths = np.random.default_rng(seed).integers(8, 13, rows)
    return words(rows, seed=seed).map(
        lambda row, i: {k: row[k][: lengths[i]] for k in ("input_ids", "attention_mask")},
        with_indices=True,
    )


def by_length(folder: Path, seed: int) -> Trainer:
    trainer = _classifier(folder, seed, train_sampling_strategy="group_by_length")
    trainer.train_dataset = long_words(256, seed + 1)
    trainer.data_collator = padded
    trainer.eval_dataset = long_words(64, seed + 1001)
    return trainer


def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    made = {
        k: torch.tensor([row[k] + [0] * (longest - len(row[k])) for row in rows])
        for k in ("input_ids", "attention_mask")
    }
    return made | {"labels": torch.tensor([row["labels"] for row in rows])}


# ---------------------------------------------------------------- language models


def packed(folder: Path, seed: int) -> Trainer:
    trainer = _lm(folder, seed, llama(seed=seed, use_cache=False), per_device_eval_batch_size=8)
    trainer.train_dataset = trainer.train_dataset.remove_columns("labels")
    trainer.eval_dataset = trainer.eval_dataset.remove_columns("labels")
    trainer.data_collator = DataCollatorWithFlattening()
    return trainer


def blocks(folder: Path, seed: int) -> Trainer:
    """Documents joined by an end token and cut into blocks that attend to all of themselves."""

    def data(rows: int, seed: int) -> datasets.Dataset:
        chain = np.asarray(chains(rows, length=11, seed=seed)["input_ids"])
        joined = np.concatenate([chain, np.ones((rows, 1), dtype=chain.dtype)], 1).reshape(-1)
        cut = joined[: len(joined) // 32 * 32].reshape(-1, 32).tolist()
        return datasets.Dataset.from_dict({"input_ids": cut, "labels": cut})

    trainer = _lm(folder, seed, llama(seed=seed, eos_token_id=1))
    trainer.train_dataset, trainer.eval_dataset = data(512, seed + 1), data(64, seed + 1001)
    return trainer


def modular(folder: Path, seed: int) -> Trainer:
    """a + b modulo 23, half of the table: the training loss goes to zero long before the rest."""
    table = [(a, b) for a in range(23) for b in range(23)]
    order = np.random.default_rng(seed).permutation(len(table))
    rows = [[a + 2, b + 2, (a + b) % 23 + 2] for a, b in (table[i] for i in order)]
    kept = datasets.Dataset.from_dict(
        {"input_ids": rows, "labels": [[-100, -100, row[2]] for row in rows]}
    )
    trainer = _lm(folder, seed, llama(seed=seed), max_steps=120, eval_steps=40, weight_decay=1.0)
    trainer.train_dataset = kept.select(range(300))
    trainer.eval_dataset = kept.select(range(300, len(rows)))
    return trainer


# ---------------------------------------------------------------- methods


def only_biases(folder: Path, seed: int) -> Trainer:
    model = bert(seed=seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("bias" in name or "classifier" in name)
    return _classifier(folder, seed, model, learning_rate=1e-2)


def untied(folder: Path, seed: int) -> Trainer:
    return _lm(folder, seed, llama(seed=seed, tie_word_embeddings=False))


def lower_half(folder: Path, seed: int) -> Trainer:
    model = bert(seed=seed, num_hidden_layers=4)
    for part in (model.bert.embeddings, *model.bert.encoder.layer[:2]):
        part.requires_grad_(False)
    return _classifier(folder, seed, model)


class Distils(Trainer):
    """A frozen teacher and a running average of the student beside the model."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = bert(seed=7)
        folder = Path(self.args.output_dir) / "teacher"
        _classifier(folder, 7, self.teacher, max_steps=150, eval_strategy="no").train()
        self.teacher.eval().requires_grad_(False)
        self.average = copy.deepcopy(self.model).requires_grad_(False)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        with torch.no_grad():
            wanted = self.teacher(**inputs).logits.softmax(-1)
            for mine, new in zip(self.average.parameters(), model.parameters(), strict=True):
                mine.lerp_(new, 0.01)
        loss = outputs.loss + 0.1 * functional.cross_entropy(outputs.logits, wanted)
        return (loss, outputs) if return_outputs else loss


class ScaledLoss(Trainer):
    """A loss scaler that begins too high: the first steps are skipped, as in half precision."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
        self.accelerator.scaler = scaler
        self.accelerator.unscale_gradients = lambda optimizer=None: scaler.unscale_(
            self.optimizer.optimizer
        )


def accuracy(found: Any) -> dict[str, float]:
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


def calibrated(folder: Path, seed: int) -> Trainer:
    """Trained for long: the accuracy stays, the loss of its few mistakes grows."""
    trainer = _classifier(
        folder, seed, max_steps=240, eval_steps=60, metric_for_best_model="accuracy"
    )
    trainer.compute_metrics = accuracy
    return trainer


def two_classes(folder: Path, seed: int) -> Trainer:
    trainer = _classifier(folder, seed, bert(2, seed=seed))
    trainer.train_dataset = words(classes=2, seed=seed + 1)
    trainer.eval_dataset = words(64, classes=2, seed=seed + 1001)
    return trainer


def one_row(folder: Path, seed: int) -> Trainer:
    trainer = _classifier(folder, seed, max_steps=20, eval_strategy="no")
    trainer.train_dataset, trainer.eval_dataset = words(1, seed=seed + 1), None
    return trainer


def odd_tail(folder: Path, seed: int) -> Trainer:
    trainer = _classifier(folder, seed, per_device_train_batch_size=16, max_steps=40)
    trainer.train_dataset = words(65, seed=seed + 1)
    return trainer


class Augmented:
    """Pictures that are moved and made noisy when they are read for training."""

    def __init__(self, rows: list[dict[str, torch.Tensor]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        moved = self.rows[i]["pixel_values"] + 0.1 * float(np.random.randn())
        return {"pixel_values": moved, "labels": self.rows[i]["labels"]}


def augmented(folder: Path, seed: int) -> Trainer:
    from tests.gallery.healthy import resnet

    trainer = resnet(folder, seed)
    trainer.train_dataset = Augmented(images(side=16, seed=seed + 1))
    return trainer


MORE = [
    Healthy("N05 class weights", lambda f, s: of(ClassWeights, f, s)),
    Healthy("N05 focal loss", lambda f, s: of(Trainer, f, s, compute_loss_func=focal)),
    Healthy("N14 biases alone", only_biases),
    Healthy("N16 untied by design", untied),
    Healthy("N18 few of the words", lambda f, s: _lm(f, s, llama(seed=s), max_steps=60,
                                                     per_device_train_batch_size=2)),
    Healthy("N19 unused pooler", lambda f, s: _classifier(f, s, Pooled(bert(seed=s).config))),
    Healthy("N25 bf16 weights", lambda f, s: _lm(f, s, llama(seed=s).bfloat16(),
                                                 learning_rate=1e-2)),
    Healthy("N26 skipped steps", lambda f, s: of(ScaledLoss, f, s)),
    Healthy("N29 CLIP", clip),
    Healthy("N30 pairs", pairs),
    Healthy("N35 packed", packed),
    Healthy("N36 blocks of documents", blocks),
    Healthy("N37 odd last batch", odd_tail),
    Healthy("N38 resumed", resumed),
    Healthy("N40 grouped by length", by_length),
    Healthy("N41 modular addition", modular),
    Healthy("N42 long, by accuracy", calibrated),
    Healthy("N44 teacher and average", lambda f, s: of(Distils, f, s)),
    Healthy("two classes", two_classes),
    Healthy("log-probabilities", lambda f, s: _classifier(f, s, LogProbabilities(bert(seed=s)))),
    Healthy("one row", one_row),
    Healthy("batch size found", lambda f, s: _classifier(f, s, auto_find_batch_size=True)),
    Healthy("few classes a batch", lambda f, s: of(MetricLearning, f, s)),
    Healthy("lower half frozen", lower_half),
    Healthy("augmented pictures", augmented),
]  # fmt: skip
