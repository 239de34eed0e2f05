import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_recipe.core.exhibit import Curve, Table
from hf_recipe.data import sketches, summaries
from hf_recipe.data.columns import summarise
from hf_recipe.data.source import read_source
from hf_recipe.data.summaries import Summary, word_starts
from hf_recipe.inspection import inspect_dataset
from hf_recipe.instruments.batches import Rows


def summary(values, start=0, kind=None):
    found = Summary()
    found.add(pa.array(values, type=kind), np.arange(start, start + len(values)))
    return found


def state(found):
    """Everything that must not depend on the grouping; moments are compared apart."""
    exact = {k: v for k, v in vars(found).items() if isinstance(v, (int, float, str, list, bool))}
    for name in ("sample", "highest", "lowest"):
        kept = getattr(found, name)
        exact[name] = (kept.keys.tolist(), kept.numbers.tolist(), kept.rows.tolist())
    kept = found.distinct
    exact["distinct"] = (kept.hashes.tolist(), kept.counts.tolist(), kept.rows.tolist())
    return exact


def moments(found):
    """Third moments in the unit of the second: they are differences of far larger numbers."""
    return [
        v
        for m in (found.moments, found.lengths)
        for v in (m.count, m.mean, m.deviation, m.cubes / max(m.deviation, 1.0) ** 1.5)
    ]


FLOATS = st.lists(
    st.one_of(
        st.none(),
        st.floats(-1e6, 1e6).map(lambda v: round(v, 3)),
        st.just(float("nan")),
        st.integers(0, 3).map(float),
    ),
    max_size=40,
)
TEXTS = st.lists(st.one_of(st.none(), st.text(max_size=12)), max_size=40)


@pytest.mark.parametrize("limits", [(8192, 4096, 256), (4, 3, 2)])
@settings(max_examples=25, deadline=None)
@given(rows=st.one_of(FLOATS, TEXTS), cuts=st.tuples(st.integers(0, 40), st.integers(0, 40)))
def test_merging_is_associative_and_the_same_as_one_pass(limits, rows, cuts):
    kind = pa.string() if any(isinstance(v, str) for v in rows) else pa.float64()
    with pytest.MonkeyPatch.context() as patch:
        places = ((summaries, "ROWS"), (sketches, "VALUES"), (summaries, "EXTREMES"))
        for (module, name), value in zip(places, limits, strict=True):
            patch.setattr(module, name, value)
        one, two = sorted(min(cut, len(rows)) for cut in cuts)
        a = summary(rows[:one], 0, kind)
        b = summary(rows[one:two], one, kind)
        c = summary(rows[two:], two, kind)
        before = state(a)
        left, right = a.merge(b).merge(c), a.merge(b.merge(c))
        turned = c.merge(a).merge(b)
        whole = summary(rows, 0, kind)
    assert state(a) == before
    assert state(left) == state(right) == state(turned)
    assert state(left) == {**state(whole), "kind": left.kind}
    for other in (right, turned, whole):
        assert moments(left) == pytest.approx(moments(other), rel=1e-9, abs=1e-3, nan_ok=True)


def test_a_summary_agrees_with_numpy_and_arrow():
    rng = np.random.default_rng(0)
    x = np.round(rng.lognormal(3, 1, 30_000), 2)
    texts = [" ".join(["wörd"] * k) for k in rng.integers(0, 9, 30_000)]
    data = datasets.Dataset.from_dict({"x": x, "t": texts, "k": rng.integers(0, 7, 30_000)})
    source = read_source(Rows(data, data, None, "train"))
    found = summarise(source)
    one, two, three = found["x"], found["t"], found["k"]
    assert one.moments.mean == pytest.approx(x.mean())
    assert one.moments.deviation == pytest.approx(x.std())
    centred = (x - x.mean()) / x.std()
    assert one.moments.skewness == pytest.approx((centred**3).mean())
    assert one.distinct.estimate == pytest.approx(len(np.unique(x)), rel=0.05)
    for share, value in zip((0.25, 0.5, 0.9), one.quantiles(0.25, 0.5, 0.9), strict=True):
        assert abs((x <= value).mean() - share) < 0.025  # four standard errors of 8,192 rows
    top = np.sort(x)[::-1][: summaries.EXTREMES]
    assert one.highest.numbers.tolist() == top.tolist()
    assert (two.words, two.blank) == (sum(len(t.split()) for t in texts), texts.count(""))
    assert two.longest == pc.max(pc.utf8_length(pa.array(texts))).as_py()
    assert three.distinct.is_exact
    (row, times), *_ = three.commonest(1)
    counts = np.bincount(data["k"])
    assert times == counts.max()
    assert data["k"][row] == counts.argmax()
    shares, edges = three.histogram(7, (-0.5, 6.5))
    assert len(edges) == 8
    assert shares == pytest.approx(counts / 30_000, abs=0.03)


def test_words_and_blanks():
    texts = ["a b", "", "  ", "\u3000\u3000", "x", " \u00a0", "ab  c\td"]
    for kind in (pa.string(), pa.large_string()):
        array = pa.array(["zz", *texts, "yy"], type=kind).slice(1, len(texts))
        words, _ = word_starts(array)
        assert words == 2 + 1 + 1 + 1 + 3  # wide spaces are words here; blank rows are told apart
        found = summary(texts, kind=kind)
        assert found.blanks == [1, 2, 3, 5]


def test_the_report_shows_columns_by_split_and_class():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 400)
    data = {"size": rng.normal(size=400) + 3 * label, "colour": ["red", "blue"] * 200,
            "label": label}  # fmt: skip
    train = datasets.Dataset.from_dict(data)
    report = inspect_dataset({"train": train, "validation": train.select(range(0, 400, 3))})
    assert not report.crashed
    curves = {e.title: e for e in report.exhibits if isinstance(e, Curve)}
    drawn = curves["Distribution of size"]
    assert [line.name for line in drawn.lines] == ["train", "validation"]
    assert sum(drawn.lines[0].y) == pytest.approx(1)
    tables = {e.title: e for e in report.exhibits if isinstance(e, Table)}
    by_class = tables["Columns of train by class"]
    assert by_class.columns[:4] == ("class", "rows", "size: mean", "deviation")
    assert by_class.private
    assert by_class.rows[1][2] - by_class.rows[0][2] == pytest.approx(3, abs=0.4)
    common = tables["Commonest values of train"]
    assert ("colour", "red", 200, 0.5) in common.rows
    assert common.private
