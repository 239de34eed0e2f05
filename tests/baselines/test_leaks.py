"""Leaks along a sequence, judged on literal numbers."""

import math

import pytest
import torch

from hf_recipe.baselines.leaks import (
    OrderDependence,
    PaddingDependence,
    padding_reaches_outputs,
    sees_the_future,
)
from hf_recipe.baselines.packing import PackingDependence, documents_see_each_other
from hf_recipe.instruments.padding import pad_positions
from hf_recipe.instruments.subject import Subject


@pytest.mark.parametrize(
    ("own", "later", "speaks"),
    [(0.3, 0.0, 0), (0.3, 1e-7, 0), (0.0, 0.0, 0), (0.3, 0.01, 1), (0.3, math.nan, 1)],
)
def test_the_future(own, later, speaks):
    assert len(list(sees_the_future(OrderDependence(16, own, later, (5, 10))))) == speaks


def padding(size, mask="right", takes_mask=True, library=True):
    return PaddingDependence(20, 12, 0.5, size, mask, takes_mask, library)


@pytest.mark.parametrize(
    ("measured", "severity"),
    [
        (padding(0.0), None),
        (padding(1e-7, "absent"), None),
        (padding(0.1, "absent"), "error"),
        (padding(0.1, "all ones"), "error"),
        (padding(0.1, "inverted"), "error"),
        (padding(0.1, "differs"), "error"),
        (padding(0.1, "right", library=False), "error"),
        (padding(0.1, "right"), "note"),
        (padding(0.1, "absent", takes_mask=False), "note"),
        (padding(math.nan, "absent"), "error"),
    ],
)
def test_padding(measured, severity):
    assert [f.severity for f in padding_reaches_outputs(measured)] == [severity] * bool(severity)


def test_packing():
    assert list(documents_see_each_other(PackingDependence(3, 0.4, 0.0, False, False))) == []
    (fault,) = documents_see_each_other(PackingDependence(3, 0.4, 0.2, True, False))
    assert "attention_mask" in fault.fix
    (fault,) = documents_see_each_other(PackingDependence(3, 0.4, 0.2, False, True))
    assert "use_cache=False" in fault.fix


class Tokenizer:
    pad_token_id, eos_token_id = 0, 1


class Closing:
    pad_token_id = eos_token_id = 1


def pads(ids, mask=None, tokenizer=None):
    subject = Subject(torch.nn.Identity(), None, None, {}, processing_class=tokenizer)
    mask = None if mask is None else torch.tensor(mask)
    found = pad_positions(subject, {"input_ids": torch.tensor(ids)}, mask)
    return None if found is None else found.long().tolist()


def test_padding_is_told_by_the_tokenizer_s_token():
    assert pads([[5, 6, 0, 7], [8, 9, 0, 0]], tokenizer=Tokenizer) == [[0, 0, 0, 0], [0, 0, 1, 1]]
    assert pads([[0, 0, 5, 6]], tokenizer=Tokenizer) == [[1, 1, 0, 0]]


def test_one_closing_token_is_no_padding():
    assert pads([[5, 6, 7, 1], [8, 1, 1, 1]], tokenizer=Closing) == [[0, 0, 0, 0], [0, 1, 1, 1]]


def test_an_inverted_mask_is_seen_through():
    ids = [[5, 6, 7, 0], [8, 9, 0, 0]]
    assert pads(ids, [[1, 1, 1, 0], [1, 1, 0, 0]]) == [[0, 0, 0, 1], [0, 0, 1, 1]]
    assert pads(ids, [[0, 0, 0, 1], [0, 0, 1, 1]]) == [[0, 0, 0, 1], [0, 0, 1, 1]]
    assert pads(ids) is None
