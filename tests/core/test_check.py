import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_recipe.core.check import (
    Check,
    Measurement,
    judged,
    plain,
    private,
    private_paths,
    typed,
    unplain,
    without,
)
from hf_recipe.core.finding import Fault


@dataclass(frozen=True)
class Row:
    loss: float
    text: str = private(default="")
    where: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sample(Measurement):
    name: str
    share: float
    number: int
    flag: bool
    maybe: float | None
    losses: tuple[float, ...]
    pair: tuple[int, str]
    by_name: dict[str, float]
    rows: tuple[Row, ...]
    best: Row | None = None
    table: dict[str, Row] = field(default_factory=dict)
    either: Row | str = ""
    values_seen: tuple[str, ...] = private(default=())


floats = st.floats(allow_nan=True, allow_infinity=True)
texts = st.text(max_size=8)
rows = st.builds(Row, floats, texts, st.lists(st.integers(), max_size=3).map(tuple))
samples = st.builds(
    Sample,
    texts,
    floats,
    st.integers(),
    st.booleans(),
    st.none() | floats,
    st.lists(floats, max_size=4).map(tuple),
    st.tuples(st.integers(), texts),
    st.dictionaries(texts, floats, max_size=3),
    st.lists(rows, max_size=3).map(tuple),
    st.none() | rows,
    st.dictionaries(texts, rows, max_size=2),
    rows | texts,
    st.lists(texts, max_size=2).map(tuple),
)


@given(samples)
def test_a_measurement_comes_back_from_json(sample):
    text = json.dumps(sample.values(), allow_nan=False)
    again = Sample.from_values(json.loads(text))
    assert repr(again) == repr(sample)  # repr: nan differs from itself
    assert again.values() == sample.values()


def test_fields_added_since_take_their_defaults_and_fields_gone_are_passed_over():
    values = {"loss": 1, "gone": 3}
    assert typed(Row, values) == Row(1.0)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | floats | texts,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
        max_leaves=12,
    )
)
def test_plain_and_back(value):
    text = json.dumps(plain(value), allow_nan=False)
    assert repr(unplain(json.loads(text))) == repr(value)


def test_plain_takes_what_slips_in():
    assert plain(np.float32(0.5)) == 0.5
    assert type(plain(np.float64(0.5))) is float
    assert plain(np.array([1.0, math.nan])) == [1.0, {"$float": "nan"}]
    assert plain(torch.tensor(3)) == 3
    assert plain({"a": {1, 2}, 3: (math.inf,)}) == {"a": [1, 2], "3": [{"$float": "inf"}]}
    assert plain(Mapping) == str(Mapping)


def test_private_fields_are_found_at_any_depth_and_taken_out():
    assert set(private_paths(Sample)) == {
        "values_seen", "rows.text", "best.text", "table.*.text", "either.text",
    }  # fmt: skip
    sample = Sample(
        "n", 0.1, 1, True, None, (), (1, "a"), {}, (Row(1.0, "canary"),),
        Row(2.0, "canary"), {"x": Row(3.0, "canary")}, Row(4.0, "canary"), ("canary",),
    )  # fmt: skip
    values = sample.values()
    for path in private_paths(Sample):
        values = without(values, path)
    assert "canary" not in json.dumps(values)
    assert values["rows"] == [{"loss": 1.0, "where": []}]
    assert values["table"]["x"]["loss"] == 3.0
    assert "canary" in json.dumps(sample.values())  # the measurement itself is as it was


@dataclass(frozen=True)
class Loss(Measurement):
    value: float


def too_high(loss: Loss, *, most: Annotated[float, "judgement"] = 2.0):
    if not loss.value <= most:
        yield Fault(f"loss {loss.value}")


CHECK = Check("too-high", "data", "warning", ("run",), "Why.", "fix()", "2024", (too_high,))


def test_a_check_knows_its_kind_and_its_thresholds():
    assert judged(too_high) is Loss
    assert CHECK.thresholds["most"].default == 2.0
    assert CHECK.thresholds["most"].provenance == "judgement"


@pytest.mark.parametrize(("value", "faults"), [(1.0, 0), (3.0, 1), (math.nan, 1)])
def test_judging_literal_numbers(value, faults):
    assert len(list(CHECK.judge(Loss(value)))) == faults


def test_thresholds_are_handed_over_and_strange_ones_passed_by():
    assert not list(CHECK.judge(Loss(3.0), {"most": 4.0, "other": 1}))
    assert not list(CHECK.judge(Sample.from_values(dict.fromkeys(Sample.__annotations__))))


def test_a_judge_without_a_measurement_is_refused():
    def odd(value: float):
        yield Fault("x")

    with pytest.raises(TypeError, match="annotated with a Measurement"):
        judged(odd)
