"""Data faults in the shapes that data sets have: transforms of whole batches, tags that became
plain numbers, tables as vectors, small sets; each with its healthy twin, through a real Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, load_wine
from torch import nn
from transformers import DataCollatorForTokenClassification, Trainer

from tests.data import text_worlds as tw
from tests.gallery.harness import Case, assert_found, assert_silent, run
from tests.models import arguments, bert


class Table(nn.Module):
    """A small network on a vector of numbers; one output regresses."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, outputs))

    def forward(self, x: Any = None, labels: Any = None) -> dict[str, Any]:
        logits = self.body(x)
        if logits.shape[1] == 1:
            loss = nn.functional.mse_loss(logits.squeeze(-1), labels)
        else:
            loss = nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def tabular(folder: Path, x: Any, y: Any) -> Trainer:
    regresses = y.dtype.kind == "f"
    model = Table(x.shape[1], 1 if regresses else int(y.max()) + 1)
    rows = [
        {"x": torch.tensor(a, dtype=torch.float32), "labels": torch.tensor(b)}
        for a, b in zip(x, y.astype(np.float32) if regresses else y, strict=True)
    ]
    return Trainer(model=model, args=arguments(folder, max_steps=3), train_dataset=rows)


def wine() -> tuple[Any, Any]:
    x, y = load_wine(return_X_y=True)
    order = np.random.default_rng(5).permutation(len(x))[:120]
    return ((x - x.mean(0)) / x.std(0))[order], y[order]


def label_among_features(folder: Path, faulty: bool) -> Trainer:
    x, y = wine()
    x[:, 5] = y - 1.0 if faulty else x[:, 5]
    return tabular(folder, x, y)


def target_among_features(folder: Path, faulty: bool) -> Trainer:
    x, _ = wine()
    y = x[:, 0] + 0.5 * x[:, 1] + np.random.default_rng(1).normal(size=len(x))
    x[:, 3] = 2 * y + 0.1 if faulty else x[:, 3]
    return tabular(folder, x, y)


def classified(tok: Any, texts: list[str], labels: list[int], folder: Path) -> Trainer:
    data = datasets.Dataset.from_dict({"text": texts, "label": labels})
    data = data.map(lambda batch: tok(batch["text"]), batched=True, remove_columns="text")
    return Trainer(
        model=tw.bert(tok, num_labels=max(labels) + 1),
        args=arguments(folder, max_steps=3),
        train_dataset=data,
        processing_class=tok,
    )


def label_behind_the_text(folder: Path, faulty: bool) -> Trainer:
    tok = tw.tokenizer("bytes", shape="bert")
    labels = np.random.default_rng(2).integers(0, 3, 150).tolist()
    texts = tw.texts(150, seed=4)
    if faulty:
        texts = [f"{text} {label}" for text, label in zip(texts, labels, strict=True)]
    return classified(tok, texts, labels, folder)


def label_behind_the_ids(folder: Path, faulty: bool) -> Trainer:
    """Bare ids whose words tell the class anyway, and behind them the class once more."""
    draw = np.random.default_rng(5)
    labels = draw.integers(0, 3, 200).tolist()
    rows = []
    for label in labels:
        body = draw.integers(20, 80, 14)
        body[draw.choice(14, 4, replace=False)] = 5 + label
        rows.append([2, *body.tolist(), 3, *([10 + label] if faulty else [])])
    return Trainer(
        model=bert(vocab_size=80, num_labels=3),
        args=arguments(folder, max_steps=3),
        train_dataset=datasets.Dataset.from_dict({"input_ids": rows, "labels": labels}),
    )


def evaluated_in_another_spelling(folder: Path, faulty: bool) -> Trainer:
    """A vocabulary of lower-case words; the evaluation texts are not lowered."""
    draw = np.random.default_rng(6)

    def rows(count: int, unknown: float) -> datasets.Dataset:
        labels = draw.integers(0, 3, count).tolist()
        ids = []
        for label in labels:
            body = draw.integers(20, 80, int(draw.integers(8, 20)))
            body[draw.choice(len(body), 3, replace=False)] = 5 + label
            body[draw.random(len(body)) < unknown] = 1
            ids.append([2, *body.tolist(), 3])
        return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels})

    return Trainer(
        model=bert(vocab_size=80, num_labels=3),
        args=arguments(folder, max_steps=3),
        train_dataset=rows(300, 0.0),
        eval_dataset=rows(200, 0.4 if faulty else 0.0),
        data_collator=padded,
    )


def evaluated_at_another_scale(folder: Path, faulty: bool) -> Trainer:
    """Pictures from 0 to 1 in training, from -1 to 1 in the evaluation."""
    data = digits(700)
    train, held = data.select(range(500)), data.select(range(500, 700))
    if faulty:
        held = held.map(lambda row: {"x": (2 * np.asarray(row["x"]) - 1).tolist()})
    return Trainer(
        model=Table(64, 10), args=arguments(folder, max_steps=3),
        train_dataset=train, eval_dataset=held,
    )  # fmt: skip


def contradicted(folder: Path, faulty: bool) -> Trainer:
    """A third of the pictures comes twice, under two labels."""
    data = digits(400)
    if faulty:
        again = data.select(range(130)).map(lambda row: {"labels": (row["labels"] + 1) % 10})
        data = datasets.concatenate_datasets([data, again])
    args = arguments(folder, max_steps=3)
    return Trainer(model=Table(64, 10), args=args, train_dataset=data)


def repeated(folder: Path, faulty: bool) -> Trainer:
    """A third of the pictures comes twice."""
    data = digits(400)
    if faulty:
        data = datasets.concatenate_datasets([data, data.select(range(130))])
    args = arguments(folder, max_steps=3)
    return Trainer(model=Table(64, 10), args=args, train_dataset=data)


def emptied(folder: Path, faulty: bool) -> Trainer:
    """Every tenth text is lost."""
    labels = np.random.default_rng(2).integers(0, 3, 150).tolist()
    texts = tw.texts(150, seed=4)
    if faulty:
        texts = ["" if i % 10 == 0 else text for i, text in enumerate(texts)]
    return classified(tw.tokenizer("bytes", shape="bert"), texts, labels, folder)


def digits(count: int) -> datasets.Dataset:
    x, y = load_digits(return_X_y=True)
    chosen = np.random.default_rng(0).permutation(len(x))[:count]
    return datasets.Dataset.from_dict({"x": (x[chosen] / 16).tolist(), "labels": y[chosen]})


def padded(rows: list[dict[str, Any]]) -> dict[str, Any]:
    longest = max(len(row["input_ids"]) for row in rows)
    ids = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows]
    found = torch.tensor(ids)
    return {
        "input_ids": found,
        "attention_mask": (found != 0).long(),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def tags_of_another_order(folder: Path, faulty: bool) -> Trainer:
    """The names stay in the column of tags; `map` made plain numbers of them."""
    tok = tw.tokenizer("wordpiece", shape="bert")
    names = ["O", "PER", "LOC", "ORG", "MISC"]
    theirs = ["O", "LOC", "PER", "ORG", "MISC"] if faulty else names

    def label(batch: Any) -> Any:
        made = tok(batch["tokens"], is_split_into_words=True)
        made["labels"] = [
            [-100 if w is None else tags[w] for w in made.word_ids(i)]
            for i, tags in enumerate(batch["ner_tags"])
        ]
        return made

    data = tw.tagged(60).cast_column("ner_tags", datasets.List(datasets.ClassLabel(names=theirs)))
    model = tw.tagger(tok)
    model.config.id2label = dict(enumerate(names))
    return Trainer(
        model=model,
        args=arguments(folder, max_steps=3),
        train_dataset=data.map(label, batched=True),
        data_collator=DataCollatorForTokenClassification(tok),
        processing_class=tok,
    )


def words_of_another_order(folder: Path, faulty: bool) -> Trainer:
    """A word beside each number says what it means."""
    tok = tw.tokenizer("wordpiece", shape="bert")
    labels = np.random.default_rng(2).integers(0, 2, 80).tolist()
    trainer = classified(tok, tw.texts(80), labels, folder)
    words = ["good", "bad"] if faulty else ["bad", "good"]
    trainer.train_dataset = trainer.train_dataset.add_column("said", [words[y] for y in labels])
    trainer.model.config.id2label = {0: "bad", 1: "good"}
    return trainer


def padded_together(folder: Path, *, leak: bool = False, null: bool = False) -> Trainer:
    """A transform pads the batch that it is given: rows read one by one would not fit."""
    tok = tw.tokenizer("wordpiece", shape="bert")

    def encode(batch: Any) -> Any:
        return {**tok([text or "" for text in batch["text"]], padding=True), "labels": batch["y"]}

    def data(seed: int) -> datasets.Dataset:
        texts: list[str | None] = [*tw.texts(60, seed)]
        if null:
            texts[::7] = [None] * len(texts[::7])
        rows = {"text": texts, "y": [i % 2 for i in range(60)]}
        return datasets.Dataset.from_dict(rows).with_transform(encode)

    train = data(1)
    return Trainer(
        model=tw.bert(tok),
        args=arguments(folder, max_steps=3, remove_unused_columns=False),
        train_dataset=train,
        eval_dataset=train.select(range(20)) if leak else data(2),
        processing_class=tok,
    )


def leaks(folder: Path, faulty: bool) -> Trainer:
    return padded_together(folder, leak=faulty)


def nulls(folder: Path, faulty: bool) -> Trainer:
    return padded_together(folder, null=faulty)


def a_few_in_another_unit(folder: Path, faulty: bool) -> Trainer:
    """One row in four hundred has one feature in thousandths."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 10)).astype("float32")
    y = (x @ rng.normal(size=(10, 4))).argmax(1)
    if faulty:
        x[16::400, 3] *= 1000
    return tabular(folder, x, y)


CASES = [
    Case("outlier-example", a_few_in_another_unit, "note"),
    Case("target-in-input", label_among_features, "warning", name="an element is the class"),
    Case("target-in-input", target_among_features, "warning", name="an element is the target"),
    Case("target-in-input", label_behind_the_text, "warning", name="the class behind the text"),
    Case("target-in-input", label_behind_the_ids, "warning", name="the class behind ids"),
    Case("conflicting-labels", contradicted, "warning"),
    Case("duplicate-example", repeated, "note"),
    Case("blank-example", emptied, "warning"),
    Case("split-drift", evaluated_in_another_spelling, "warning", name="another spelling"),
    Case("split-drift", evaluated_at_another_scale, "warning", name="another scale"),
    Case("label-name-mismatch", tags_of_another_order, "error", name="names in the tags"),
    Case("label-name-mismatch", words_of_another_order, "error", name="names in words"),
    Case("split-leak", leaks, "error", name="transform of whole batches"),
    Case("missing-value", nulls, "warning", name="null texts contradict nobody"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fault_is_found(case: Case, tmp_path: Path) -> None:
    case.settings.setdefault("select", ("data", "eval-crashes"))
    report = assert_found(case, tmp_path)
    if case.check == "split-leak":
        assert "copied before" not in report.findings[0].message


@pytest.mark.parametrize("case", CASES, ids=str)
def test_twin_is_silent(case: Case, tmp_path: Path) -> None:
    assert_silent(case, tmp_path)


def test_an_infinite_row_is_not_a_blank_one(tmp_path: Path) -> None:
    x, y = wine()
    x = np.repeat(x, 2, axis=1)
    x[7] = np.inf
    report = run(tabular(tmp_path, x, y), train=False, select=["missing-value", "blank-example"])
    assert [f.check for f in report.flat] == ["missing-value"]
    assert report.flat[0].fix == "dataset = dataset.filter(lambda row: np.isfinite(row['x']).all())"
