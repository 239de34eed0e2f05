import math
import re
import xml.dom.minidom

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_recipe.core.exhibit import Curve, Ladder, Line, Mark, Matrix, Rung
from hf_recipe.report.figures import figure
from hf_recipe.report.plots import HEIGHT, WIDTH, Scale, draw_curve, draw_matrix, thinned


def curve(*lines, marks=(), **options):
    return Curve("t", "data", "step", "loss", lines, marks, **options)


@pytest.mark.parametrize(
    ("scale", "ticks"),
    [
        (Scale(0, 1, 0, 100, False), [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (Scale(-3, 7, 0, 100, False), [-2, 0, 2, 4, 6]),
        (Scale(1, 100, 0, 100, True), [1, 2, 5, 10, 20, 50, 100]),
        (Scale(1e-6, 1, 0, 100, True), [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1]),
    ],
)
def test_ticks_are_round(scale, ticks):
    assert scale.ticks() == pytest.approx(ticks)


def test_a_log_axis_puts_the_geometric_mean_in_the_middle():
    assert Scale(1, 100, 0, 50, True)(10) == pytest.approx(25)


def test_a_threshold_is_drawn_where_it_lies():
    svg = draw_curve(curve(Line("a", (0.0, 1.0), (0.0, 10.0)), marks=(Mark("limit", 5.0),)))
    (mark,) = re.findall(r'class="mark" d="M58 ([\d.]+)H', svg)
    points = re.search(r'class="line c0" points="[\d.]+,([\d.]+) [\d.]+,([\d.]+)"', svg)
    assert float(mark) == pytest.approx((float(points[1]) + float(points[2])) / 2, abs=0.2)
    assert "limit (5)" in svg


def test_a_threshold_far_away_does_not_squash_the_curve():
    svg = draw_curve(curve(Line("a", (0.0, 1.0), (1.0, 2.0)), marks=(Mark("limit", 1e9),)))
    assert 'class="mark"' not in svg
    assert "off the chart" in svg


def test_values_that_are_not_finite_are_marked_and_break_the_line():
    svg = draw_curve(curve(Line("a", (1.0, 2.0, 3.0, 4.0, 5.0), (1.0, 2.0, math.nan, 2.0, 1.0))))
    assert svg.count("<polyline") == 2
    assert "a: not finite at 3" in svg


def test_thinning_keeps_every_spike():
    points = [(float(i), 50.0 if i == 7777 else math.sin(i)) for i in range(10_000)]
    kept = thinned(points, 400)
    assert len(kept) <= 400
    assert (7777.0, 50.0) in kept
    assert kept == sorted(kept)


numbers = st.floats(allow_nan=True, allow_infinity=True)
lines = st.builds(
    lambda name, points, low, high: Line(
        name, tuple(p[0] for p in points), tuple(p[1] for p in points), tuple(low), tuple(high)
    ),
    st.text(max_size=5),
    st.lists(st.tuples(numbers, numbers), max_size=6),
    st.lists(numbers, max_size=6),
    st.lists(numbers, max_size=6),
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(lines, max_size=3),
    st.lists(st.builds(Mark, st.text(max_size=4), numbers, st.sampled_from("xy")), max_size=2),
    st.booleans(),
    st.booleans(),
)
def test_any_numbers_give_sound_markup_within_the_picture(drawn, marks, log_x, log_y):
    markup = draw_curve(curve(*drawn, marks=tuple(marks), log_x=log_x, log_y=log_y))
    xml.dom.minidom.parseString(f"<div>{markup}</div>")
    for points in re.findall(r'points="([^"]*)"', markup):
        for point in points.split():
            x, y = map(float, point.split(","))
            assert -1 <= x <= WIDTH + 1
            assert -1 <= y <= HEIGHT + 1


def test_a_matrix_shows_its_numbers_and_cuts_what_is_too_large():
    small = draw_matrix(Matrix("m", "data", ("a", "b"), ("c",), ((1.0,), (-0.5,))))
    assert "b, c: -0.5" in small
    assert 'class="cell negative"' in small
    names = tuple(map(str, range(100)))
    large = draw_matrix(Matrix("m", "data", names, names, ((math.nan,) * 100,) * 100))
    assert "The first 40 rows and 40 columns." in large
    assert large.count("<rect") == 1600


def test_a_ladder_shows_every_rung_with_its_interval():
    rungs = (Rung("start", 1.0), Rung("up", 0.9, 0.1, 0.05, 0.15, kept=True),
             Rung("odd", math.nan, math.nan, math.nan, math.inf, cost=math.inf))  # fmt: skip
    shown = figure(Ladder("l", "complexify", rungs))
    assert "+0.1 [0.05, 0.15]" in shown
    assert 'class="better"' in shown
    assert ">start<" in shown
    assert ">kept<" in shown
