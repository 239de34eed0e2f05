"""Reading, telling columns apart, and cutting without leaks."""

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from hf_recipe.runner.cutting import cut
from hf_recipe.runner.data import load
from hf_recipe.runner.options import UsageError, parse


def options(tmp_path, **flags):
    arguments = ["--use_cpu", "--output_dir", str(tmp_path / "out")]
    for name, value in flags.items():
        arguments += [f"--{name}", str(value)]
    return parse(arguments)


def csv(tmp_path, text, name="rows.csv"):
    path = tmp_path / name
    path.write_text(text)
    return path


def table(rows=100):
    lines = [
        f"{'good' if i % 2 else 'bad'} film number {i},{'pos' if i % 2 else 'neg'}"
        for i in range(rows)
    ]
    return "review,label\n" + "\n".join(lines) + "\n"


def test_digits_are_cut_by_class_and_always_the_same(tmp_path):
    data = load(options(tmp_path))
    assert data.task.name == "image-classification"
    assert sum(len(part) for part in data.splits.values()) == 1797
    shares = np.bincount(data.labels("test"), minlength=10) / len(data.labels("test"))
    assert shares.min() > 0.08
    assert data.fingerprint == load(options(tmp_path)).fingerprint
    assert data.fingerprint != load(options(tmp_path, seed=1)).fingerprint


def test_text_is_told_from_its_columns(tmp_path):
    data = load(options(tmp_path, train_file=csv(tmp_path, table())))
    assert (data.task.name, data.kind, data.inputs) == (
        "sequence-classification",
        "text",
        ("review",),
    )
    assert data.classes == ("neg", "pos")
    assert {part: len(rows) for part, rows in data.splits.items()} == {
        "train": 60,
        "validation": 20,
        "test": 20,
    }


def test_numbers_and_a_real_target_are_a_regression(tmp_path):
    lines = ["a,b,target"] + [f"{i},{i % 7},{i * 0.5 + 0.25}" for i in range(100)]
    data = load(options(tmp_path, train_file=csv(tmp_path, "\n".join(lines))))
    assert (data.task.name, data.kind, data.inputs) == ("regression", "numbers", ("a", "b"))
    assert abs(float(data.labels("train").mean())) < 1e-5
    assert abs(float(data.labels("train").std()) - 1) < 1e-4


@pytest.mark.parametrize("sign", [",", ";", ", "])
def test_a_table_is_read_as_inspect_reads_it(sign, tmp_path):
    """Whatever parts its cells; and a class may be called as pandas calls nothing."""
    lines = [("a", "b", "label")]
    lines += [(str(i), str(i * i % 7), ("None", "NA")[i % 2]) for i in range(100)]
    text = "\n".join(sign.join(cells) for cells in lines)
    data = load(options(tmp_path, train_file=csv(tmp_path, text)))
    assert (data.kind, data.inputs, data.classes) == ("numbers", ("a", "b"), ("NA", "None"))


def test_a_folder_of_images(tmp_path):
    for name, shade in (("dark", 10), ("light", 240)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for k in range(25):
            picture = Image.new("L", (8, 8), shade + k % 8)
            picture.putpixel((k % 8, k // 8), 128)
            picture.save(tmp_path / "pictures" / name / f"{k}.png")
    data = load(options(tmp_path, train_file=tmp_path / "pictures"))
    assert (data.kind, data.classes) == ("image", ("dark", "light"))


def test_equal_inputs_stay_on_one_side():
    rows = Dataset.from_dict(
        {"text": [f"row {i % 50}" for i in range(400)], "label": [i % 2 for i in range(400)]}
    )
    first, second = cut(rows, ["text"], 0.25, seed=0, strata=rows["label"])
    assert not set(first["text"]) & set(second["text"])
    assert 80 <= len(second) <= 120
    other = cut(rows, ["text"], 0.25, seed=1, strata=rows["label"])[1]
    assert set(other["text"]) != set(second["text"])


@pytest.mark.parametrize(
    ("text", "flags", "says"),
    [
        (None, {}, "no such file"),
        ("review,stars\ngood,1\n", {}, "no label column found among review, stars"),
        (table(), {"label_column": "stars"}, "--label_column stars: no such column"),
        (table(), {"text_column": "body"}, "--text_column body: no such column"),
        (table(), {"task": "regression"}, "--task regression needs numbers"),
        (table(), {"task": "image-classification"}, "needs a column of images"),
        ('a,label\n"unclosed,1\nx,2,3,4\n', {}, "cannot be read"),
        ('a,label\nx,1\ny,"never closed\nz,1\n', {}, "opens a quote that never closes"),
        ("", {}, "cannot be read"),
        (
            table().replace(",pos", ",", 1),
            {},
            "1 rows have no value in 'label', the first is row 1",
        ),
        (table(10), {}, "8 are the least"),
    ],
)
def test_bad_input_is_one_line_that_names_it(tmp_path, text, flags, says):
    path = tmp_path / "rows.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError) as error:
        load(options(tmp_path, train_file=path, **flags))
    assert says in str(error.value)
    assert "\n" not in str(error.value)
