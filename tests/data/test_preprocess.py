"""Preprocessors: what they do, what they learn from, and what their fingerprint hangs on."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_recipe.data.preprocess import (
    BlindInputs,
    Deduplicate,
    Downsample,
    DropBlanks,
    DropColumns,
    GroupSplit,
    NormaliseText,
    Pipeline,
    Standardise,
)

ROOT = Path(__file__).resolve().parents[2]


def texts(*values):
    return datasets.Dataset.from_dict({"text": list(values), "label": list(range(len(values)))})


def test_rows_that_go():
    data = texts("a b", "  ", None, "a b", "c")
    assert DropBlanks(("text",)).transform(data)["label"][:] == [0, 3, 4]
    assert Deduplicate(("text",)).transform(data)["label"][:] == [0, 1, 2, 4]
    assert data.filter(DropBlanks(("text",)))["label"][:] == [0, 3, 4]
    assert DropColumns(("label",)).transform(data).column_names == ["text"]


def test_texts_are_normalised_as_asked():
    data = texts("  Caf\u00e9\t 42 ", None)
    plain = NormaliseText(("text",))
    assert data.map(plain)["text"][:] == ["caf\u00e9 42", None]
    every = NormaliseText(("text",), accents=True, digits=True)
    assert every.transform(data)["text"][0] == "cafe 00"
    none = NormaliseText(("text",), case=False, spaces=False)
    assert none.transform(data)["text"][0] == "  Caf\u00e9\t 42 "


def test_inputs_are_cut_down():
    data = texts("a b c d e", "f")
    for keep, left in (("head", "a b"), ("tail", "d e"), ("middle", "b c")):
        step = Downsample(("text",), length=2, keep=keep)
        assert step.transform(data)["text"][:] == [left, "f"]
    ids = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3], [4]]})
    assert Downsample(("input_ids",), length=2).transform(ids)["input_ids"][:] == [[1, 2], [4]]
    picture = datasets.Dataset.from_dict(
        {"image": [Image.new("RGB", (20, 10), "red")]}
    ).cast_column("image", datasets.Image())
    small = Downsample(("image",), side=8).transform(picture)[0]["image"]
    assert small.size == (8, 4)
    assert np.asarray(BlindInputs(("image",)).transform(picture)[0]["image"]).max() == 0
    with pytest.raises(ValueError, match="length= or side="):
        Downsample(("text",))
    with pytest.raises(ValueError, match="got 0"):
        Downsample(("text",), length=0)


def test_inputs_are_blinded():
    data = datasets.Dataset.from_dict({"x": [[1.5, 2.0]], "n": [3], "t": ["word"], "label": [1]})
    row = BlindInputs(("x", "n", "t")).transform(data)[0]
    assert row == {"x": [0.0, 0.0], "n": 0, "t": "", "label": 1}


def test_standardising_learns_from_the_training_rows_alone():
    def numbers(low, rows):
        return datasets.Dataset.from_dict(
            {"x": [[low + i, 7.0] for i in range(rows)], "n": list(range(low, low + rows))}
        )

    splits = datasets.DatasetDict({"train": numbers(0, 50), "validation": numbers(1000, 10)})
    pipeline = Pipeline((Standardise(("x", "n")),))
    done = pipeline.fit_transform(splits)
    train = np.asarray(done["train"]["x"][:])
    assert train[:, 0].mean() == pytest.approx(0, abs=1e-9)
    assert train[:, 0].std() == pytest.approx(1)
    assert (train[:, 1] == 0).all()
    assert np.mean(done["train"]["n"][:]) == pytest.approx(0, abs=1e-9)
    assert done["validation"]["x"][0][0] == pytest.approx((1000 - 24.5) / np.arange(50).std())
    poisoned = datasets.DatasetDict({**splits, "validation": numbers(-9999, 10)})
    assert pipeline.fit_transform(poisoned)["train"]._fingerprint == done["train"]._fingerprint
    with pytest.raises(ValueError, match="fit"):
        Standardise(("x",)).transform(splits["train"])
    with pytest.raises(ValueError, match="no split 'train'"):
        pipeline.fit_transform({"test": splits["train"]})


def test_a_group_is_never_parted():
    data = datasets.Dataset.from_dict({"who": [i % 40 for i in range(400)]})
    parts = GroupSplit("who", share=0.3).split(data)
    train, held = set(parts["train"]["who"]), set(parts["validation"]["who"])
    assert not train & held
    assert len(train | held) == 40
    assert 4 <= len(held) <= 20
    assert set(GroupSplit("who", share=0.3, seed=1).split(data)["validation"]["who"]) != held


STEPS = [
    DropBlanks(("text",)),
    Deduplicate(("text",)),
    Downsample(("text",), length=2),
    NormaliseText(("text",)),
    GroupSplit("label"),
    BlindInputs(("text",)),
    DropColumns(("label",)),
]


@pytest.mark.parametrize("step", STEPS, ids=lambda s: type(s).__name__)
def test_the_fingerprint_is_told_by_input_step_and_parameters(step):
    data = texts("a", "b b b", "c")
    first, again = step.transform(data), step.transform(data)
    assert first._fingerprint == again._fingerprint == step.fingerprint(data._fingerprint)
    assert step.transform(data.select([0, 1]))._fingerprint != first._fingerprint
    name = next(iter(dataclasses.asdict(step)))
    other = dataclasses.replace(step, **{name: "text" if name == "column" else ("label",)})
    assert other == step or other.fingerprint("x") != step.fingerprint("x")


def test_one_edited_parameter_changes_the_fingerprint():
    step = NormaliseText(("text",))
    assert dataclasses.replace(step, digits=True).fingerprint("x") != step.fingerprint("x")
    assert Downsample(("t",), length=3).fingerprint("x") != STEPS[2].fingerprint("x")


def test_the_fingerprint_does_not_hang_on_the_hash_seed():
    code = (
        "from hf_recipe.data.preprocess import NormaliseText, GroupSplit\n"
        "print(NormaliseText(('a', 'b')).fingerprint('x'), GroupSplit('who').fingerprint('x'))"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1


def test_a_missing_column_is_named():
    with pytest.raises(ValueError, match="no column 'txt'; there are text, label"):
        NormaliseText(("txt",)).transform(texts("a"))
