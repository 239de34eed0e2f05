"""Data faults and their healthy twins through `attach` and a real Trainer."""

import pytest
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq

from tests.data import worlds
from tests.gallery.harness import Case, assert_found, assert_silent


def _classifier(folder, train, evaluation, **config):
    model = worlds.bert(**config)
    tok = worlds.tokenizer()
    return worlds.trainer(
        model, worlds.tokenized(train), worlds.tokenized(evaluation), folder, tok=tok
    )


def leak(folder, faulty):
    train = worlds.classified(300, 0)
    evaluation = train.select(range(60)) if faulty else worlds.classified(60, 1)
    return _classifier(folder, train, evaluation)


def one_output(folder, faulty):
    data = worlds.classified(300, 0), worlds.classified(60, 1)
    return _classifier(folder, *data, num_labels=1 if faulty else 2)


def off_by_one(folder, faulty):
    data = [worlds.classified(300, seed, 3) for seed in (0, 1)]
    if faulty:
        data = [d.map(lambda row: {"label": row["label"] + 1}) for d in data]
    return _classifier(folder, *data, num_labels=4 if faulty else 3)


def swapped_names(folder, faulty):
    import datasets

    names = datasets.ClassLabel(names=["no", "yes"])
    data = [worlds.classified(300, seed).cast_column("label", names) for seed in (0, 1)]
    order = ["yes", "no"] if faulty else ["no", "yes"]
    return _classifier(
        folder,
        *data,
        id2label=dict(enumerate(order)),
        label2id={name: i for i, name in enumerate(order)},
    )


def _causal(folder, *, pad="[PAD]", masked=None):
    tok = worlds.tokenizer(bos_eos=True, pad=pad)
    data = worlds.tokenized(worlds.classified(120), tok).remove_columns(["label", "text"])
    collator = DataCollatorForLanguageModeling(tok, mlm=False)
    if masked is not None:
        cut = 100 if masked else 4
        data = data.map(
            lambda row: {"labels": ([-100] * cut + row["input_ids"][cut:])[: len(row["input_ids"])]}
        )
        collator = DataCollatorForSeq2Seq(tok)
    return worlds.trainer(worlds.gpt2(), data, None, folder, collator=collator, tok=tok)


def never_stops(folder, faulty):
    return _causal(folder, pad="</s>" if faulty else "[PAD]")


def all_masked(folder, faulty):
    return _causal(folder, masked=faulty)


CASES = [
    Case("split-leak", leak, "error"),
    Case("problem-type-mismatch", one_output, "error"),
    Case("absent-class", off_by_one, "warning"),
    Case("label-name-mismatch", swapped_names, "error"),
    Case("eos-unlabelled", never_stops, "error"),
    Case("labels-masked", all_masked, "error", also={"loss-not-finite"}),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fault_is_found(case, tmp_path):
    report = assert_found(case, tmp_path)
    assert report.to_json()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_twin_is_silent(case, tmp_path):
    assert_silent(case, tmp_path)
