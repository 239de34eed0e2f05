"""The judges of the text checks on literal numbers, and what they are measured with."""

import datasets
import numpy as np
import pytest
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    default_data_collator,
)

import hf_recipe
from hf_recipe.data.alignment import Place, find, place
from hf_recipe.data.answers import (
    PROMPTS,
    PromptLabels,
    eos_missing,
    prompt_supervised,
)
from hf_recipe.data.masks import SUPERVISION
from hf_recipe.data.stale import MATCH, TextMatch, stale_tokens
from hf_recipe.data.text_rows import read_columns, text_rows
from hf_recipe.data.tokenizer import splitting, tokenizer_of
from hf_recipe.data.tokens import TOKENS, TokenFacts
from hf_recipe.data.truncation import TRUNCATION, ColumnCut, Truncation, truncated_example
from hf_recipe.data.vocabulary import VOCABULARY, Vocabulary, unknown_token
from hf_recipe.data.word_labels import WORD_LABELS, WordLabels, word_labels_misaligned
from tests.data import text_worlds as tw
from tests.data import worlds

PROBES = (TRUNCATION, VOCABULARY, MATCH, PROMPTS, WORD_LABELS, TOKENS, SUPERVISION)
KINDS = ("wordpiece", "bytes", "unigram", "characters")


def severities(faults):
    return [fault.severity for fault in faults]


# ---------------------------------------------------------------- judges


def test_truncation_is_judged_by_what_is_lost():
    def judged(**values):
        return severities(truncated_example(Truncation(**{"rows": 100, "longest": 64, **values})))

    column = ColumnCut("text", rows=100, cut=30, tokens=1000, lost=100)
    assert judged(columns=(column,), cut_rows=30) == [None]
    assert judged(columns=(column,), cut_rows=1) == []
    assert judged(answers=100, answers_gone=90) == ["error"]
    assert judged(answers=100, answers_gone=30) == ["warning"]
    assert judged(answers=100, answers_gone=5) == []
    target = ColumnCut("summary", True, rows=100, cut=100, tokens=1000, lost=900)
    assert judged(columns=(target,), cut_rows=100) == ["error"]
    for cut, lost, severity in ((100, 600, "error"), (100, 300, "warning"), (40, 300, None)):
        short = ColumnCut("summary", True, rows=100, cut=cut, tokens=1000, lost=lost)
        assert judged(columns=(short,), cut_rows=cut) == [severity]


def test_without_texts_rows_that_pile_up_look_cut():
    def judged(**values):
        return severities(truncated_example(Truncation(**{"rows": 100, "longest": 64, **values})))

    assert judged(full=40, near=4, lengths=30) == [None]
    assert judged(full=40, near=4, lengths=30, windows=True) == []
    assert judged(full=40, near=4, lengths=30, mute_full=30) == ["warning"]
    assert judged(full=90, near=1, lengths=9, mute_full=80) == ["error"]
    assert judged(full=90, near=1, lengths=9, mute_full=80, mute_short=8) == [None]
    assert judged(full=100) == []  # blocks of one length
    assert judged(full=100, told=True) == [None]
    assert judged(full=1, near=20, lengths=50) == []
    assert judged(full=11, near=11, lengths=9, longest=14) == []
    assert judged(full=1, near=20, lengths=50, collated_short=30) == [None]


def test_unknown_tokens_are_judged_by_share():
    def judged(**values):
        return severities(unknown_token(Vocabulary(**{"rows": 100, "tokens": 10_000, **values})))

    assert judged(unknown=4_000) == [None]
    assert judged(unknown=500) == ["note"]
    assert judged(unknown=50) == judged(unknown=4_000, written=0.9) == []
    assert judged(tokens=30, unknown=9) == []
    assert judged(unknown=300, lost_rows=10) == [None]
    assert judged(words=100, apart=90) == [None]
    assert judged(words=100, apart=90, bytes=True) == ["note"]
    assert judged(words=100, apart=90, characters=True) == judged(words=100, apart=20) == []


def test_stale_ids_must_be_related_to_their_text():
    def judged(rows, alike, kinship, follows=0.0):
        return len(list(stale_tokens(TextMatch(rows, alike, kinship, "text", follows))))

    assert judged(100, 0, 0.95) == 1
    assert judged(100, 50, 0.1) == 1
    assert judged(100, 0, float("nan"), 0.95) == 1
    assert judged(100, 0, 0.1) == judged(100, 0, float("nan")) == 0
    assert judged(100, 98, 0.95) == judged(3, 0, 1.0) == 0


def test_prompts_and_ends():
    def judged(supervised, answer_supervised=50, **values):
        seen = PromptLabels(9, "texts", "prompt", 100, supervised, 50, answer_supervised, **values)
        return severities(prompt_supervised(seen))

    assert judged(100) == [None]
    assert judged(100, turns=True) == ["note"]
    assert judged(0) == judged(20) == judged(100, 0) == []
    seen = {"rows": 50, "generates": True, "end_known": True}
    assert list(eos_missing(TokenFacts(**seen)))
    for values in ({"ends": 1}, {"ends_labelled": 1}, {"other_end": 1.0}, {"end_known": False}):
        assert not list(eos_missing(TokenFacts(**{**seen, **values})))


def test_word_labels_are_judged_by_tokens_that_can_tell():
    def judged(**values):
        return len(list(word_labels_misaligned(WordLabels(**{"rows": 50, **values}))))

    assert judged(differ=100, by_place=97) == 1
    assert judged(differ=100, by_word=100) == judged(differ=100, by_word=50, by_place=50) == 0
    assert judged(stored=50, shorter=50) == judged(broken=40, early=38) == 1
    assert judged(broken=40, early=2) == judged() == 0
    laid = {"broken": 40, "filled": 40, "inner": 100, "unlike": 40}
    assert judged(**laid) == 1
    for healthy in ({"filled": 30}, {"unlike": 2}, {"broken": 7, "filled": 7}):
        assert judged(**{**laid, **healthy}) == 0


# ---------------------------------------------------------------- instruments


def test_a_text_is_found_whole_or_cut_at_a_border():
    text = [11, 12, 13, 14, 15, 16]
    assert find([1, 2, 3, 2, 3, 4], [2, 3, 4]) == 3
    assert find([258, 1], [1]) == 1
    assert place([1, *text, 2], text, {1, 2}) == Place(1, 6, 6)
    assert place([1, 99, *text[1:-1], 98, 2], text, {1, 2}) == Place(1, 6, 6)  # melted ends
    assert place([1, *text[:4], 2], text, {1, 2}) == Place(1, 4, 6)  # cut before the end token
    assert place([1, *text[:4]], text, {1, 2}) == Place(1, 4, 6)
    left = place([*text[2:], 2], text, {1, 2})
    assert left is not None
    assert left.is_cut
    assert left.kept == 4
    assert place([1, *text[:4], 77, 78, 2], text, {1, 2}) is None  # other words follow
    assert place([7, 8, 9], text, {1, 2}) is None


def test_the_tokenizer_is_left_as_it_was():
    tok = tw.tokenizer()
    tok(["ba"], truncation=True, max_length=7, padding="max_length")
    before = (tok.backend_tokenizer.truncation, tok.backend_tokenizer.padding)
    with splitting(tok) as splitter:
        assert len(splitter.ids("ba ko mi " * 20)) > 20
    assert (tok.backend_tokenizer.truncation, tok.backend_tokenizer.padding) == before


def test_columns_of_any_data_set():
    data = datasets.Dataset.from_dict(
        {
            "messages": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]],
            "pair": [{"en": "x", "de": "y"}],
            "score": [0.5],
            "n": [3],
        }
    )
    assert read_columns(data, [0])[0] == {
        "messages.user": "a",
        "messages.assistant": "b",
        "pair.en": "x",
        "pair.de": "y",
        "n": [3],
    }
    assert read_columns([{"text": "a", "x": None}], [0]) == {0: {"text": "a"}}


# ---------------------------------------------------------------- healthy families


def causal(tmp_path, data, tok, collator):
    trainer = worlds.trainer(tw.gpt2(tok), data, None, tmp_path, collator=collator, tok=tok)
    return worlds.names(worlds.examined(trainer, *PROBES))


@pytest.mark.parametrize("kind", KINDS)
def test_healthy_families_are_silent(kind, tmp_path):
    tok = tw.tokenizer(kind)
    data = datasets.Dataset.from_dict({"text": tw.texts(120)})
    data = data.map(lambda b: {"input_ids": tok(b["text"])["input_ids"]}, batched=True)
    plain = DataCollatorForLanguageModeling(tok, mlm=False)
    assert causal(tmp_path, data, tok, plain) == []
    if kind == "bytes":
        assert causal(tmp_path, data, tok, DataCollatorWithFlattening()) == []
    tok = tw.tokenizer(kind, shape="bert")
    data = datasets.Dataset.from_dict({"text": tw.texts(120)})
    data = data.map(lambda b: tok(b["text"], padding="max_length", max_length=200), batched=True)
    trainer = worlds.trainer(
        tw.masked(tok), data, None, tmp_path, collator=DataCollatorForLanguageModeling(tok), tok=tok
    )
    assert worlds.names(worlds.examined(trainer, *PROBES)) == []


def test_blocks_of_a_packed_corpus_are_silent(tmp_path):
    tok = tw.tokenizer()
    ids = [i for text in tw.texts(300) for i in tok(text)["input_ids"]]
    blocks = [ids[i : i + 32] for i in range(0, len(ids) - 31, 32)]
    data = datasets.Dataset.from_dict({"input_ids": blocks, "labels": blocks})
    assert causal(tmp_path, data, tok, default_data_collator) == []


def test_windows_over_long_texts_lose_nothing(tmp_path):
    tok = tw.tokenizer(shape="bert")
    data = datasets.Dataset.from_dict({"text": tw.texts(60, 0, 30, 50)})

    def split(batch):
        made = tok(
            batch["text"],
            truncation=True,
            max_length=32,
            stride=8,
            return_overflowing_tokens=True,
        )
        rows = made.pop("overflow_to_sample_mapping")
        return {**made, "text": [batch["text"][i] for i in rows], "label": [i % 2 for i in rows]}

    data = data.map(split, batched=True, remove_columns=["text"])
    trainer = worlds.trainer(tw.bert(tok), data, None, tmp_path, tok=tok)
    assert worlds.names(worlds.examined(trainer, TRUNCATION, MATCH)) == []


@pytest.mark.parametrize("form", [str.lower, str.upper, lambda t: t.replace(".", "!?")])
def test_cleaned_texts_are_not_stale(form, tmp_path):
    tok = tw.tokenizer(shape="bert")
    data = datasets.Dataset.from_dict({"text": tw.texts(60), "label": [0, 1] * 30})
    data = data.map(lambda row: tok(form(row["text"])))
    trainer = worlds.trainer(tw.bert(tok), data, None, tmp_path, tok=tok)
    assert worlds.names(worlds.examined(trainer, MATCH, VOCABULARY)) == []


def test_marks_that_the_text_spells_out_are_meant(tmp_path):
    tok = worlds.tokenizer(bos_eos=True)
    data = worlds.classified(120).map(lambda r: {"text": r["text"].replace("w1", "[UNK]")})
    data = worlds.tokenized(data, tok).remove_columns("label")
    trainer = worlds.trainer(
        worlds.gpt2(), data, None, tmp_path,
        collator=DataCollatorForLanguageModeling(tok, mlm=False), tok=tok,
    )  # fmt: skip
    report = worlds.examined(trainer, VOCABULARY)
    assert worlds.names(report) == []


def test_a_chat_that_ends_with_its_own_mark(tmp_path):
    tok = tw.tokenizer(shape="bare")
    tok.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    said = [f"{a}\n{b}<|end|>\n" for a, b in zip(tw.texts(60), tw.texts(60, 1), strict=True)]
    data = datasets.Dataset.from_dict({"text": said}).map(lambda row: tok(row["text"]))
    assert causal(tmp_path, data, tok, DataCollatorForLanguageModeling(tok, mlm=False)) == []


def test_stale_ids_are_found_where_every_row_is_cut(tmp_path):
    tok = tw.tokenizer("wordpiece", shape="bert")
    other = tw.tokenizer("unigram", shape="bert", seed=3)
    few = tw.words()[:12]
    texts = [f"{few[i % 12]} {text}" for i, text in enumerate(tw.texts(120, 0, 20, 30))]
    data = datasets.Dataset.from_dict({"text": texts, "label": [0, 1] * 60})

    def found(splits):
        rows = data.map(lambda r: splits(r["text"], truncation=True, max_length=12))
        trainer = worlds.trainer(tw.bert(tok), rows, None, tmp_path, tok=tok)
        return worlds.names(worlds.examined(trainer, MATCH))

    assert found(other) == ["stale-tokens"]
    assert found(tok) == []
    others = np.random.default_rng(0).permutation(texts)  # a text of another row: unrelated
    ids = data.map(lambda row, i: tok(str(others[i])), with_indices=True)
    trainer = worlds.trainer(tw.bert(tok), ids, None, tmp_path, tok=tok)
    assert worlds.names(worlds.examined(trainer, MATCH)) == []


# ---------------------------------------------------------------- word labels


def tagger(tmp_path, kind, align, *, keep=True):
    """A trainer of a token classifier; `align(word of each token, tags)` gives the labels."""
    tok = tw.tokenizer(kind, shape="bert")

    def label(batch):
        made = tok(batch["tokens"], is_split_into_words=True)
        tags = batch["ner_tags"]
        made["labels"] = [align(made.word_ids(i), tags[i]) for i in range(len(tags))]
        return made

    data = tw.tagged(60).map(
        label, batched=True, remove_columns=[] if keep else ["tokens", "ner_tags"]
    )
    collator = DataCollatorForTokenClassification(tok)
    return worlds.trainer(tw.tagger(tok), data, None, tmp_path, collator=collator, tok=tok)


def first_piece(numbers, tags):
    firsts = [w is not None and w not in numbers[:i] for i, w in enumerate(numbers)]
    return [tags[w] if first else -100 for w, first in zip(numbers, firsts, strict=True)]


def every_piece(numbers, tags):
    return [-100 if w is None else tags[w] for w in numbers]


def by_position(numbers, tags):
    return ([-100, *tags] + [-100] * len(numbers))[: len(numbers)]


def by_position_filled(numbers, tags):
    return ([*tags] + [0] * len(numbers))[: len(numbers)]


@pytest.mark.parametrize("kind", KINDS)
def test_labels_on_their_words_are_silent(kind, tmp_path):
    for align in (first_piece, every_piece):
        trainer = tagger(tmp_path, kind, align)
        assert worlds.names(worlds.examined(trainer, WORD_LABELS, SUPERVISION)) == []


@pytest.mark.parametrize(
    ("kind", "align", "keep"),
    [
        ("wordpiece", by_position, True),
        ("bytes", by_position_filled, True),
        ("unigram", by_position, False),
        ("characters", by_position, True),
        ("wordpiece", lambda numbers, tags: tags, False),
    ],
)
def test_labels_by_position_are_found(kind, align, keep, tmp_path):
    trainer = tagger(tmp_path, kind, align, keep=keep)
    assert worlds.names(worlds.examined(trainer, WORD_LABELS)) == ["word-labels-misaligned"]


@pytest.mark.parametrize("faulty", [True, False])
def test_words_that_were_joined_before_they_were_split(faulty, tmp_path):
    tok = tw.tokenizer("bytes", shape="bert")

    def label(row):
        made = tok(" ".join(row["tokens"]), return_offsets_mapping=True)
        ends = np.cumsum([len(word) + 1 for word in row["tokens"]])
        owner = [None, *(int((ends < b).sum()) for _, b in made.pop("offset_mapping")[1:-1]), None]
        align = by_position if faulty else every_piece
        return {**made, "labels": align(owner, row["ner_tags"])}

    data = tw.tagged(60).map(label)
    collator = DataCollatorForTokenClassification(tok)
    trainer = worlds.trainer(tw.tagger(tok), data, None, tmp_path, collator=collator, tok=tok)
    wanted = ["word-labels-misaligned"] if faulty else []
    assert worlds.names(worlds.examined(trainer, WORD_LABELS)) == wanted


# ---------------------------------------------------------------- a data set by itself


def test_inspecting_a_data_set_by_itself():
    tok = tw.tokenizer("wordpiece", shape="bert", model_max_length=16)
    data = datasets.Dataset.from_dict({"text": tw.texts(80), "label": [0, 1] * 40})
    report = hf_recipe.inspect_dataset(data, processing_class=tok)
    assert "truncated-example" in {f.check for f in report.findings}
    assert report.crashed == {}
    other = tw.tokenizer("unigram", shape="bert")
    stale = data.map(lambda row: {"input_ids": other(row["text"])["input_ids"]})
    report = hf_recipe.inspect_dataset(stale, processing_class=tok)
    assert "stale-tokens" in {f.check for f in report.findings}
    foreign = data.map(lambda row: {"text": "привет мир как дела " + row["text"]})
    report = hf_recipe.inspect_dataset(foreign, processing_class=tok)
    assert "unknown-token" in {f.check for f in report.findings}


def test_the_collators_tokenizer_serves_too(tmp_path):
    tok = tw.tokenizer()
    data = datasets.Dataset.from_dict({"text": tw.texts(20)}).map(lambda row: tok(row["text"]))
    collator = DataCollatorForLanguageModeling(tok, mlm=False)
    trainer = worlds.trainer(tw.gpt2(tok), data, None, tmp_path, collator=collator)
    subject = worlds.subject(trainer)
    assert isinstance(tokenizer_of(subject), PreTrainedTokenizerFast)
    rows = text_rows(subject, "train")
    assert [row.ids for row in rows] == data["input_ids"][:]
    assert all(row.texts["text"] == text for row, text in zip(rows, data["text"], strict=True))
