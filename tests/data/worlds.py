"""Data sets from known rules, tiny tokenizers and Trainers, for the tests of the data stage."""

from __future__ import annotations

import datasets
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from hf_recipe.core.config import Settings
from hf_recipe.examiner import Examiner
from hf_recipe.instruments.batches import rows_of_trainer
from hf_recipe.instruments.quiet import quiet
from hf_recipe.instruments.subject import Subject, trainer_loss

WORDS = [f"w{i}" for i in range(40)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<s>", "</s>"]


def tokenizer(*, bos_eos: bool = False, cls_sep: bool = True, pad: str = "[PAD]"):
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos_eos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 5), ("</s>", 6)]
        )
    elif cls_sep:
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B [SEP]",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=pad,
        unk_token="[UNK]",
        bos_token="<s>",
        eos_token="</s>",
        **({} if bos_eos else {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}),
    )


def sentences(rows: int, rng: np.random.Generator, *, low: int = 6, high: int = 14) -> list[str]:
    return [" ".join(rng.choice(WORDS, rng.integers(low, high))) for _ in range(rows)]


def classified(rows: int = 200, seed: int = 0, classes: int = 2) -> datasets.Dataset:
    """Texts whose class is told by a word."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    texts = [
        f"{text} {WORDS[label]}" for text, label in zip(sentences(rows, rng), labels, strict=True)
    ]
    return datasets.Dataset.from_dict({"text": texts, "label": labels.tolist()})


def tokenized(data: datasets.Dataset, tok=None) -> datasets.Dataset:
    tok = tok or tokenizer()
    return data.map(lambda row: dict(tok(row["text"])))


def bert(kind=BertForSequenceClassification, **config):
    return kind(
        BertConfig(
            vocab_size=47,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=64,
            **config,
        )
    )


def masked_lm():
    return bert(BertForMaskedLM)


def tagger(**config):
    return bert(BertForTokenClassification, **config)


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=47, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    )


def t5():
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=47,
            d_model=16,
            d_kv=8,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
    )


def trainer(model: nn.Module, train, evaluation, tmp_path, *, collator=None, tok=None, **args):
    kind = args.pop("kind", Trainer)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, max_steps=2, **args
    )
    return kind(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=collator,
        processing_class=tok,
    )


def subject(trainer) -> Subject:
    evaluation = trainer.eval_dataset
    splits = (
        evaluation
        if isinstance(evaluation, dict)
        else ({} if evaluation is None else {"validation": evaluation})
    )
    return Subject(
        model=trainer.model,
        args=trainer.args,
        train=rows_of_trainer(trainer, trainer.train_dataset, "train"),
        evaluation={name: rows_of_trainer(trainer, data, name) for name, data in splits.items()},
        trainer=trainer,
        processing_class=trainer.processing_class,
        loss_function=trainer_loss(trainer),
    )


def examined(trainer, *probes):
    """The report after `probes` have looked at `trainer`; no probe may crash."""
    examiner = Examiner(Settings())
    held = subject(trainer)
    for probe in probes:
        examiner.examine(probe, held, lambda: quiet(trainer.model, trainer=trainer))
    assert not examiner.report.crashed, examiner.report.crashed
    return examiner.report


def names(report) -> list[str]:
    return [finding.check for finding in report.flat]


def loud(report) -> list[str]:
    """Names of the findings that are no notes."""
    return [finding.check for finding in report.flat if finding.severity != "note"]
