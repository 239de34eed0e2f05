import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_recipe.core.exhibit import Series


@given(st.integers(2, 33), st.integers(0, 700))
def test_a_series_stays_within_its_limit_and_is_evenly_spaced(limit, points):
    series = Series(limit)
    for i in range(points):
        series.add(i, -i)
    assert len(series.x) <= limit
    assert series.x == [i for i in range(points) if i % series.stride == 0]
    assert series.y == [-x for x in series.x]
    if points >= limit:
        assert len(series.x) >= limit // 2


@given(st.integers(2, 33), st.lists(st.integers(0, 40), max_size=12))
def test_points_that_come_together_are_kept_as_if_they_came_one_by_one(limit, sizes):
    one, many, place = Series(limit), Series(limit), 0
    for size in sizes:
        points = range(place, place + size)
        place += size
        many.extend(points, [i / 2 for i in points])
        for i in points:
            one.add(i, i / 2)
    assert many.state() == one.state()


def test_a_series_goes_on_after_a_resume_as_if_it_had_never_stopped():
    whole, first = Series(8), Series(8)
    for i in range(100):
        whole.add(i, math.nan if i % 8 == 0 else i)
    for i in range(37):
        first.add(i, math.nan if i % 8 == 0 else i)
    state = json.loads(json.dumps(first.state(), allow_nan=False))
    second = Series.from_state(state, 8)
    for i in range(37, 100):
        second.add(i, math.nan if i % 8 == 0 else i)
    assert second.state() == whole.state()
    assert repr(second.line("loss")) == repr(whole.line("loss"))
    assert state == first.state()


def test_later_points_do_not_change_a_state_that_was_handed_out():
    series = Series()
    series.add(0, 1)
    state = series.state()
    series.add(1, 2)
    assert state["x"] == [0]


def test_a_series_without_room_is_refused():
    with pytest.raises(ValueError, match="limit=1"):
        Series(1)
