import warnings

import datasets
import numpy as np
import pytest

from hf_recipe.data.outliers import ColumnTail, Tails, beyond_a_void, outlier_example
from hf_recipe.inspection import inspect_dataset


def tails(**tail):
    base = {"column": "x", "of": "value", "rows": 1000, "median": 0.0}
    return Tails((ColumnTail(**{**base, **tail}),), 1000)


def test_judge_on_literal_numbers():
    assert not list(outlier_example(tails(distances=(7.9, 4.0), numbers=(8.0, 4.0), places=(1, 2))))
    (fault,) = outlier_example(tails(distances=(40.0, 4.0), numbers=(99.0, 4.0), places=(7, 2)))
    assert fault.examples == (7,)
    assert "99" not in fault.message
    assert fault.quotes == ("99",)
    many = tuple(30.0 for _ in range(50))
    assert not list(outlier_example(tails(distances=many, numbers=many, places=tuple(range(50)))))


def found(data, **columns):
    report = inspect_dataset(datasets.Dataset.from_dict(data), **columns)
    assert not report.crashed, report.crashed
    assert "outlier-example" in report.ran
    return {f.subject: f for f in report.flat if f.check == "outlier-example"}


def test_planted_rows_are_found():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=2000), rng.lognormal(3, 1, 2000)
    x[[5, 900]] = 40.0, -60.0
    words = [" ".join(["word"] * k) for k in rng.integers(5, 15, 2000)]
    words[77] = "word " * 3000
    seen = found({"x": x, "y": y, "text": words})
    assert set(seen) == {"x", "text"}
    assert set(seen["x"].examples) == {5, 900}
    assert seen["text"].examples == (77,)


@pytest.mark.parametrize("seed", range(5))
def test_long_tails_are_the_columns_nature(seed):
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(3, 0.8, 3000).astype(int), 1, 3000)
    assert not found(
        {
            "normal": rng.normal(size=3000),
            "lognormal": rng.lognormal(0, 1.5, 3000),
            "exponential": rng.exponential(size=3000),
            "uniform": rng.random(3000),
            "poisson": rng.poisson(3, 3000).astype(float),
            "zeros": np.where(rng.random(3000) < 0.8, 0.0, rng.random(3000)),
            "modes": np.where(rng.random(3000) < 0.1, 1000.0, 0.0) + rng.normal(size=3000),
            "text": ["w " * k for k in lengths],
        }
    )


def test_a_black_picture_is_shown():
    from PIL import Image

    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(90, 160, (12, 12), dtype=np.uint8)) for _ in range(150)]
    images[31] = Image.fromarray(np.zeros((12, 12), dtype=np.uint8))
    data = datasets.Dataset.from_dict(
        {"image": images, "label": [0, 1] * 75},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    report = inspect_dataset(data)
    (finding,) = [f for f in report.flat if f.check == "outlier-example"]
    assert finding.examples == (31,)
    assert "brightness" in finding.message


@pytest.mark.parametrize(
    ("distances", "apart"),
    [((), 0), ((24.1,), 1), ((23.9,), 0), ((900.0, 80.0, 4.0), 2), ((30.0, 20.0, 10.0, 4.0), 0)],
)
def test_a_void(distances, apart):
    assert beyond_a_void(distances) == apart


def test_a_number_in_another_unit_is_found_inside_a_vector():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 30)) * rng.lognormal(0, 2, 30)
    x[[5, 900, 1999], 3] *= 10_000
    x[77, 20] = -1e6
    x[:, 8] = np.nan  # says nothing, and nothing is said of it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen = found({"x": x.tolist(), "one": rng.normal(size=2000)})
    assert set(seen) == {"x[3]", "x[20]"}
    assert set(seen["x[3]"].examples) == {5, 900, 1999}
    assert seen["x[20]"].examples == (77,)


@pytest.mark.parametrize("seed", range(5))
def test_places_of_vectors_have_long_tails_too(seed):
    rng = np.random.default_rng(seed)
    shape = (3000, 40)
    assert not found(
        {
            "lognormal": rng.lognormal(0, 2, shape).tolist(),
            "rare": np.where(rng.random(shape) < 0.985, 0, rng.exponential(1, shape)).tolist(),
            "marks": (np.where(rng.random(shape) < 0.002, 1.0, 0.0) + 0.5).tolist(),
            "walk": np.cumsum(rng.normal(size=shape), axis=1).tolist(),
            "counts": rng.poisson(0.02, shape).tolist(),
            "ragged": [rng.normal(size=n).tolist() for n in rng.integers(20, 30, 3000)],
        }
    )
