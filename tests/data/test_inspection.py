import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from hf_recipe.inspection import inspect_dataset
from tests.data import worlds


def loud(report):
    assert not report.crashed, report.crashed
    return sorted(worlds.loud(report))


def test_a_dict_of_splits():
    train, evaluation = worlds.classified(300, 0), worlds.classified(80, 1)
    clean = datasets.DatasetDict({"train": train, "validation": evaluation})
    report = inspect_dataset(clean)
    assert not loud(report)
    assert report.status == "finished"
    assert {"split-leak", "class-imbalance", "missing-value"} <= set(report.ran)
    assert "label: label (guessed); input: text (guessed)" in report.answers[0].answer
    leaky = {
        "train": train,
        "test": datasets.concatenate_datasets([evaluation, train.select(range(3, 11))]),
    }
    report = inspect_dataset(leaky, label="label", text="text")
    assert loud(report) == ["split-leak"]
    (finding,) = [f for f in report.flat if f.check == "split-leak"]
    assert finding.examples == tuple(range(80, 88))
    assert finding.split == "test"


def test_batches_are_looked_at_with_a_tokenizer():
    report = inspect_dataset(
        worlds.classified(100), text="text", label="label", processing_class=worlds.tokenizer()
    )
    assert not loud(report)
    (shown,) = [e for e in report.exhibits if "decoded" in e.title]
    assert shown.private
    assert "[CLS] w" in shown.rows[0][4]


def test_a_model_to_fit():
    data = worlds.classified(100, classes=3)
    report = inspect_dataset(data, label="label", model=worlds.bert(num_labels=2))
    assert loud(report) == ["label-out-of-range"]
    report = inspect_dataset(data, label="label", model=worlds.bert(num_labels=3))
    assert not loud(report)


def test_misspelt_columns_and_other_bad_input(tmp_path):
    data = worlds.classified(20)
    with pytest.raises(ValueError, match="no column 'lable'; did you mean 'label'"):
        inspect_dataset(data, label="lable")
    with pytest.raises(ValueError, match="the validation split has no rows"):
        inspect_dataset({"train": data, "validation": data.select([])})
    with pytest.raises(ValueError, match="no such file"):
        inspect_dataset(tmp_path / "nothing.csv")
    (tmp_path / "data.xyz").write_text("?")
    with pytest.raises(ValueError, match="cannot read"):
        inspect_dataset(tmp_path / "data.xyz")
    with pytest.raises(TypeError, match="got int"):
        inspect_dataset(3)
    with pytest.raises(ValueError, match="empty"):
        inspect_dataset({})


def test_one_row_one_class_no_label_hostile_text():
    assert not loud(inspect_dataset(datasets.Dataset.from_dict({"text": ["a"], "label": [0]})))
    one = datasets.Dataset.from_dict({"text": [f"a {i}" for i in range(50)], "label": [1] * 50})
    assert loud(inspect_dataset(one)) == ["class-imbalance"]
    none = one.remove_columns("label")
    report = inspect_dataset(none)
    assert "no label column" in report.answers[0].answer
    assert not loud(report)
    hostile = [
        "<script>alert(1)</script>",
        "\x00\x1b[31m",
        "x" * 10**6,
        "\ud800".encode("utf-8", "replace").decode(),
    ]
    assert not loud(
        inspect_dataset(datasets.Dataset.from_dict({"text": hostile, "label": [0, 1, 0, 1]}))
    )


def test_files(tmp_path):
    data = worlds.classified(60)
    data.to_csv(tmp_path / "d.csv")
    data.to_json(tmp_path / "d.jsonl")
    data.to_parquet(tmp_path / "d.parquet")
    (tmp_path / "d.json").write_text(str(data.to_list()).replace("'", '"'))
    for name in ("d.csv", "d.jsonl", "d.parquet", "d.json"):
        report = inspect_dataset(tmp_path / name)
        assert report.environment["rows"] == {"train": 60}
        assert not loud(report)
    folder = tmp_path / "splits"
    folder.mkdir()
    data.to_csv(folder / "train.csv")
    data.select(range(20)).to_csv(folder / "test.csv")
    assert loud(inspect_dataset(folder)) == ["split-leak"]
    (tmp_path / "broken.csv").write_text('a,b\n1,2\n3,4,5,6\n"x')
    with pytest.raises(ValueError, match="cannot read"):
        inspect_dataset(tmp_path / "broken.csv")


def test_folder_of_images(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(12):
            pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    report = inspect_dataset(tmp_path)
    assert not loud(report)
    assert "input: image (guessed)" in report.answers[0].answer


def test_streams_are_sampled_and_said_so():
    stream = worlds.classified(300).to_iterable_dataset()
    report = inspect_dataset(stream)
    assert not loud(report)
    assert "stream" in str(report.environment["rows"]["train"])
    assert "labels-masked" in report.skipped


def test_torch_data_set_and_digits():
    x, y = load_digits(return_X_y=True)
    images = torch.tensor(x, dtype=torch.float32)
    report = inspect_dataset(torch.utils.data.TensorDataset(images, torch.tensor(y)), label="1")
    assert not loud(report)
    assert report.environment["rows"] == {"train": 1797}


def test_missing_values_in_a_table():
    data = datasets.Dataset.from_dict(
        {"a": [1.0, float("nan"), 2.0] * 20, "b": list(range(60)), "label": [0, 1] * 30}
    )
    assert loud(inspect_dataset(data)) == ["missing-value"]
