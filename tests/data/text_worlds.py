"""A small language, and real sub-word tokenizers trained on it, offline and in a blink."""

from __future__ import annotations

import copy
import functools

import datasets
import numpy as np
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
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
)

SYLLABLES = ["ba", "ko", "mi", "ret", "sul", "ton", "ve", "gar", "lin", "po", "dra", "esh"]


@functools.cache
def words(count: int = 300, seed: int = 0) -> tuple[str, ...]:
    rng = np.random.default_rng(seed)
    made = {"".join(rng.choice(SYLLABLES, rng.integers(2, 5))) for _ in range(2 * count)}
    return tuple(sorted(made)[:count])


def sentence(rng: np.random.Generator, low: int, high: int, vocabulary=None) -> str:
    known = vocabulary or words()
    ranks = np.minimum(rng.zipf(1.3, rng.integers(low, high)) - 1, len(known) - 1)
    spread = rng.integers(0, len(known), len(ranks))
    chosen = [known[r if rng.random() < 0.3 else s] for r, s in zip(ranks, spread, strict=True)]
    return " ".join(chosen).capitalize() + "."


def texts(rows: int, seed: int = 0, low: int = 5, high: int = 20, vocabulary=None) -> list[str]:
    rng = np.random.default_rng(seed)
    return [sentence(rng, low, high, vocabulary) for _ in range(rows)]


@functools.cache
def _trained(kind: str, seed: int) -> Tokenizer:
    corpus = texts(400, 1000 + seed)
    special = ["<pad>", "<unk>", "<s>", "</s>", "[CLS]", "[SEP]", "[MASK]"]
    if kind == "wordpiece":
        tok = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tok.normalizer = normalizers.BertNormalizer(lowercase=True)
        tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tok.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(
            vocab_size=170, special_tokens=special, show_progress=False
        )
    elif kind == "bytes":
        tok = Tokenizer(models.BPE())
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            show_progress=False,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
    elif kind == "unigram":
        tok = Tokenizer(models.Unigram())
        tok.pre_tokenizer = pre_tokenizers.Metaspace()
        tok.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=170, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    elif kind == "characters":
        tok = Tokenizer(models.BPE(unk_token="<unk>"))
        tok.decoder = decoders.Fuse()
        trainer = trainers.BpeTrainer(vocab_size=10, special_tokens=special, show_progress=False)
    else:
        raise ValueError(kind)
    tok.train_from_iterator(corpus, trainer)
    return tok


def tokenizer(kind: str = "bytes", *, shape: str = "causal", seed: int = 0, **special):
    """A fast tokenizer; shape: "causal" (<s> ... </s>), "bert" ([CLS] ... [SEP]) or "bare"."""
    inner = copy.deepcopy(_trained(kind, seed))
    ids = {name: inner.token_to_id(name) for name in ("<s>", "</s>", "[CLS]", "[SEP]")}
    pairs = list(ids.items())
    if shape == "causal":
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=pairs[:2]
        )
    elif shape == "target":
        inner.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=pairs[:2]
        )
    elif shape == "bert":
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=pairs[2:]
        )
    named = {"pad_token": "<pad>", "unk_token": "<unk>"}
    if shape == "bert":
        named |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    else:
        named |= {"bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **{**named, **special})


SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 256,
}


def bert(tok, kind=BertForSequenceClassification, **config):
    torch.manual_seed(0)
    model = kind(BertConfig(**{"vocab_size": len(tok), **SIZES, **config}))
    model.accepts_loss_kwargs = False
    return model


def masked(tok):
    return bert(tok, BertForMaskedLM)


def tagger(tok, labels: int = 5):
    return bert(tok, BertForTokenClassification, num_labels=labels)


def gpt2(tok):
    torch.manual_seed(0)
    sizes = {"n_positions": 256, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tok), **sizes, bos_token_id=tok.bos_token_id,
            eos_token_id=tok.eos_token_id,
        )
    )  # fmt: skip


def t5(tok):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tok), **sizes, decoder_start_token_id=tok.pad_token_id,
            pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id,
        )
    )  # fmt: skip


def pairs(rows: int = 120, seed: int = 0, prompt=(5, 15), answer=(4, 9)) -> datasets.Dataset:
    """Prompts and completions."""
    return datasets.Dataset.from_dict(
        {
            "prompt": texts(rows, seed, *prompt),
            "completion": texts(rows, seed + 1, *answer),
        }
    )


def tagged(rows: int = 120, seed: int = 0, labels: int = 5) -> datasets.Dataset:
    """Lists of words whose tag follows from the word's first letter, mostly 0."""
    rng = np.random.default_rng(seed)
    lists = [[str(w) for w in rng.choice(words(), rng.integers(5, 15))] for _ in range(rows)]
    tags = [[ord(w[0]) % labels if len(w) % 2 else 0 for w in row] for row in lists]
    return datasets.Dataset.from_dict({"tokens": lists, "ner_tags": tags})
