"""Broken data: a clear finding or error, never a traceback, never a sure verdict that is wrong."""

import datasets
import numpy as np
import pytest

from hf_recipe.inspection import inspect_dataset
from tests.data import planted, worlds


def looked_at(data, **roles):
    report = inspect_dataset(data, **roles)
    assert not report.crashed, report.crashed
    return report


def test_a_quote_that_never_closes(tmp_path):
    path = tmp_path / "broken.csv"
    path.write_text('text,label\nhello,1\nfoo,"2\nbar,3\n')
    with pytest.raises(ValueError, match="row 1 opens a quote that never closes"):
        inspect_dataset(path)
    path.write_text('text,label\n"two\nlines",1\n5" screw,0\n')  # odd, and in order
    assert looked_at(path).environment["rows"] == {"train": 2}


def test_a_split_without_labels():
    data = {
        "train": worlds.classified(300, 0),
        "test": worlds.classified(120, 1).remove_columns("label"),
    }
    with pytest.raises(ValueError, match="the test split has no column 'label'"):
        inspect_dataset(data, label="label")
    report = looked_at(data)
    assert not worlds.loud(report)


def test_mixed_types_of_a_torch_data_set():
    rows = [{"a": 1.0 if i % 2 else "one", "label": i % 2} for i in range(60)]
    report = looked_at(rows, label="label")
    assert report.status == "finished"


def test_an_image_that_cannot_be_decoded_is_left_out():
    data = planted.digits(0).select(range(400))
    table = data.with_format("arrow")[:].to_pylist()
    table[3]["image"]["bytes"] = b"no image"
    broken = datasets.Dataset.from_list(table, features=data.features)
    report = looked_at(broken, label="label")
    notes = [m.values.get("note", "") for m in report.measurements]
    assert any("1 rows could not be decoded, first row 3" in str(note) for note in notes)


def test_very_many_classes_have_no_sure_verdict():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(50_000), 2))[:60_000]
    data = datasets.Dataset.from_dict({"x": rng.normal(size=60_000), "label": labels.tolist()})
    report = looked_at(data, label="label")
    assert not worlds.loud(report)
    assert "suspect-label" in report.skipped
