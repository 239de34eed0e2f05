"""A loop and its vectorised form: values, gradients, shapes, and what hides behind equal sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import hf_recipe

X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])


def pooled_by_loop(x, mask):
    rows = [torch.stack([x[i, t] for t in range(x.shape[1]) if mask[i, t]]).mean(0)
            for i in range(len(x))]  # fmt: skip
    return torch.stack(rows)


def pooled(x, mask):
    weight = mask[..., None].to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1)


def test_the_same_function_twice_is_equivalent():
    hf_recipe.assert_equivalent(pooled_by_loop, pooled, (X, MASK))
    hf_recipe.assert_equivalent(pooled_by_loop, pooled, {"x": X, "mask": MASK})
    hf_recipe.assert_equivalent(pooled_by_loop, pooled, [(X, MASK), (X[:2], MASK[:2])])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, mask: x.mean(1), "numbers differ"),
        (lambda x, mask: pooled(x, mask).T, "shape"),
        (lambda x, mask: pooled(x, mask).detach(), "gradient of input 0"),
        (lambda x, mask: pooled(x.detach(), mask) + 0 * x.sum(), "gradient of input 0"),
        (lambda x, mask: (pooled(x, mask), x), "returns"),
        (lambda x, mask: pooled(x, mask) * float("nan"), "nan vectorised"),
    ],
)
def test_what_differs_is_said(wrong, message):
    with pytest.raises(AssertionError, match=message):
        hf_recipe.assert_equivalent(pooled_by_loop, wrong, (X, MASK))


def test_a_view_in_the_place_of_a_transpose():
    def loop(x):
        return torch.stack([x[:, t] for t in range(x.shape[1])])

    hf_recipe.assert_equivalent(loop, lambda x: x.transpose(0, 1), (X,))
    with pytest.raises(AssertionError):
        hf_recipe.assert_equivalent(loop, lambda x: x.reshape(5, 3, 4), (X,))


def test_equal_sizes_are_refused_unless_meant():
    square = torch.randn(4, 4)
    with pytest.raises(ValueError, match=r"\(4, 4\)"):
        hf_recipe.assert_equivalent(torch.trace, lambda x: x.diagonal().sum(), (square,))
    hf_recipe.assert_equivalent(
        torch.trace, lambda x: x.diagonal().sum(), (square,), equal_sizes=True
    )
    with pytest.raises(ValueError, match="empty"):
        hf_recipe.assert_equivalent(torch.trace, torch.trace, [])


def test_noise_is_drawn_alike_and_inputs_stay_as_they_are():
    state, kept = torch.get_rng_state(), X.clone()

    def in_place(x):
        x.mul_(2)
        return F.dropout(x, 0.5)

    hf_recipe.assert_equivalent(lambda x: F.dropout(2 * x, 0.5), in_place, X)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(X, kept)


def test_numbers_integers_and_nested_outputs():
    hf_recipe.assert_equivalent(
        lambda x: {"sum": float(x.sum()), "best": [x.argmax()]},
        lambda x: {"sum": float(x.double().sum()), "best": [x.reshape(-1).max(0)[1]]},
        (X,),
    )
    with pytest.raises(AssertionError, match="best"):
        hf_recipe.assert_equivalent(
            lambda x: {"best": x.argmax()}, lambda x: {"best": x.argmin()}, (X,)
        )
