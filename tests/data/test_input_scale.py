"""Scales of inputs: what is measured, and the verdict on literal numbers."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, load_wine

from hf_recipe.data.input_scale import InputScales, scale_of, unscaled_input


def faults(values):
    return list(unscaled_input(InputScales((scale_of("x", torch.as_tensor(values)),))))


def test_what_is_measured():
    scale = scale_of("x", torch.tensor([[3.0, 0.0], [4.0, 0.0], [0.0, 12.0], [0.0, 0.0]]))
    assert scale.largest == pytest.approx(6.0)
    assert (scale.largest_feature, scale.large, scale.peak) == (1, 0, 12.0)
    assert scale.whole == pytest.approx(np.sqrt((25 + 144) / 8))
    assert scale.typical == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("low", "high", "count"),
    [(0, 1, 0), (-3, 3, 0), (0, 16, 0), (0, 255, 1), (0, 1 / 255, 1), (1000, 1002, 1)],
)
def test_uniform_inputs(low, high, count):
    values = np.random.default_rng(0).uniform(low, high, (64, 20)).astype("float32")
    assert len(faults(values)) == count


def test_real_data():
    assert not faults(load_digits().data.astype("float32"))  # 0..16: trains as it stands
    (raw,) = faults(load_wine().data.astype("float32"))  # a thousand of one unit beside tenths
    assert "root mean square up to" in raw.message
    assert raw.evidence["features"] >= 1


def test_one_raw_column_among_unit_ones():
    values = np.random.default_rng(0).normal(size=(64, 40)).astype("float32")
    values[:, 7] = values[:, 7] * 15 + 45  # an age
    (fault,) = faults(values)
    assert fault.message.startswith("x: 1 of 40 features")


def test_a_stray_number_is_no_scale():
    values = np.random.default_rng(0).normal(size=(64, 40)).astype("float32")
    for strays, count in ((1, 0), (2, 0), (3, 1)):
        values[:strays, 7] = 30_000.0
        assert len(faults(values)) == count, strays
    scale = scale_of("x", torch.as_tensor(values[1:, 8:]))
    assert scale.largest == pytest.approx(np.sqrt(np.square(values[1:, 8:]).mean(0)).max())


def test_a_feature_that_is_mostly_nothing_has_the_scale_of_the_rest():
    values = np.random.default_rng(0).normal(size=(64, 40)).astype("float32")
    values[:, 7] = 0.0
    values[5, 7] = 30_000.0
    assert len(faults(values)) == 1
