import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_recipe.tune.distillation_loss import (
    KINDS,
    Head,
    Objective,
    bernoulli_divergence,
    chunked_divergence,
    chunked_loss,
    divergence,
    mixture_logits,
    standardized,
)

kinds = pytest.mark.parametrize("kind", KINDS)


def exact(z, t, kind, temperature=1.0):
    """Rows of the divergence by autograd in float64, from the definitions."""
    q, p = (z / temperature).softmax(-1), (t / temperature).softmax(-1)

    def kl(a, b):
        return torch.where(a > 0, a * (a.log() - b.log()), 0.0).sum(-1)

    if kind == "forward_kl":
        rows = kl(p, q)
    elif kind == "reverse_kl":
        rows = kl(q, p)
    elif kind == "jsd":
        rows = 0.5 * kl(p, 0.5 * p + 0.5 * q) + 0.5 * kl(q, 0.5 * p + 0.5 * q)
    else:
        rows = kl(p, 0.1 * p + 0.9 * q)
    return rows * temperature**2


def problem(rows=11, width=5, teacher_width=7, vocabulary=23, dtype=torch.float32, masked=4):
    draw = torch.Generator().manual_seed(1)
    tensors = [
        torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)
        for shape in (
            (rows, width),
            (vocabulary, width),
            (rows, teacher_width),
            (vocabulary, teacher_width),
            (vocabulary,),
            (vocabulary,),
        )
    ]
    labels = torch.randint(0, vocabulary, (rows,), generator=draw)
    labels[torch.randperm(rows, generator=draw)[:masked]] = -100
    return tensors, labels


@kinds
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (2.0, 4.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunked_equals_the_definition_in_float64(kind, temperature, scale, softcap, dtype):
    (hs, ws, ht, wt, bs, bt), labels = problem(dtype=dtype)
    for tensor in (hs, ws, bs):
        tensor.requires_grad_()
    options = dict(kind=kind, temperature=temperature, logit_scale=scale, softcap=softcap)
    loss = chunked_divergence(
        hs, ws, ht, wt, labels, student_bias=bs, teacher_bias=bt, chunk_rows=3, **options
    )
    (3 * loss).backward()

    wide = [x.detach().double() for x in (hs, ws, bs, ht, wt, bt)]
    for tensor in wide[:3]:
        tensor.requires_grad_()

    def logits(hidden, weight, bias):
        raw = scale * (hidden @ weight.T + bias)
        return raw if softcap is None else softcap * torch.tanh(raw / softcap)

    z, t = logits(*wide[:3]), logits(*wide[3:])
    kept = labels != -100
    expected = exact(z, t, kind, temperature)[kept].mean()
    (3 * expected).backward()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for narrow, reference in zip((hs, ws, bs), wide[:3], strict=True):
        largest = reference.grad.abs().max()
        assert (narrow.grad - reference.grad).abs().max() <= tolerance * largest
    assert hs.grad[~kept].abs().max() == 0


@kinds
def test_dense_equals_chunked_and_respects_the_mask(kind):
    (hs, ws, ht, wt, _, _), labels = problem(dtype=torch.float64)
    z = (hs @ ws.T).requires_grad_()
    dense = divergence(z, ht @ wt.T, labels != -100, kind=kind, temperature=2.0)
    dense.backward()
    chunked = chunked_divergence(hs, ws, ht, wt, labels, kind=kind, temperature=2.0)
    assert dense.item() == pytest.approx(chunked.item(), rel=1e-12)
    assert z.grad[labels == -100].abs().max() == 0
    junk = z.detach().clone()
    junk[labels == -100] = 1e4
    assert divergence(junk, ht @ wt.T, labels != -100, kind=kind, temperature=2.0) == dense


def test_forward_kl_is_torchs():
    z, t = torch.randn(6, 9), torch.randn(6, 9)
    expected = F.kl_div(z.log_softmax(-1), t.softmax(-1), reduction="batchmean")
    assert divergence(z, t).item() == pytest.approx(expected.item(), rel=1e-5)


@kinds
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    spread=st.floats(0.01, 30),
    temperature=st.floats(0.3, 20),
    shift=st.floats(-50, 50),
)
def test_never_negative_zero_at_the_teacher_and_blind_to_shifts(
    kind, seed, spread, temperature, shift
):
    draw = torch.Generator().manual_seed(seed)
    z = spread * torch.randn(4, 6, generator=draw, dtype=torch.float64)
    t = spread * torch.randn(4, 6, generator=draw, dtype=torch.float64)
    options = dict(kind=kind, temperature=temperature)
    value = divergence(z, t, **options).item()
    assert value >= -1e-12
    same = t.clone().requires_grad_()
    nothing = divergence(same, t, **options)
    nothing.backward()
    assert abs(nothing.item()) < 1e-9
    assert same.grad.abs().max() < 1e-9
    assert divergence(z + shift, t - shift, **options).item() == pytest.approx(
        value, rel=1e-6, abs=1e-9
    )


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@kinds
def test_small_divergences_keep_their_digits_in_float32(kind, temperature, share):
    """Fresh heads over a large vocabulary are nearly uniform: what differs is a thousandth."""
    torch.manual_seed(0)
    student, teacher = 0.16 * torch.randn(2, 4, 20_000)
    options = {"kind": kind, "temperature": temperature, "beta": share, "skew": share / 2}
    values, gradients = [], []
    for dtype in (torch.float32, torch.float64):
        logits = student.to(dtype).clone().requires_grad_()
        value = divergence(logits, teacher.to(dtype), **options)
        value.backward()
        values.append(value.item())
        gradients.append(logits.grad.double())
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


@kinds
def test_the_gradient_does_not_vanish_with_temperature(kind):
    norms = []
    for temperature in (1.0, 8.0):
        z = (0.1 * torch.randn(32, 10, generator=torch.Generator().manual_seed(0))).requires_grad_()
        t = 0.1 * torch.randn(32, 10, generator=torch.Generator().manual_seed(1))
        divergence(z, t, kind=kind, temperature=temperature).backward()
        norms.append(z.grad.norm().item())
    assert 0.5 < norms[1] / norms[0] < 2


@kinds
def test_an_empty_mask_gives_zero_with_a_live_graph(kind):
    (hs, ws, ht, wt, _, _), labels = problem()
    hs.requires_grad_(), ws.requires_grad_()
    loss = chunked_divergence(hs, ws, ht, wt, torch.full_like(labels, -100), kind=kind)
    loss.backward()
    assert loss.item() == 0
    assert hs.grad.abs().max() == 0
    assert ws.grad.abs().max() == 0
    z = torch.randn(3, 4, requires_grad=True)
    dense = divergence(z, torch.randn(3, 4), torch.zeros(3, dtype=torch.bool), kind=kind)
    dense.backward()
    assert dense.item() == 0
    assert z.grad.abs().max() == 0


def test_sum_over_items_splits_over_micro_batches():
    (hs, ws, ht, wt, _, _), labels = problem(dtype=torch.float64)
    whole = chunked_divergence(hs, ws, ht, wt, labels)
    items = (labels != -100).sum()
    parts = [
        chunked_divergence(hs[i : i + 4], ws, ht[i : i + 4], wt, labels[i : i + 4], num_items=items)
        for i in range(0, len(labels), 4)
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-12)


def test_three_axes_are_rows_too_and_nothing_is_computed_without_gradients():
    (hs, ws, ht, wt, _, _), labels = problem(rows=12)
    flat = chunked_divergence(hs, ws, ht, wt, labels)
    deep = chunked_divergence(
        hs.view(3, 4, -1), ws.requires_grad_(), ht.view(3, 4, -1), wt, labels.view(3, 4)
    )
    assert deep.item() == flat.item()
    with torch.no_grad():
        assert not chunked_divergence(hs, ws, ht, wt, labels).requires_grad


def test_a_retained_graph_can_be_walked_twice():
    (hs, ws, ht, wt, _, _), labels = problem()
    ws.requires_grad_()
    loss = chunked_divergence(hs, ws, ht, wt, labels)
    first = torch.autograd.grad(loss, ws, retain_graph=True)[0].clone()
    second = torch.autograd.grad(2 * loss, ws)[0]
    torch.testing.assert_close(second, 2 * first)


def test_bfloat16_is_softened_in_float32():
    (hs, ws, ht, wt, _, _), labels = problem(rows=64, vocabulary=512, width=16, teacher_width=16)
    half = [x.bfloat16() for x in (hs, ws, ht, wt)]
    half[1].requires_grad_()
    loss = chunked_divergence(*half, labels, chunk_rows=5)
    loss.backward()
    logits = [(h @ w.T).float() for h, w in ((half[0], half[1]), (half[2], half[3]))]
    expected = divergence(logits[0], logits[1], labels != -100)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert half[1].grad.dtype == torch.bfloat16


def test_autocast_multiplies_as_the_model_would():
    (hs, ws, ht, wt, _, _), labels = problem(width=16, teacher_width=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked_divergence(hs, ws, ht, wt, labels)
        z, t = hs @ ws.T, ht @ wt.T
    assert loss.item() == pytest.approx(divergence(z, t, labels != -100).item(), rel=1e-5)


def test_vocabularies_that_differ_are_an_error_or_cut():
    (hs, ws, ht, wt, bs, bt), labels = problem()
    labels = labels.clamp(max=15)
    with pytest.raises(ValueError, match="student has 20 classes and the teacher 23"):
        chunked_divergence(hs, ws[:20], ht, wt, labels)
    cut = chunked_divergence(
        hs, ws[:20], ht, wt, labels, student_bias=bs[:20], teacher_bias=bt, vocabulary="cut"
    )
    same = chunked_divergence(
        hs, ws[:20], ht, wt[:20], labels, student_bias=bs[:20], teacher_bias=bt[:20]
    )
    assert cut.item() == same.item()
    wider = ws.clone().requires_grad_()
    chunked_divergence(hs, wider, ht, wt[:20], labels, vocabulary="cut").backward()
    assert wider.grad[20:].abs().max() == 0
    assert divergence(hs @ ws.T, (ht @ wt.T)[:, :20], vocabulary="cut") > 0


@kinds
def test_classes_ruled_out_weigh_nothing(kind):
    z, t = torch.randn(5, 8), torch.randn(5, 8)
    inner = divergence(z, t, kind=kind)
    pad = torch.full((5, 2), -math.inf)
    padded = torch.cat([z, pad], -1).requires_grad_()
    outer = divergence(padded, torch.cat([t, pad], -1), kind=kind)
    outer.backward()
    assert outer.item() == pytest.approx(inner.item(), rel=1e-6)
    assert torch.isfinite(padded.grad).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_hard_term_goes_along_in_the_same_pass(smoothing, temperature):
    (hs, ws, ht, wt, _, _), labels = problem(dtype=torch.float64)
    ws.requires_grad_()
    objective = Objective("jsd", temperature, soft=0.3, hard=0.7, smoothing=smoothing)
    loss, soft, hard = chunked_loss(hs, ws, ht, wt, labels, objective=objective, chunk_rows=2)
    (gradient,) = torch.autograd.grad(loss, ws)
    z = hs @ ws.T
    expected_hard = F.cross_entropy(z, labels, label_smoothing=smoothing)
    kept = labels != -100
    expected_soft = exact(z, ht @ wt.T, "jsd", temperature)[kept].mean()
    expected = 0.3 * expected_soft + 0.7 * expected_hard
    assert soft.item() == pytest.approx(expected_soft.item(), rel=1e-10)
    assert hard.item() == pytest.approx(expected_hard.item(), rel=1e-10)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, ws)[0])


def test_student_and_teacher_may_scale_differently():
    (hs, ws, ht, wt, _, _), labels = problem(dtype=torch.float64)
    loss = chunked_divergence(hs, ws, ht, wt, labels, logit_scale=0.5, teacher_head=Head(2.0, 5.0))
    expected = divergence(0.5 * hs @ ws.T, 5 * torch.tanh(2 * ht @ wt.T / 5), labels != -100)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_teacher_gets_no_gradient():
    (hs, ws, ht, wt, _, bt), labels = problem()
    for tensor in (hs, ws, ht, wt, bt):
        tensor.requires_grad_()
    chunked_divergence(hs, ws, ht, wt, labels, teacher_bias=bt).backward()
    assert ws.grad is not None
    assert ht.grad is None
    assert wt.grad is None
    assert bt.grad is None


def test_several_teachers_are_averaged_in_probability():
    a, b = torch.randn(3, 5), torch.randn(3, 5)
    mean = mixture_logits([a, b], [3.0, 1.0]).softmax(-1)
    torch.testing.assert_close(mean, 0.75 * a.softmax(-1) + 0.25 * b.softmax(-1))
    with pytest.raises(ValueError, match="2 teachers need as many weights"):
        mixture_logits([a, b], [1.0])


def test_bernoulli_is_the_divergence_of_each_output():
    z, t = torch.randn(4, 3), torch.randn(4, 3)
    p, q = t.sigmoid(), z.sigmoid()
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    assert bernoulli_divergence(z, t).item() == pytest.approx(expected.item(), rel=1e-4)
    assert bernoulli_divergence(z, t, num_items=4).item() == pytest.approx(
        expected.item(), rel=1e-4
    )


def test_standardized_logits_forget_scale_and_shift():
    z = torch.randn(4, 7)
    torch.testing.assert_close(standardized(3 * z + 2), standardized(z), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "kl"}, "kind must be one of forward_kl"),
        ({"temperature": 0.0}, "temperature must be positive; got 0.0"),
        ({"temperature": math.nan}, "temperature must be positive"),
        ({"chunk_rows": 0}, "chunk_rows must be at least 1; got 0"),
        ({"kind": "skewed_kl", "skew": 1.0}, "skew must lie between 0 and 1"),
        ({"vocabulary": "pad"}, "vocabulary must be 'error' or 'cut'"),
    ],
)
def test_a_value_that_does_not_fit_is_named(options, words):
    (hs, ws, ht, wt, _, _), labels = problem()
    with pytest.raises(ValueError, match=words):
        chunked_divergence(hs, ws, ht, wt, labels, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"logit_scale": math.nan}, "logit_scale must be finite"),
        ({"student_bias": torch.zeros(3)}, "student_bias must be .9,."),
        ({"teacher_bias": torch.zeros(9, 1)}, "teacher_bias must be .9,."),
    ],
)
def test_heads_that_make_no_sense_are_named(options, words):
    hidden, weight = torch.randn(4, 3), torch.randn(9, 3)
    with pytest.raises(ValueError, match=words):
        chunked_divergence(hidden, weight, hidden, weight, torch.ones(4), **options)


def test_shapes_that_do_not_fit_are_named():
    (hs, ws, ht, wt, _, _), labels = problem()
    with pytest.raises(ValueError, match="must be aligned with student_hidden's rows"):
        chunked_divergence(hs, ws, ht, wt, labels[:-1])
    with pytest.raises(ValueError, match="teacher_weight must be"):
        chunked_divergence(hs, ws, ht, ws, labels)
    with pytest.raises(ValueError, match="must agree in all axes but the last"):
        divergence(hs, ht[:-1])
