import collections

import datasets
import numpy as np
import pyarrow as pa
import pytest

from hf_recipe.data.column_numbers import ColumnNumbers, Columns
from hf_recipe.data.columns import (
    blank_example,
    constant_input,
    measure_columns,
    missing_value,
)
from hf_recipe.data.duplicates import Repeats, conflicting_labels, duplicate_example, repeats
from hf_recipe.data.hashing import glances, shared
from hf_recipe.data.source import read_source
from hf_recipe.instruments.batches import Rows


def source(data):
    if isinstance(data, dict):
        data = datasets.Dataset.from_dict(data)
    return read_source(Rows(data, data, lambda rows: {}, "train"))


def columns(*items, rows=100):
    return Columns(tuple(ColumnNumbers(rows=rows, **item) for item in items), rows=rows)


def test_judges_on_literal_numbers():
    x = {"name": "x", "kind": "number", "role": "input"}
    assert not list(missing_value(columns(x)))
    (fault,) = missing_value(columns({**x, "nonfinite": 3, "bad_rows": (5, 8, 9)}))
    assert (fault.severity, fault.examples) == ("error", (5, 8, 9))
    (fault,) = missing_value(columns({**x, "nulls": 2}))
    assert fault.severity == "warning"
    assert not list(missing_value(columns({**x, "role": "", "nulls": 2})))
    (fault,) = blank_example(columns({**x, "kind": "text", "blank": 4}))
    assert "4 of 100" in fault.message
    y = {**x, "name": "y"}
    (fault,) = constant_input(columns({**x, "constant": True}, y))
    assert fault.subject == "x"
    assert "1 of 2 input columns" in fault.message
    (fault,) = constant_input(columns({**x, "constant": True}))
    assert "all 100 rows" in fault.message
    assert not list(constant_input(columns({**x, "constant": True}, rows=2)))


def test_numbers_agree_with_numpy():
    rng = np.random.default_rng(0)
    x = rng.normal(1e6, 2.0, 10_000)  # far from 0: naive moments would cancel
    lists = [rng.normal(size=rng.integers(1, 5)).tolist() for _ in range(10_000)]
    found = measure_columns(
        source({"x": x, "v": lists, "t": ["ab"] * 10_000}), ("x", "v", "t"), None
    )
    one, two, three = found.columns
    assert one.mean == pytest.approx(x.mean())
    assert one.deviation == pytest.approx(x.std(), rel=1e-9)
    assert (one.low, one.high) == (x.min(), x.max())
    flat = np.concatenate(lists)
    assert two.mean == pytest.approx(flat.mean())
    assert two.deviation == pytest.approx(flat.std())
    assert two.mean_length == pytest.approx(len(flat) / 10_000)
    assert three.constant
    assert (three.shortest, three.longest) == (2, 2)


def test_planted_faults_are_found_by_row():
    x = np.arange(5_000.0)
    x[[7, 4_500]] = np.nan, np.inf
    text = ["some words"] * 5_000
    text[4_321] = " \t"
    vectors = [[1.0, 2.0]] * 4_999 + [[1.0, float("nan")]]
    found = measure_columns(
        source({"x": x, "text": text, "v": vectors, "n": [None] + [1] * 4_999}),
        ("x", "text", "v", "n"),
        None,
    )
    faults = {f.subject: f for f in missing_value(found)}
    assert faults["x"].examples == (7, 4_500)
    assert faults["v"].examples == (4_999,)
    assert faults["n"].severity == "warning"
    (blank,) = blank_example(found)
    assert blank.examples == (4_321,)


@pytest.mark.parametrize("seed", range(5))
def test_clean_columns_are_silent(seed):
    rng = np.random.default_rng(seed)
    data = {
        "x": rng.normal(size=300),
        "k": rng.integers(0, 2, 300),
        "t": [str(i) for i in range(300)],
    }
    found = measure_columns(source(data), ("x", "k", "t"), None)
    for judge in (missing_value, blank_example, constant_input):
        assert not list(judge(found))


# ---------------------------------------------------------------- copies


def test_copies_on_literal_numbers():
    base = {"columns": ("t",), "rows": 1000, "distinct": 900, "copies": 100}
    (fault,) = duplicate_example(Repeats(**base))
    assert "100 of 1,000" in fault.message
    assert not list(duplicate_example(Repeats(**{**base, "copies": 5, "distinct": 995})))
    assert not list(conflicting_labels(Repeats(**base)))
    (fault,) = conflicting_labels(Repeats(**base, conflicting=20, conflict_groups=10, floor=0.014))
    assert fault.severity is None
    assert "0.0140 nats" in fault.message
    drawn = {**base, "distinct": 50, "copies": 950}
    (fault,) = conflicting_labels(Repeats(**drawn, conflicting=900, conflict_groups=50, floor=0.3))
    assert fault.severity == "note"


def test_copies_and_conflicts_are_counted():
    texts = [f"row {i}" for i in range(100)] + ["row 3", "row 4", "row 4"]
    labels = [0] * 100 + [1, 0, 0]
    found = repeats(source({"text": texts, "label": labels}), ("text",), "label")
    assert (found.distinct, found.copies) == (100, 3)
    assert found.examples == (100, 101, 102)
    assert (found.conflicting, found.conflict_groups) == (2, 1)
    assert set(found.conflict_examples) == {3, 100}
    assert found.floor == pytest.approx(2 * np.log(2) / 103)
    assert repeats(source({"text": texts}), ("text",), None).conflicting is None


@pytest.mark.parametrize("kind", ["text", "bytes", "file"])
def test_copies_are_those_that_counting_finds(kind):
    """Texts that begin and end alike, short ones, missing ones, over several chunks."""
    rng = np.random.default_rng(0)
    ends = rng.integers(0, 40, (10_000, 2))
    cells = [f"<s>{'x' * a} the same {b} middle{'y' * a}</s>" if a else str(b) for a, b in ends]
    if kind != "text":
        cells = [cell.encode() for cell in cells]
    cells[17] = cells[4_900] = None
    counted = collections.Counter(cells)
    if kind == "file":
        column = pa.array([c and {"bytes": c, "path": None} for c in cells])
    else:
        column = pa.array(cells)
    found = repeats(source(datasets.Dataset(pa.table({"x": column}))), ("x",), None)
    assert (found.distinct, found.copies) == (len(counted), 10_000 - len(counted))
    seen = set()
    later = [i for i, cell in enumerate(cells) if cell in seen or seen.add(cell)]
    assert found.examples == tuple(later[:20])


def test_what_is_equal_glances_alike():
    texts = pa.array(["", "a", None, "seven..", "eight...", "nine chars", None, "a", "eight..."])
    looks = glances(texts)
    assert (looks[[1, 2, 4]] == looks[[7, 6, 8]]).all()
    assert (glances(texts.slice(3)) == looks[3:]).all()
    assert (shared(looks)[[1, 2, 4, 6, 7, 8]]).all()
    many = np.random.default_rng(0).integers(0, 2**63, 100_000).astype(np.uint64)
    assert shared(many).mean() < 0.06
