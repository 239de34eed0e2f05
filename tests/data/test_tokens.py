import pytest
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq

from hf_recipe.data.tokens import (
    TOKENS,
    TokenFacts,
    double_bos,
    eos_unlabelled,
    labels_shifted,
    padding_labelled,
    token_out_of_range,
)
from tests.data import worlds

CAUSAL = {"rows": 50, "generates": True, "shifted": True, "supervised": 400, "aligned": 400}


def test_judges_on_literal_numbers():
    (fault,) = eos_unlabelled(TokenFacts(**CAUSAL, ends=50))
    assert "EOS supervised 0/50" in fault.message
    for values in ({"ends": 50, "ends_labelled": 1}, {}, {"ends": 50, "other_end": 1.0}):
        assert not list(eos_unlabelled(TokenFacts(**CAUSAL, **values)))
    assert not list(eos_unlabelled(TokenFacts(rows=50, ends=50, supervised=400)))
    assert list(padding_labelled(TokenFacts(rows=5, padding=9, padding_labelled=9)))
    assert not list(padding_labelled(TokenFacts(rows=5, padding=9)))
    assert list(labels_shifted(TokenFacts(**{**CAUSAL, "aligned": 20, "ahead": 400})))
    assert not list(labels_shifted(TokenFacts(**{**CAUSAL, "ahead": 400})))  # one repeated token
    assert not list(labels_shifted(TokenFacts(**CAUSAL, ahead=20)))
    assert list(double_bos(TokenFacts(rows=5, double_begin=5)))
    assert not list(double_bos(TokenFacts(rows=5)))
    assert list(token_out_of_range(TokenFacts(rows=5, outside=1, embeddings=47, highest=50)))
    assert not list(token_out_of_range(TokenFacts(rows=5, embeddings=47, highest=46)))


def causal(tmp_path, *, pad="[PAD]", change=lambda row: row, collator=None, seed=0):
    tok = worlds.tokenizer(bos_eos=True, pad=pad)
    data = worlds.tokenized(worlds.classified(80, seed), tok).remove_columns(["label", "text"])
    data = data.map(change)
    collator = collator or DataCollatorForLanguageModeling(tok, mlm=False)
    trainer = worlds.trainer(worlds.gpt2(), data, None, tmp_path, collator=collator, tok=tok)
    return worlds.names(worlds.examined(trainer, TOKENS))


def test_padding_that_is_the_end_token(tmp_path):
    assert causal(tmp_path, pad="</s>") == ["eos-unlabelled"]
    assert causal(tmp_path) == []


@pytest.mark.parametrize("seed", range(4))
def test_healthy_families_are_silent(seed, tmp_path):
    assert causal(tmp_path, seed=seed) == []
    tok = worlds.tokenizer()
    data = worlds.tokenized(worlds.classified(60, seed))
    plain = worlds.trainer(worlds.bert(), data, None, tmp_path, tok=tok)
    assert worlds.names(worlds.examined(plain, TOKENS)) == []
    bare = data.remove_columns("label")
    collator = DataCollatorForLanguageModeling(tok)
    masked = worlds.trainer(worlds.masked_lm(), bare, None, tmp_path, collator=collator, tok=tok)
    assert worlds.names(worlds.examined(masked, TOKENS)) == []
    model = worlds.t5()
    pairs = bare.map(lambda row: {"labels": [*row["input_ids"][1:4], 6]})
    collator = DataCollatorForSeq2Seq(tok, model=model)
    seq = worlds.trainer(model, pairs, None, tmp_path, collator=collator, tok=tok)
    assert worlds.names(worlds.examined(seq, TOKENS)) == []


def completion(row):
    cut = len(row["input_ids"]) // 2
    return {"labels": [-100] * cut + row["input_ids"][cut:]}


def test_completion_only(tmp_path):
    tok = worlds.tokenizer(bos_eos=True)
    assert causal(tmp_path, change=completion, collator=DataCollatorForSeq2Seq(tok)) == []


def test_labels_shifted_already(tmp_path):
    def shift(row):
        return {"labels": [*row["input_ids"][1:], -100]}

    tok = worlds.tokenizer(bos_eos=True)
    collator = DataCollatorForSeq2Seq(tok)
    assert causal(tmp_path, change=shift, collator=collator) == ["labels-shifted"]


def test_padding_in_the_loss(tmp_path):
    tok = worlds.tokenizer(bos_eos=True)

    def collate(rows):
        batch = tok.pad([{"input_ids": r["input_ids"]} for r in rows], return_tensors="pt")
        return {**batch, "labels": batch["input_ids"].clone()}

    assert causal(tmp_path, collator=collate) == ["padding-labelled"]
    tok = worlds.tokenizer()
    data = worlds.tokenized(worlds.classified(60)).remove_columns("label")
    data = data.map(
        lambda row: {"labels": [*row["input_ids"][1 : 3 + len(row["input_ids"]) % 3], 6]}
    )
    for pad, wanted in ((0, ["padding-labelled"]), (-100, [])):
        model = worlds.t5()
        collator = DataCollatorForSeq2Seq(tok, model=model, label_pad_token_id=pad)
        trainer = worlds.trainer(model, data, None, tmp_path, collator=collator, tok=tok)
        assert worlds.names(worlds.examined(trainer, TOKENS)) == wanted


def test_two_beginnings(tmp_path):
    def twice(row):
        return {"input_ids": [5, *row["input_ids"]], "attention_mask": [1, *row["attention_mask"]]}

    assert causal(
        tmp_path,
        change=lambda r: {**r, **twice(r), "token_type_ids": [0] * (len(r["input_ids"]) + 1)},
    ) == ["double-bos"]


def test_ids_without_an_embedding_row(tmp_path):
    data = worlds.tokenized(worlds.classified(60)).map(
        lambda r: {"input_ids": [*r["input_ids"][:-1], 90]}
    )
    trainer = worlds.trainer(worlds.bert(), data, None, tmp_path, tok=worlds.tokenizer())
    assert worlds.names(worlds.examined(trainer, TOKENS)) == ["token-out-of-range"]
