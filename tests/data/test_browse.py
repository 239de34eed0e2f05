"""The rows in a table, columns that go together, and pictures of the rows."""

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

from hf_recipe.data import browse
from hf_recipe.data.associations import associated, cramers_v, epsilon, laid
from hf_recipe.inspection import inspect_dataset
from tests.data import planted


def exhibit(report, title):
    return next(e for e in report.exhibits if e.title == title)


def people(seed=0, rows=1_500):
    """One site labels otherwise, one column says the same as another, one says nothing."""
    rng = np.random.default_rng(seed)
    site = rng.choice(["north", "south", "west"], rows)
    height = rng.normal(170, 10, rows)
    label = ((height > 170) ^ ((site == "west") & (rng.random(rows) < 0.5))).astype(int)
    return datasets.Dataset.from_dict({
        "site": site.tolist(), "height": height, "inches": height / 2.54,
        "coin": rng.integers(0, 2, rows), "label": label.tolist(),
    })  # fmt: skip


def test_rows_that_checks_name_come_first(tmp_path):
    data = people()
    spoilt = data.map(lambda row, i: {"height": float("nan")} if i in (700, 900) else row,
                      with_indices=True)  # fmt: skip
    path = tmp_path / "rows.parquet"
    report = inspect_dataset({"train": spoilt, "test": people(1, 300)}, label="label",
                             rows_path=path)  # fmt: skip
    table = exhibit(report, browse.TITLE)
    assert table.browse
    assert table.private
    assert table.columns[:5] == ("split", "row", "named by", "suspect", "label")
    named = [row for row in table.rows if row[2]]
    assert {row[1] for row in named} >= {700, 900}
    assert next(row for row in named if row[:2] == ("train", 700))[6] == "nan"
    train = [row for row in table.rows if row[0] == "train"]
    count = sum(bool(row[2]) for row in train)
    assert all(row[2] for row in train[:count])
    assert len({row[:2] for row in table.rows}) == len(table.rows) == 1_300  # 1,000 a split
    everything = pq.read_table(path)
    assert everything.num_rows == 1_800
    assert everything.column("named by").to_pylist()[700] == "missing-value"
    assert everything.column("site: characters").to_pylist()[:3] == [
        len(site) for site in data["site"][:3]
    ]
    assert report.exhibits[0] is table


def test_suspects_stand_in_the_table_and_pictures_of_every_class_are_shown():
    data = planted.digits(0).select(range(900))
    wrong = [(y + 1) % 10 if i % 9 == 0 else y for i, y in enumerate(data["label"])]
    data = data.remove_columns("label").add_column("label", wrong)
    report = inspect_dataset(data, label="label")
    table, pictures = exhibit(report, browse.TITLE), report.exhibits[0]
    assert pictures.title == "Pictures of train, as they are stored"
    assert set(pictures.labels) == set(map(str, range(10)))
    assert len(table.rows) == len(table.pngs) == browse.MOST_DRAWN
    place = table.columns.index("suspect")
    first = [row[1] for row in sorted(table.rows, key=lambda r: r[place] or 10**9)[:50]]
    assert np.mean([row % 9 == 0 for row in first]) > 0.8


def test_cells_that_a_reader_can_read():
    data = datasets.Dataset.from_dict({
        "text": ["a" * 500, None, "<script>"], "ids": [list(range(30)), [], None],
        "label": [1, 0, None],
    }, features=datasets.Features({
        "text": datasets.Value("string"), "ids": datasets.List(datasets.Value("int64")),
        "label": datasets.ClassLabel(names=["no", "yes"]),
    }))  # fmt: skip
    report = inspect_dataset(data)
    table = exhibit(report, browse.TITLE)
    cells = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [c["label"] for c in sorted(cells, key=lambda c: c["row"])] == ["yes", "no", None]
    long = next(c for c in cells if c["row"] == 0)
    assert long["text"] == "a" * browse.LONGEST + " ..."
    assert (long["text: characters"], long["ids: elements"]) == (500, 30)
    assert long["ids"] == "[0, 1, 2, 3, 4, 5, 6, 7, '...']"


def test_columns_that_go_together_and_groups_that_differ():
    report = inspect_dataset(people(), label="label")
    matrix = exhibit(report, "Which columns go together")
    at = {name: i for i, name in enumerate(matrix.row_names)}
    assert set(at) == {"label", "site", "height", "inches", "coin"}
    assert matrix.values[at["height"]][at["inches"]] == pytest.approx(1)
    assert matrix.values[at["label"]][at["height"]] > 0.5
    assert abs(matrix.values[at["coin"]][at["site"]]) < 0.08
    groups = exhibit(report, "label by group")
    assert groups.private
    assert groups.rows[0][:2] != ("coin", "0")
    assert {row[0] for row in groups.rows} == {"site", "coin"}


def test_association_on_literal_numbers():
    same = np.array([0, 0, 1, 1] * 25)
    assert cramers_v(same, same) == pytest.approx(1, abs=0.01)
    assert cramers_v(same, np.array([0, 1, 0, 1] * 25)) == 0
    assert epsilon(same, same.astype(float)) == 1
    assert epsilon(same, np.array([0.0, 1, 0, 1] * 25)) == 0
    import pyarrow as pa

    (rising,) = laid("x", pa.array([0.1 * i for i in range(50)])).values()
    (falling,) = laid("y", pa.array([-(float(i) ** 3) for i in range(50)])).values()
    assert associated(rising, falling) == pytest.approx(-1)
    assert laid("z", pa.array([1.0] * 50)) == {}
