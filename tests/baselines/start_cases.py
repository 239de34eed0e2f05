"""Tiny models of every head, freshly drawn, with rows whose labels can be learnt."""

from __future__ import annotations

import tempfile

import numpy as np
import torch
import transformers as t
from sklearn.datasets import load_diabetes, load_digits
from torch import nn

from hf_recipe.core.config import Settings
from hf_recipe.examiner import Examiner
from hf_recipe.instruments.batches import rows_of_trainer
from hf_recipe.instruments.quiet import quiet
from hf_recipe.instruments.subject import Plan, Subject, trainer_loss

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = {**SMALL, "intermediate_size": 64, "vocab_size": 64}
LLAMA = {**BERT, "num_key_value_heads": 2, "max_position_embeddings": 64}


def trainer_of(model, rows, *, cls=t.Trainer, batch=16, evaluation=None, **kwargs):
    settings = {k: kwargs.pop(k) for k in list(kwargs) if k in ARGUMENTS}
    args = t.TrainingArguments(
        tempfile.mkdtemp(), per_device_train_batch_size=batch, report_to="none", use_cpu=True,
        disable_tqdm=True, **settings,
    )  # fmt: skip
    return cls(model=model, args=args, train_dataset=rows, eval_dataset=evaluation, **kwargs)


ARGUMENTS = {"label_smoothing_factor", "learning_rate", "max_steps", "remove_unused_columns",
             "bf16", "optim", "num_train_epochs", "lr_scheduler_type", "save_strategy",
             "eval_strategy", "eval_steps", "logging_steps", "seed"}  # fmt: skip


def subject_of(trainer, steps=1000):
    evaluation = {}
    if trainer.eval_dataset is not None:
        rows = rows_of_trainer(trainer, trainer.eval_dataset, "validation")
        evaluation["validation"] = rows
    return Subject(
        model=trainer.model,
        args=trainer.args,
        train=rows_of_trainer(trainer, trainer.train_dataset, "train"),
        evaluation=evaluation,
        trainer=trainer,
        optimizer=trainer.optimizer,
        scheduler=trainer.lr_scheduler,
        plan=Plan(steps, steps, trainer.args.per_device_train_batch_size),
        loss_function=trainer_loss(trainer),
    )


def examined(trainer, *probes, steps=1000):
    """An examiner after its probes: `.latest` measurements, `.report` with findings."""
    examiner, subject = Examiner(Settings()), subject_of(trainer, steps)
    for probe in probes:
        examiner.examine(probe, subject, guard=lambda: quiet(trainer.model, trainer=trainer))
    return examiner


def columns(**arrays):
    return [
        {k: torch.as_tensor(v[i]) for k, v in arrays.items()}
        for i in range(len(next(iter(arrays.values()))))
    ]


def sequences(n=256, length=16, vocab=61):
    generator = np.random.default_rng(0)
    start, step = generator.integers(0, vocab, n), generator.integers(1, 5, n)
    return (start[:, None] + step[:, None] * np.arange(length)) % vocab


def text_rows(classes=4, n=256):
    ids = sequences(n)
    return columns(input_ids=ids, attention_mask=np.ones_like(ids), labels=ids[:, 0] % classes)


def text(cls, config, classes=4, **extra):
    return cls(config(**{**BERT, "num_labels": classes, **extra})), text_rows(classes)


def tokens(cls, config, labels, **extra):
    ids = sequences()
    return cls(config(**extra)), columns(
        input_ids=ids, attention_mask=np.ones_like(ids), labels=labels(ids)
    )


def masked(ids):
    keep = np.random.default_rng(1).random(ids.shape) < 0.3
    return np.where(keep, ids, -100)


def digits(classes=10, n=1797):
    data = load_digits()
    keep = np.flatnonzero(data.target < classes)[:n]
    x, y = data.images[keep].astype("float32") / 16, data.target[keep]
    return x, y


def images(model, classes=10):
    x, y = digits(classes)
    return model, columns(pixel_values=x[:, None].repeat(3, 1), labels=y)


class MLP(nn.Module):
    """A bare module: a tuple or a dict of loss and logits."""

    def __init__(self, inputs=64, classes=10, hidden=64, as_dict=True, loss=None):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, classes)
        self.as_dict = as_dict
        self.loss = loss or nn.CrossEntropyLoss()

    def forward(self, x, labels=None):
        z = self.head(self.body(x))
        loss = self.loss(z, labels)
        return {"loss": loss, "logits": z} if self.as_dict else (loss, z)


def mlp(classes=10, **kwargs):
    x, y = digits(classes)
    return MLP(classes=classes, **kwargs), columns(x=x.reshape(len(x), -1), labels=y)


def diabetes(scale=1.0):
    data = load_diabetes()
    x = (data.data / data.data.std(0)).astype("float32")
    y = ((data.target - data.target.mean()) / data.target.std() * scale).astype("float32")
    return x, y


class Squared(nn.Module):
    def forward(self, z, y):
        return nn.functional.mse_loss(z.squeeze(-1), y)


def regression(scale=1.0, shift=0.0):
    x, y = diabetes(scale)
    return MLP(10, 1, loss=Squared()), columns(x=x, labels=y + np.float32(shift))


def bert_regression():
    model, rows = text(t.BertForSequenceClassification, t.BertConfig, 1)
    return model, [{**r, "labels": r["labels"].float() + r["input_ids"][1] / 30} for r in rows]


def multi_label(outputs=50):
    ids = sequences()
    y = (np.random.default_rng(2).random((len(ids), outputs)) < 0.2).astype("float32")
    model = t.BertForSequenceClassification(
        t.BertConfig(**BERT, num_labels=outputs, problem_type="multi_label_classification")
    )
    return model, columns(input_ids=ids, attention_mask=np.ones_like(ids), labels=y)


def question():
    ids = sequences()
    start = ids[:, 0] % 8
    return t.BertForQuestionAnswering(t.BertConfig(**BERT)), columns(
        input_ids=ids, start_positions=start, end_positions=start + 3
    )


def choice():
    ids = sequences(256 * 4).reshape(256, 4, 16)
    return t.BertForMultipleChoice(t.BertConfig(**BERT)), columns(
        input_ids=ids, labels=np.arange(256) % 4
    )


def t5(**extra):
    config = t.T5Config(
        vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
        decoder_start_token_id=0, **extra,
    )  # fmt: skip
    ids = sequences()
    return t.T5ForConditionalGeneration(config), columns(input_ids=ids, labels=ids[:, ::-1].copy())


def bart():
    config = t.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
        max_position_embeddings=64,
    )  # fmt: skip
    ids = sequences()
    return t.BartForConditionalGeneration(config), columns(
        input_ids=ids, labels=ids[:, ::-1].copy()
    )


def vit(classes=10):
    return images(
        t.ViTForImageClassification(
            t.ViTConfig(**SMALL, intermediate_size=64, image_size=8, patch_size=4,
                        num_labels=classes)
        ), classes
    )  # fmt: skip


def resnet():
    config = t.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10
    )
    return images(t.ResNetForImageClassification(config))


def segformer():
    config = t.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16],
        patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
        decoder_hidden_size=16, num_labels=3,
    )  # fmt: skip
    x, _ = digits(10, 128)
    x = x.repeat(4, 1).repeat(4, 2)
    y = np.clip((x * 3).astype(int), 0, 2)
    return t.SegformerForSemanticSegmentation(config), columns(
        pixel_values=x[:, None].repeat(3, 1), labels=y
    )


def gpt2(width=32, **extra):
    config = t.GPT2Config(vocab_size=64, n_embd=width, n_layer=2, n_head=2, n_positions=64, **extra)
    ids = sequences()
    return t.GPT2LMHeadModel(config), columns(input_ids=ids, labels=ids)


def same(ids):
    return ids


def smoothed():
    return text(t.BertForSequenceClassification, t.BertConfig, 4)


def imbalanced(share=0.02):
    model, rows = text(t.BertForSequenceClassification, t.BertConfig, 2)
    rare = np.random.default_rng(0).random(len(rows)) < share
    return model, [{**r, "labels": torch.tensor(int(b))} for r, b in zip(rows, rare, strict=True)]


CASES = {
    "bert": lambda: text(t.BertForSequenceClassification, t.BertConfig),
    "bert-2": lambda: text(t.BertForSequenceClassification, t.BertConfig, 2),
    "bert-97": lambda: text(t.BertForSequenceClassification, t.BertConfig, 61),
    "distilbert": lambda: text(
        t.DistilBertForSequenceClassification, t.DistilBertConfig, dim=32, n_layers=2, n_heads=2,
        hidden_dim=64),
    "roberta": lambda: text(
        t.RobertaForSequenceClassification, t.RobertaConfig, max_position_embeddings=64),
    "electra": lambda: text(t.ElectraForSequenceClassification, t.ElectraConfig),
    "gpt2-classifier": lambda: text(
        t.GPT2ForSequenceClassification, t.GPT2Config, n_embd=32, n_layer=2, n_head=2,
        pad_token_id=63),
    "llama-classifier": lambda: text(
        t.LlamaForSequenceClassification, t.LlamaConfig, **{**LLAMA, "pad_token_id": 63}),
    "imbalanced": imbalanced,
    "bert-regression": bert_regression,
    "multi-label": multi_label,
    "bert-tokens": lambda: tokens(
        t.BertForTokenClassification, t.BertConfig, lambda ids: ids % 5, **BERT, num_labels=5),
    "bert-masked": lambda: tokens(t.BertForMaskedLM, t.BertConfig, masked, **BERT),
    "gpt2": gpt2,
    "gpt2-wide": lambda: gpt2(256),
    "llama": lambda: tokens(t.LlamaForCausalLM, t.LlamaConfig, same, **LLAMA),
    "llama-tied": lambda: tokens(
        t.LlamaForCausalLM, t.LlamaConfig, same, **LLAMA, tie_word_embeddings=True),
    "mixtral": lambda: tokens(
        t.MixtralForCausalLM, t.MixtralConfig, same, **LLAMA, num_local_experts=4,
        num_experts_per_tok=1, output_router_logits=True, router_aux_loss_coef=0.02),
    "mamba": lambda: tokens(
        t.MambaForCausalLM, t.MambaConfig, same, vocab_size=64, hidden_size=32,
        num_hidden_layers=2, state_size=8),
    "opt": lambda: tokens(
        t.OPTForCausalLM, t.OPTConfig, same, **SMALL, ffn_dim=64, vocab_size=64,
        max_position_embeddings=64, word_embed_proj_dim=32),
    "t5": t5,
    "t5-v1.1": lambda: t5(tie_word_embeddings=False, feed_forward_proj="gated-gelu"),
    "bart": bart,
    "question": question,
    "choice": choice,
    "vit": vit,
    "vit-2": lambda: vit(2),
    "resnet": resnet,
    "segformer": segformer,
    "mlp": mlp,
    "mlp-2": lambda: mlp(2),
    "mlp-3": lambda: mlp(3),
    "mlp-tuple": lambda: mlp(as_dict=False),
    "regression": regression,
    "regression-1e6": lambda: regression(1e6, 2e6),
    "regression-1e-5": lambda: regression(1e-5),
}  # fmt: skip
