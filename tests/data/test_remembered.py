import numpy as np
import pytest
from transformers import DataCollatorWithPadding, Trainer

import hf_recipe
from hf_recipe.core.check import Located, Skip
from hf_recipe.data import columns, context, duplicates, label_copies
from hf_recipe.data.label_copies import COPIES
from hf_recipe.data.remembered import KEPT, recalling, remembering
from hf_recipe.data.unreadable import OPENED
from hf_recipe.data.written import WRITTEN
from tests.data import planted, worlds
from tests.models import arguments, bert, words


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_RECIPE_CACHE", str(tmp_path / "kept"))


def tokenized(seed=0):
    rng = np.random.default_rng(seed)
    rows = worlds.classified(600, seed)
    data = worlds.tokenized(rows).remove_columns("text")
    return data.add_column("weight", rng.normal(size=len(data)).tolist())


def launched(data, tmp_path):
    trainer = worlds.trainer(
        worlds.bert(num_labels=2), data, None, tmp_path,
        collator=DataCollatorWithPadding(worlds.tokenizer()), tok=worlds.tokenizer(),
    )  # fmt: skip
    recipe = hf_recipe.attach(trainer, select=["data"])
    recipe.preflight()
    recipe.detach()
    assert not recipe.report.crashed
    return recipe.report


def refuse(*args, **kwargs):
    raise AssertionError("the data was read again")


def test_attach_reports_what_inspection_found_out(tmp_path):
    data = tokenized()
    before = launched(data, tmp_path)
    assert "inspect_dataset" in before.skipped["local-context-enough"]
    inspected = hf_recipe.inspect_dataset(data, label="label", text="input_ids")
    after = launched(data, tmp_path)
    answers = {a.question: a.answer for a in after.answers}
    said = [a for a in inspected.answers if a.question.startswith(("Are local", "How far"))]
    assert said
    assert all(answers[a.question] == a.answer for a in said)
    assert "local-context-enough" in after.ran
    other = launched(tokenized(1), tmp_path)
    assert "inspect_dataset" in other.skipped["local-context-enough"]


def test_a_second_launch_reads_a_file(tmp_path, monkeypatch):
    data = tokenized()
    first = launched(data, tmp_path)
    for module, name in ((columns, "summarise"), (duplicates, "repeats")):
        monkeypatch.setattr(module, name, refuse)
    second = launched(data, tmp_path)
    assert [f.message for f in second.flat] == [f.message for f in first.flat]
    assert second.exhibits == first.exhibits
    for name in ("missing-value", "duplicate-example", "outlier-example"):
        assert name in second.ran


def test_another_label_is_another_question(monkeypatch):
    data = planted.keyed(0)
    data = data.add_column("other", data["label"])
    first = hf_recipe.inspect_dataset(data, label="label", text="text")
    monkeypatch.setattr(context, "climb", refuse)
    again = hf_recipe.inspect_dataset(data, label="label", text="text")
    assert again.exhibits == first.exhibits
    assert again.answers == first.answers
    assert [m.values for m in again.measurements] == [m.values for m in first.measurements]
    asked = hf_recipe.inspect_dataset(data, label="other", text="text")
    assert "read again" in asked.crashed["local-context-enough"]


def test_streams_and_torch_data_are_never_remembered(tmp_path):
    stream = worlds.classified(300).to_iterable_dataset()
    hf_recipe.inspect_dataset(stream)
    assert not list((tmp_path / "kept").glob("*.json"))


@pytest.mark.parametrize("build", [planted.keyed, planted.digits])
def test_what_is_kept_reads_back_as_it_was(build):
    data = planted.halves(build(0).select(range(900)))
    from hf_recipe.catalogue import PROBES
    from hf_recipe.inspection import choose_roles, read_split, subject_of

    sources = {name: read_split(name, part) for name, part in data.items()}
    roles = choose_roles(sources["train"], "label", [])[0]
    subject = subject_of(data, sources, "train", roles, None, None)
    seen, unfit = 0, []
    for probe in PROBES.values():
        if probe.name not in KEPT:
            assert remembering(probe) is probe
            continue
        try:
            found = list(remembering(probe).take(subject))
        except Skip:
            unfit.append(probe.name)
            continue
        again = list(recalling(probe).take(subject))
        assert str(again) == str(found), probe.name
        seen += sum(isinstance(item, Located) for item in found)
    assert seen > 8
    unfit.remove(COPIES.name)  # an inspection looks for them along with everything else
    assert unfit in ([WRITTEN.name], [OPENED.name])  # words in images, files in texts
    assert {p.name for p in PROBES.values()} >= KEPT


def test_copies_are_remembered_by_how_ids_are_spelled(tmp_path, monkeypatch):
    data = words(80)
    asked = []
    monkeypatch.setattr(label_copies, "_named", lambda *seen: asked.append(1) or [])
    for tok in (None, None, worlds.tokenizer()):
        trainer = Trainer(
            model=bert(), args=arguments(tmp_path), train_dataset=data, processing_class=tok
        )
        hf_recipe.attach(trainer, select=["target-in-input"]).preflight()
    assert len(asked) == 2  # anew where ids have a spelling
