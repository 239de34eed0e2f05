import pytest
import torch
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq

from hf_recipe.data.masks import SUPERVISION, Supervision, labels_masked
from tests.data import worlds


def judged(**values):
    base = {"rows": 100, "positions": 640, "supervised": 320, "rows_without": 0}
    return list(labels_masked(Supervision(**{**base, **values})))


def test_judge_on_literal_numbers():
    assert not judged()
    (fault,) = judged(supervised=0, rows_without=100)
    assert fault.severity == "error"
    assert fault.evidence["seen"] == "supervised positions 0/640"
    (fault,) = judged(rows_without=10)
    assert fault.severity == "note"
    assert "(10.0%)" in fault.message
    (fault,) = judged(rows_without=60)
    assert fault.severity == "warning"
    assert not judged(rows_without=60, drawn=True)
    assert not judged(rows=0, positions=0, supervised=0)
    assert not judged(rows=2, positions=9, supervised=0, rows_without=2, drawn=True)


def causal(tmp_path, mask):
    """A GPT-2 on prompt-completion rows; `mask(row number)` says how much of a row is masked."""
    tok = worlds.tokenizer(bos_eos=True)
    data = worlds.tokenized(worlds.classified(200), tok).remove_columns("label")

    def label(row, i):
        cut = int(mask(i) * len(row["input_ids"]))
        return {"labels": [-100] * cut + row["input_ids"][cut:]}

    data = data.map(label, with_indices=True)
    collator = DataCollatorForSeq2Seq(tok)
    trainer = worlds.trainer(worlds.gpt2(), data, None, tmp_path, collator=collator, tok=tok)
    return worlds.examined(trainer, SUPERVISION)


@pytest.mark.parametrize(
    ("mask", "severity", "without"),
    [
        (lambda i: 1.0, "error", 200),
        (lambda i: 1.0 if i % 10 < 6 else 0.5, "warning", 120),
        (lambda i: 1.0 if i % 10 == 0 else 0.5, "note", 20),
        (lambda i: 0.8, None, 0),
        (lambda i: 0.0, None, 0),
    ],
)
def test_completion_masks(mask, severity, without, tmp_path):
    report = causal(tmp_path, mask)
    assert [f.severity for f in report.flat] == ([severity] if severity else [])
    if severity:
        assert report.flat[0].evidence["rows_without"] == without
        assert report.flat[0].examples


@pytest.mark.parametrize("seed", range(5))
def test_masked_language_models_are_silent(seed, tmp_path):
    torch.manual_seed(seed)
    tok = worlds.tokenizer()
    data = worlds.tokenized(worlds.classified(100, seed)).remove_columns("label")
    for collator in (
        DataCollatorForLanguageModeling(tok, mlm_probability=0.15),
        DataCollatorForLanguageModeling(tok, mlm_probability=0.05),
    ):
        trainer = worlds.trainer(
            worlds.masked_lm(), data, None, tmp_path, collator=collator, tok=tok
        )
        assert not worlds.examined(trainer, SUPERVISION).flat


def test_drawing_masks_leaves_the_random_state_alone(tmp_path):
    tok = worlds.tokenizer()
    data = worlds.tokenized(worlds.classified(100)).remove_columns("label")
    collator = DataCollatorForLanguageModeling(tok)
    trainer = worlds.trainer(worlds.masked_lm(), data, None, tmp_path, collator=collator, tok=tok)
    before = torch.get_rng_state()
    worlds.examined(trainer, SUPERVISION)
    assert torch.equal(before, torch.get_rng_state())


def test_sequence_to_sequence(tmp_path):
    tok = worlds.tokenizer()
    data = worlds.tokenized(worlds.classified(100)).remove_columns("label")
    good = data.map(lambda row: {"labels": row["input_ids"][1:5]})
    bad = data.map(lambda row: {"labels": [-100] * 4})
    for rows, wanted in ((good, []), (bad, ["labels-masked"])):
        model = worlds.t5()
        collator = DataCollatorForSeq2Seq(tok, model=model)
        trainer = worlds.trainer(model, rows, None, tmp_path, collator=collator, tok=tok)
        assert worlds.names(worlds.examined(trainer, SUPERVISION)) == wanted


def test_single_labels_and_quantities(tmp_path):
    data = worlds.tokenized(worlds.classified(100))
    tok = worlds.tokenizer()
    trainer = worlds.trainer(worlds.bert(), data, None, tmp_path, tok=tok)
    assert not worlds.examined(trainer, SUPERVISION).flat
    masked = data.map(lambda row, i: {"label": -100 if i % 2 else row["label"]}, with_indices=True)
    trainer = worlds.trainer(worlds.bert(), masked, None, tmp_path, tok=tok)
    (finding,) = worlds.examined(trainer, SUPERVISION).flat
    assert finding.severity == "warning"
    assert finding.evidence["rows_without"] == 50
    quantity = data.map(lambda row: {"label": 0.5})
    trainer = worlds.trainer(worlds.bert(num_labels=1), quantity, None, tmp_path, tok=tok)
    report = worlds.examined(trainer, SUPERVISION)
    assert "quantities" in report.skipped["labels-masked"]
