"""Files that a newcomer has: read as they are meant, or refused with the place and the reason."""

import datasets
import numpy as np
import pytest

from hf_recipe.data.files import load_path
from hf_recipe.data.unreadable import FilesOpened, unreadable_files
from hf_recipe.data.written import WrittenCells, written_missing
from hf_recipe.inspection import inspect_dataset
from tests.data import planted
from tests.data.asking import ask, found


def read(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return load_path(path)["train"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "text,label\nhello,1\nyou,0\n"),
        ("mark.csv", "\ufefftext,label\nhello,1\nyou,0\n"),
        ("semicolon.csv", "text;label\nhello;1\nyou;0\n"),
        ("tabs.csv", "text\tlabel\nhello\t1\nyou\t0\n"),
        ("a.tsv", "text\tlabel\nhello\t1\nyou\t0\n"),
        ("a.jsonl", '{"text": "hello", "label": 1}\n{"text": "you", "label": 0}\n'),
        ("mark.jsonl", '\ufeff{"text": "hello", "label": 1}\n{"text": "you", "label": 0}\n'),
        ("gaps.jsonl", '\n{"text": "hello", "label": 1}\n\n{"text": "you", "label": 0}\n'),
        ("a.json", '[{"text": "hello", "label": 1},\n {"text": "you", "label": 0}]'),
        ("mark.json", '\ufeff[{"text": "hello", "label": 1}, {"text": "you", "label": 0}]'),
        ("wrapped.json", '{"data": [{"text": "hello", "label": 1},\n'
                         '{"text": "you", "label": 0}], "version": 2}'),
        ("line.json", '{"data": [{"text": "hello", "label": 1}, {"text": "you", "label": 0}]}'),
    ],
)  # fmt: skip
def test_the_same_rows(tmp_path, name, content):
    assert read(tmp_path, name, content).to_dict() == {"text": ["hello", "you"], "label": [1, 0]}


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.csv", "text,label\ncafé,1\n".encode("latin-1"), "column text is not UTF-8"),
        ("b.csv", "text,label\nhello,1\n".encode("utf-16"), "written in UTF-16"),
        ("c.csv", "a,a,label\n1,2,3\n", "column names occur more than once: a"),
        ("d.csv", "", "[Ee]mpty"),
        ("e.csv", "a,b\n1,2\n3,4,5\n", "Expected 2 columns, got 3"),
        ("a.json", '[{"x": 1}, {"x": "one"}]', "column x holds int and str, first in row 1"),
        ("b.json", '{"a": [{"x": 1}], "b": [{"x": 1}]}', "several lists of rows: a, b"),
        ("c.json", "[1, 2]", "no list of objects"),
        ("d.jsonl", '{"x": 1}\n{"x": ', "cannot read"),
    ],
)
def test_refused_with_the_reason(tmp_path, name, content, why):
    with pytest.raises(ValueError, match=why):
        read(tmp_path, name, content)


def test_splits_that_hold_other_kinds():
    train = datasets.Dataset.from_dict({"x": [0.5] * 30, "label": [0, 1] * 15})
    test = datasets.Dataset.from_dict({"x": ["a"] * 30, "label": [0, 1] * 15})
    with pytest.raises(ValueError, match="column x holds numbers in train and text in test"):
        inspect_dataset({"train": train, "test": test})


def test_kinds_that_few_checks_read_are_named():
    data = datasets.Dataset.from_dict(
        {"text": [{"a": f"t{i}", "b": i} for i in range(30)], "label": [0, 1] * 15}
    )
    said = inspect_dataset(data).answers[0].answer
    assert said.endswith("of kinds that few checks read: text")


# ---------------------------------------------------------------- words for nothing


def test_missing_values_written_as_words():
    data = planted.keyed(0, rows=600)
    spoilt = data.map(lambda row, i: {"text": "None" if i % 60 == 7 else row["text"]},
                      with_indices=True)  # fmt: skip
    (finding,) = found(ask(spoilt, "missing-value"), "missing-value")
    assert finding.severity == "warning"
    assert "text holds 'None' as a text in 10 of 600 rows" in finding.message
    assert finding.examples == tuple(range(7, 600, 60))
    assert not found(ask(data, "missing-value"), "missing-value")


def test_a_word_among_numbers():
    rng = np.random.default_rng(0)
    cells = [f"{v:.3f}" for v in rng.normal(size=300)]
    data = {"x": [*cells[:-4], *["N/A"] * 4], "label": rng.integers(0, 2, 300).tolist()}
    (finding,) = found(ask(datasets.Dataset.from_dict(data), "missing-value"), "missing-value")
    assert "x is read as text: 296 of 300 cells are numbers" in finding.message
    assert "'N/A'" in finding.message


def written(**values):
    return list(written_missing(WrittenCells(**{"column": "x", "rows": 1_000, "different": 51,
                                                **values})))  # fmt: skip


def test_words_on_literal_numbers():
    few = {"nulls": 30, "words": ("None",), "null_rows": (4,)}
    assert len(written(**few)) == 1
    assert not written(**{**few, "different": 6})  # a category
    assert not written(**{**few, "nulls": 1})  # somebody wrote "none"
    assert len(written(numbers=990, others=2, shown="-", other_rows=(9,))) == 1
    assert not written(numbers=990, others=9, shown="V45", other_rows=(9,))  # codes
    assert not written(numbers=1_000)


# ---------------------------------------------------------------- files that cannot be read


def test_unreadable_images_stop_a_training():
    data = planted.digits(0).select(range(120))
    rows = data.with_format("arrow")[:].to_pylist()
    rows[3]["image"]["bytes"] = b"no image"
    rows[8]["image"] = None
    broken = datasets.Dataset.from_list(rows, features=data.features)
    report = ask(broken, "missing-value")
    seen = {f.subject: f for f in found(report, "missing-value")}
    assert set(seen) == {"image", "images of image"}
    assert seen["images of image"].severity == "error"
    assert seen["images of image"].examples == (3,)
    assert "1 of 120 images of image cannot be read, rows 3" in seen["images of image"].message
    assert not found(ask(data, "missing-value"), "missing-value")
    assert not list(unreadable_files(FilesOpened("image", "images", 100, 0)))
