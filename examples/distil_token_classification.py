"""Distil a tagger: which letters of a Python line are names, numbers, strings or operators?

    python examples/distil_token_classification.py     # under a minute, nothing to download

The rows are lines of the standard library's own source, byte by byte, tagged by `tokenize`.
Spaces between tokens are not supervised (-100).
"""

import inspect
import io
import textwrap
import tokenize

import torch
from common import arguments, asked, trained
from transformers import BertConfig, BertForTokenClassification

from hf_recipe import DistillationTrainer, DistillationTrainingArguments
from hf_recipe.tune.teacher_gain import class_table, fidelity

TAGS = {tokenize.NAME: 0, tokenize.NUMBER: 1, tokenize.STRING: 2, tokenize.OP: 3}
NAMES = ("name", "number", "string", "operator")
LONGEST = 40


def lines() -> list[dict[str, list[int]]]:
    """Rows of bytes with a tag each."""
    source = inspect.getsource(textwrap)
    tags = [[-100] * len(line) for line in source.splitlines()]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        (row, start), (last, stop) = token.start, token.end
        if row == last and token.type in TAGS:
            tags[row - 1][start:stop] = [TAGS[token.type]] * (stop - start)
    rows = []
    for line, marks in zip(source.splitlines(), tags, strict=True):
        if any(mark >= 0 for mark in marks):
            ids, marks = list(line.encode("ascii", "replace"))[:LONGEST], marks[:LONGEST]
            rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": marks})
    return rows


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad bytes with 0 and tags with -100."""
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])
        for name, value in fill.items()
    }


def bert(width: int) -> BertForTokenClassification:
    """A small BERT over bytes."""
    return BertForTokenClassification(
        BertConfig(
            vocab_size=128,
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=2 * width,
            max_position_embeddings=LONGEST,
            id2label=dict(enumerate(NAMES)),
        )
    )


def main() -> None:
    """Train the teacher, distil it, say what has arrived."""
    options = asked("distil_token_classification", __doc__, epochs=15)
    rows = lines()
    train, validation = rows[: len(rows) * 4 // 5], rows[len(rows) * 4 // 5 :]
    given = arguments(options, rate=5e-3, batch=16)
    teacher, student = trained(bert(48), given, train, collate), bert(16)
    trainer = DistillationTrainer(
        student,
        DistillationTrainingArguments(**given, divergence="jsd"),
        collate,
        teacher=teacher,
        train_dataset=train,
        eval_dataset=validation,
    )
    trainer.train()
    found, _ = fidelity(trainer)
    for row in class_table(found).rows:
        print("{}: {} letters, teacher {:.3f}, student {:.3f} nats".format(*row[:4]))
    print(f"agreement {found.agreement:.3f}")


if __name__ == "__main__":
    main()
