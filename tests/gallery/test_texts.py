"""Text faults and their healthy twins through `attach` and a real Trainer."""

import datasets
import pytest
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
)

from tests.data import text_worlds as tw
from tests.gallery.harness import Case, assert_found, assert_silent
from tests.models import arguments

SHORT = {"max_steps": 3, "learning_rate": 1e-4}


def _answers(folder, *, limit=None, side="right", masked=True, pieces=(5, 15), **shape):
    """Completions behind prompts; `limit` cuts the whole row on one side."""
    tok = tw.tokenizer(shape="bare")

    def join(row):
        prompt = tok(row["prompt"] + " ")["input_ids"]
        answer = [*tok(row["completion"])["input_ids"], tok.eos_token_id]
        ids = prompt + answer
        labels = [-100] * len(prompt) + answer if masked else ids
        cut = slice(None, limit) if side == "right" else slice(-(limit or 0), None)
        return {"input_ids": ids[cut], "labels": labels[cut], "attention_mask": [1] * len(ids[cut])}

    data = tw.pairs(80, prompt=pieces).map(join, **shape)
    return Trainer(
        model=tw.gpt2(tok),
        args=arguments(folder, **SHORT),
        train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tok),
        processing_class=tok,
    )


def answer_cut_off(folder, faulty):
    return _answers(folder, limit=30, side="right" if faulty else "left", pieces=(20, 30))


def answer_cut_off_unmasked(folder, faulty):
    limit = 30 if faulty else None
    return _answers(folder, limit=limit, masked=not faulty, pieces=(20, 30))


def answers_cut_without_texts(folder, faulty):
    return _answers(
        folder,
        limit=34 if faulty else None,
        pieces=(5, 35),
        remove_columns=["prompt", "completion"],
    )


def prompts_trained(folder, faulty):
    return _answers(folder, masked=not faulty)


def labels_overwritten(folder, faulty):
    """Padded rows with masked labels: this collator puts the ids in their place."""
    tok = tw.tokenizer(shape="bare")

    def join(row):
        prompt = tok(row["prompt"] + " ")["input_ids"]
        answer = [*tok(row["completion"])["input_ids"], tok.eos_token_id]
        rest = 60 - len(prompt) - len(answer)
        return {
            "input_ids": prompt + answer + [tok.pad_token_id] * rest,
            "labels": [-100] * len(prompt) + answer + [-100] * rest,
            "attention_mask": [1] * (60 - rest) + [0] * rest,
        }

    data = tw.pairs(80).map(join, remove_columns=["prompt", "completion"])
    collator = DataCollatorForLanguageModeling(tok, mlm=False)
    return Trainer(
        model=tw.gpt2(tok),
        args=arguments(folder, **SHORT),
        train_dataset=data,
        data_collator=collator if faulty else DataCollatorForSeq2Seq(tok),
        processing_class=tok,
    )


def target_cut_off(folder, faulty):
    tok = tw.tokenizer("unigram", shape="target")
    limit = 4 if faulty else 200

    def join(batch):
        target = tok(text_target=batch["completion"], truncation=True, max_length=limit)
        return {**tok(batch["prompt"]), "labels": target["input_ids"]}

    model = tw.t5(tok)
    model.accepts_loss_kwargs = False
    return Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=str(folder), use_cpu=True, report_to="none", max_steps=3, disable_tqdm=True
        ),
        train_dataset=tw.pairs(80, answer=(15, 25)).map(join, batched=True),
        data_collator=DataCollatorForSeq2Seq(tok, model=model),
        processing_class=tok,
    )


def targets_without_their_ends(folder, faulty):
    """A decoder's targets cut in the middle, each closed as if it ended there."""
    tok = tw.tokenizer("unigram", shape="target")
    limit = 20 if faulty else 200

    def join(batch):
        target = tok(text_target=batch["completion"], truncation=True, max_length=limit)
        return {**tok(batch["prompt"]), "labels": target["input_ids"]}

    trainer = target_cut_off(folder, False)
    trainer.train_dataset = tw.pairs(80, answer=(12, 20)).map(join, batched=True)
    return trainer


def _classifier(folder, tok, texts, split=None):
    data = datasets.Dataset.from_dict({"text": texts, "label": [i % 2 for i in range(len(texts))]})
    data = data.map(lambda batch: (split or tok)(batch["text"]), batched=True)
    if "token_type_ids" in data.column_names:
        data = data.remove_columns("token_type_ids")
    return Trainer(
        model=tw.bert(tok, vocab_size=450),
        args=arguments(folder, **SHORT),
        train_dataset=data,
        processing_class=tok,
    )


def old_cache(folder, faulty):
    tok = tw.tokenizer("wordpiece", shape="bert")
    other = tw.tokenizer("bytes", shape="bert")
    return _classifier(folder, tok, tw.texts(100), other if faulty else tok)


def foreign_text(folder, faulty):
    tok = tw.tokenizer("wordpiece", shape="bert")
    texts = tw.texts(100)
    if faulty:
        there, here = "абвгдеклмнопрст", "abvgdeklmnoprst"
        texts = [text.lower().translate(str.maketrans(here, there)) for text in texts]
    return _classifier(folder, tok, texts)


def unknown_alike(folder, faulty):
    """Words that the vocabulary lacks make different texts one: the copies are its doing."""
    tok = tw.tokenizer("wordpiece", shape="bert")
    texts = tw.texts(100, low=3, high=6)
    if faulty:
        texts = [" ".join("\u4e2d" * len(word) for word in text.split()) for text in texts]
    return _classifier(folder, tok, texts)


def _labelled(tok, rows, laid):
    """Encoded words with labels laid by position, padded with a class; or moved with the words."""
    made = tok(rows["tokens"], is_split_into_words=True, padding=True)
    made["labels"] = []
    for i, tags in enumerate(rows["ner_tags"]):
        numbers = made.word_ids(i)
        by_place = ([0, *tags] + [0] * len(numbers))[: len(numbers)]
        moved = [-100 if w is None else tags[w] for w in numbers]
        made["labels"].append(by_place if laid else moved)
    return made


def labels_by_position_bare(folder, faulty):
    """Nothing is left of the words but the pieces."""
    tok = tw.tokenizer("wordpiece", shape="bert")
    made = _labelled(tok, tw.tagged(80)[:], faulty)
    kept = {name: made[name] for name in ("input_ids", "attention_mask", "labels")}
    return Trainer(
        model=tw.tagger(tok),
        args=arguments(folder, **SHORT),
        train_dataset=datasets.Dataset.from_dict(kept),
        processing_class=tok,
    )


def labels_by_position(folder, faulty):
    tok = tw.tokenizer("wordpiece", shape="bert")

    def label(batch):
        made = tok(batch["tokens"], is_split_into_words=True)
        made["labels"] = []
        for i, tags in enumerate(batch["ner_tags"]):
            numbers = made.word_ids(i)
            moved = [-100 if w is None else tags[w] for w in numbers]
            laid = ([-100, *tags] + [-100] * len(numbers))[: len(numbers)]
            made["labels"].append(laid if faulty else moved)
        return made

    return Trainer(
        model=tw.tagger(tok),
        args=arguments(folder, **SHORT),
        train_dataset=tw.tagged(80).map(label, batched=True),
        data_collator=DataCollatorForTokenClassification(tok),
        processing_class=tok,
    )


ONLY = {"train": False, "settings": {"select": ("data",)}}
MASKED = {"labels-masked"}
CASES = [
    Case("truncated-example", answer_cut_off, "error", also=MASKED, **ONLY, name="answer cut off"),
    Case(
        "truncated-example",
        answer_cut_off_unmasked,
        "error",
        **ONLY,
        name="unmasked answer cut off",
    ),
    Case(
        "truncated-example", answers_cut_without_texts, also=MASKED, **ONLY, name="no texts to see"
    ),
    Case("truncated-example", target_cut_off, "error", **ONLY, name="target cut off"),
    Case("truncated-example", targets_without_their_ends, "warning", **ONLY, name="ends cut off"),
    Case("prompt-supervised", prompts_trained, "warning", **ONLY, name="prompts trained"),
    Case("prompt-supervised", labels_overwritten, "warning", **ONLY, name="labels overwritten"),
    Case("stale-tokens", old_cache, "warning", **ONLY),
    Case("unknown-token", foreign_text, "warning", also={"constant-input"}, **ONLY),
    Case("unknown-token", unknown_alike, "warning", **ONLY, name="unknown words alike"),
    Case("word-labels-misaligned", labels_by_position, "warning", **ONLY),
    Case(
        "word-labels-misaligned",
        labels_by_position_bare,
        "warning",
        also={"padding-labelled"},
        **ONLY,
        name="words not there",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fault_is_found(case, tmp_path):
    report = assert_found(case, tmp_path)
    assert report.to_json()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_twin_is_silent(case, tmp_path):
    assert_silent(case, tmp_path)


def test_no_end_is_a_note_and_training_goes_on(tmp_path):
    """The whole recipe, with training: a note for a corpus without ends, and nothing else."""
    tok = tw.tokenizer(shape="bare")

    def build(folder, faulty):
        end = "" if faulty else "</s>"
        data = datasets.Dataset.from_dict({"text": [text + end for text in tw.texts(120)]})
        return Trainer(
            model=tw.gpt2(tok),
            args=arguments(folder, **SHORT),
            train_dataset=data.map(lambda row: tok(row["text"])),
            data_collator=DataCollatorForLanguageModeling(tok, mlm=False),
            processing_class=tok,
        )

    case = Case("eos-missing", build, "note")
    assert_found(case, tmp_path)
    report = assert_silent(case, tmp_path)
    assert "eos-missing" not in {f.check for f in report.findings}
