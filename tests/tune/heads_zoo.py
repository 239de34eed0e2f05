"""Tiny students and teachers of every head, with ragged rows, from configs alone."""

import numpy as np
import torch
import transformers as tf
from torch.utils.data import Dataset

VOCABULARY, LENGTH = 60, 9


class Rows(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def bert(**options):
    return tf.BertConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            **options,
        }
    )


def llama(vocabulary=VOCABULARY, width=16):
    return tf.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )


def gpt2(width=16):
    return tf.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=width,
        n_layer=1,
        n_head=2,
        n_positions=16,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )


def t5():
    return tf.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )


def vit():
    return tf.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=5,
        hidden_dropout_prob=0.0,
    )


def segformer():
    return tf.SegformerConfig(
        num_channels=3,
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[1, 1],
        hidden_sizes=[8, 8],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 1],
        mlp_ratios=[1, 1],
        decoder_hidden_size=8,
        num_labels=4,
        drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
    )


def segmenter():
    """Without its BatchNorm, under which no batch is the sum of its parts."""
    model = tf.SegformerForSemanticSegmentation(segformer())
    model.decode_head.batch_norm = torch.nn.Identity()
    return model


def tokens(draw, rows, **more):
    out = []
    for index in range(rows):
        length = int(draw.integers(3, LENGTH + 1))
        ids = np.zeros(LENGTH, int)
        ids[:length] = draw.integers(1, VOCABULARY, length)
        mask = (np.arange(LENGTH) < length).astype(int)
        row = {"input_ids": ids, "attention_mask": mask}
        out.append(row | {k: f(ids, mask, index) for k, f in more.items()})
    return out


def per_token(draw, classes):
    def labels(ids, mask, index):
        chosen = draw.integers(0, classes, LENGTH)
        return np.where((mask == 1) & (draw.random(LENGTH) < 0.7), chosen, -100)

    return labels


def zoo(head, rows=8):
    """(make a model, rows) for a head; the model is drawn anew at each call."""
    draw = np.random.default_rng(0)
    if head == "sequence":
        data = tokens(draw, rows, labels=lambda i, m, n: n % 3)
        return lambda: tf.BertForSequenceClassification(bert(num_labels=3)), Rows(data)
    if head == "unlabelled":
        data = tokens(draw, rows, labels=lambda i, m, n: n % 3 if n % 4 == 0 else -100)
        return lambda: tf.BertForSequenceClassification(bert(num_labels=3)), Rows(data)
    if head == "regression":
        data = tokens(draw, rows, labels=lambda i, m, n: np.float32(n))
        return lambda: tf.BertForSequenceClassification(bert(num_labels=1)), Rows(data)
    if head == "multilabel":
        data = tokens(draw, rows, labels=lambda i, m, n: np.float32([n % 2, 1, 0]))
        return lambda: tf.BertForSequenceClassification(bert(num_labels=3)), Rows(data)
    if head == "token":
        data = tokens(draw, rows, labels=per_token(draw, 4))
        return lambda: tf.BertForTokenClassification(bert(num_labels=4)), Rows(data)
    if head == "masked_lm":
        data = tokens(draw, rows, labels=per_token(draw, VOCABULARY))
        return lambda: tf.BertForMaskedLM(bert()), Rows(data)
    if head == "question":
        data = tokens(
            draw, rows, start_positions=lambda i, m, n: 1, end_positions=lambda i, m, n: 2
        )
        return lambda: tf.BertForQuestionAnswering(bert()), Rows(data)
    if head == "choice":
        flat = tokens(draw, 3 * rows)
        data = [
            {k: np.stack([flat[3 * n + c][k] for c in range(3)]) for k in flat[0]}
            | {"labels": n % 3}
            for n in range(rows)
        ]
        return lambda: tf.BertForMultipleChoice(bert()), Rows(data)
    if head in ("gpt2", "llama"):
        data = tokens(draw, rows, labels=per_token(draw, VOCABULARY))
        if head == "gpt2":
            return lambda: tf.GPT2LMHeadModel(gpt2()), Rows(data)
        return lambda: tf.LlamaForCausalLM(llama()), Rows(data)
    if head == "seq2seq":
        data = tokens(draw, rows, labels=per_token(draw, VOCABULARY))
        return lambda: tf.T5ForConditionalGeneration(t5()), Rows(data)
    if head == "image":
        data = [
            {"pixel_values": draw.normal(size=(1, 8, 8)).astype(np.float32), "labels": n % 5}
            for n in range(rows)
        ]
        return lambda: tf.ViTForImageClassification(vit()), Rows(data)
    if head == "segmentation":
        data = []
        for _ in range(rows):
            labels = draw.integers(0, 4, (16, 16))
            labels[draw.random((16, 16)) < 0.3] = 255
            pixels = draw.normal(size=(3, 16, 16)).astype(np.float32)
            data.append({"pixel_values": pixels, "labels": labels})
        return segmenter, Rows(data)
    raise KeyError(head)


HEADS = (
    "sequence",
    "unlabelled",
    "regression",
    "multilabel",
    "token",
    "masked_lm",
    "question",
    "choice",
    "gpt2",
    "llama",
    "seq2seq",
    "image",
    "segmentation",
)


def pair(head):
    """(student, teacher, rows), the same at every call."""
    make, rows = zoo(head)
    torch.manual_seed(0)
    student = make()
    torch.manual_seed(1)
    teacher = make()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(3)
    return student, teacher, rows
