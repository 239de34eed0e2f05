"""Judging functions of the monitors on literal numbers, and their folds on drawn steps."""

import math

import numpy as np
import torch
from torch import nn

from hf_recipe.baselines.loss_falls import LOSS_NOT_DECREASING, LossFall, follow_fall
from hf_recipe.complexify.accumulates import GRADIENT_ACCUMULATES, GradientLeft, gradients_left
from hf_recipe.complexify.clipping import CLIPPING_DOMINATES, Clipping, follow_clipping
from hf_recipe.complexify.dead_units import DEAD_UNIT
from hf_recipe.complexify.feeding import (
    ORDER_REPEATS,
    WAITING_FOR_DATA,
    EpochOrder,
    Waiting,
    follow_order,
    follow_waiting,
)
from hf_recipe.complexify.gradient_depth import (
    EXPLODING_GRADIENT,
    VANISHING_GRADIENT,
    GradientCourse,
)
from hf_recipe.complexify.updates import UPDATE_ROUNDED_AWAY, UPDATE_TOO_LARGE, UPDATE_TOO_SMALL
from hf_recipe.instruments.activations import ActivationUnits, ActivationWatch, LayerUnits
from hf_recipe.instruments.layers import LayerNumbers, LayerSample, LayerSamples, LayerWatch
from hf_recipe.instruments.subject import Plan
from hf_recipe.instruments.window import Step, Window
from tests.complexify.initial import initial_loss


def names(check, measurement, **thresholds):
    return [f.subject or f.severity or check.severity for f in check.judge(measurement, thresholds)]


# ---------------------------------------------------------------- the loss falls


def fell(losses, rate=1e-3, warmup=0, **start):
    steps = [
        Step(i, float(x), rate * min(1.0, i / warmup) if warmup else rate)
        for i, x in enumerate(losses, 1)
    ]
    state, _ = follow_fall({}, Window(tuple(steps)), {})
    seen = {"InitialLoss": initial_loss(**start)} if start else {}
    return follow_fall(state, Window(ended=True), seen)[1]


def test_a_loss_that_does_not_fall():
    draw = np.random.default_rng(0)
    flat = 4.15 + draw.normal(size=200) * 0.05
    assert len(names(LOSS_NOT_DECREASING, fell(flat, observed=4.15, prior=4.1))) == 1
    assert names(LOSS_NOT_DECREASING, fell(flat - np.linspace(0, 1, 200), observed=4.15)) == []
    # A trained model has nothing left to fall; a warm-up has spent no rate; noise hides a fall.
    assert names(LOSS_NOT_DECREASING, fell(flat / 10, observed=0.415, prior=4.1)) == []
    assert names(LOSS_NOT_DECREASING, fell(flat[:60], warmup=600, observed=4.15)) == []
    noisy = 4.15 + draw.normal(size=200) * 2
    assert names(LOSS_NOT_DECREASING, fell(noisy, observed=4.15)) == []
    # It fell within its first steps and then stood still.
    assert names(LOSS_NOT_DECREASING, fell(flat / 2, observed=4.15, prior=2.0)) == []
    assert fell(flat) is None  # nobody knows what it began with
    huge = LossFall(200, 1e12, 1e12, 1e12, 1e12, 1e8, 200.0, "regression")
    assert names(LOSS_NOT_DECREASING, huge) == []


# ---------------------------------------------------------------- gradients


def test_clipping():
    def found(clipped=100, threshold=1.0, typical=3.0, free=True, eps=1e-8):
        return names(
            CLIPPING_DOMINATES,
            Clipping(100, clipped, threshold, typical, 5.0, 10_000, free, eps),
        )

    assert found(clipped=50) == []
    assert found() == ["note"]  # Adam divides it out
    assert found(threshold=1e-6) == ["warning"]
    assert found(typical=1e6) == ["note"]  # huge units alone
    assert found(threshold=1e-3) == ["warning"]  # nobody means that
    assert found(free=False, eps=0.0) == ["note"]  # a rate three times smaller
    assert found(free=False, eps=0.0, typical=30.0) == ["warning"]
    assert found(eps=1.0) == ["note"]  # epsilon rules without any clipping too


def test_clipping_is_folded_against_the_plan():
    plan = Plan(60, 10, 8, max_grad_norm=1.0, parameters=100)
    steps = tuple(Step(i, 1.0, 1e-3, grad_norm=2.0 if i % 2 else 0.5) for i in range(1, 61))
    _, measured = follow_clipping({}, Window(steps, plan=plan), {})
    assert (measured.steps, measured.clipped, measured.threshold) == (60, 30, 1.0)
    assert follow_clipping({}, Window(steps, plan=Plan(60, 10, 8)), {})[1] is None


def test_gradients_left_over():
    model = nn.Linear(2, 2)
    assert gradients_left(model, 2).left == 0
    model.weight.grad = torch.zeros(2, 2)
    assert gradients_left(model, 2).left == 0
    model.weight.grad[0, 0] = 1e-9
    assert gradients_left(model, 2).names == ("weight",)
    assert names(GRADIENT_ACCUMULATES, GradientLeft(2, 1, ("weight",))) == ["error"]
    assert names(GRADIENT_ACCUMULATES, GradientLeft(2, 0, ())) == []


def layer(name="w", **changes):
    usual = {
        "dtype": "float32", "dims": 2, "rate": 1e-3, "peak": 1e-3, "sampled": 1000,
        "reached": 1000, "gradient": 1e-2, "weight": 0.05, "update": 5e-4, "still": 0,
        "coarse": 0, "coarse_moved": 0,
    }  # fmt: skip
    return LayerNumbers(name=name, **{**usual, **changes})


def samples(*layers, loss=1.0, first=2.0, planned=1000, adam=True, norm=1.0, eps=1e-8):
    taken = tuple(LayerSample(step, loss, norm, layers) for step in (10, 20))
    return LayerSamples(first, planned, adam, eps, taken)


def test_depth():
    def deep(*gradients):
        return samples(*(layer(f"w{i}", gradient=g) for i, g in enumerate(gradients)))

    assert names(VANISHING_GRADIENT, deep(1e-3, 1e-3, 1e-2, 1e-2)) == []
    assert names(VANISHING_GRADIENT, deep(1e-9, 1e-8, 1e-5, 1e-2)) == ["warning"]
    assert names(VANISHING_GRADIENT, deep(0.0, 0.0, 1e-2, 1e-2, 1e-2)) == []  # adapters at zero
    assert names(VANISHING_GRADIENT, deep(1e-2, 1e-9, 1e-9, 1e-2)) == []  # not from the input on
    for pair in (
        ("attention.self.query", "attention.self.key"),
        ("self_attn.q_proj", "self_attn.k_proj"),
        ("q_proj.lora_A.default", "q_proj.lora_B.default"),
    ):  # while attention is even, next to nothing depends on these
        first = [layer(f"layer.2.{name}.weight", gradient=1e-9) for name in pair]
        assert names(VANISHING_GRADIENT, samples(*first, *map(layer, "vop"))) == []
    under = samples(*(layer(f"w{i}", dtype="float16", reached=50) for i in range(4)))
    assert names(VANISHING_GRADIENT, under) == ["float16"]
    assert names(EXPLODING_GRADIENT, deep(1e2, 1e1, 1e0, 1e-1, 1e-3, 1e-4)) == ["warning"]
    assert names(EXPLODING_GRADIENT, deep(1e6, 2e6, 1e6, 2e6, 1e6, 1e6)) == []  # huge units
    assert names(EXPLODING_GRADIENT, GradientCourse(40, 1.0, 2e3, 1.0, 5.0)) == ["run"]
    assert names(EXPLODING_GRADIENT, GradientCourse(40, 1.0, 2e3, 1.0, 0.5)) == []
    assert names(EXPLODING_GRADIENT, GradientCourse(40, 1e9, 2e9, 1.0, 5.0)) == []


# ---------------------------------------------------------------- updates


def test_rounding():
    lost = {"dtype": "bfloat16", "still": 900, "coarse": 880}
    assert names(UPDATE_ROUNDED_AWAY, samples(layer(**lost))) == ["warning"]
    assert names(UPDATE_ROUNDED_AWAY, samples(layer(**lost, coarse_moved=90))) == []  # stochastic
    assert names(UPDATE_ROUNDED_AWAY, samples(layer(dtype="bfloat16", still=100))) == []
    assert names(UPDATE_ROUNDED_AWAY, samples(layer(**{**lost, "dtype": "float32"}))) == []
    decayed = samples(layer(**lost, rate=1e-5))
    assert names(UPDATE_ROUNDED_AWAY, decayed) == []


def test_too_small():
    assert names(UPDATE_TOO_SMALL, samples(layer())) == []
    assert names(UPDATE_TOO_SMALL, samples(layer(rate=1e-5, peak=1e-5, update=5e-6))) == []
    cold = layer(rate=1e-9, peak=1e-9, update=1e-9)
    assert names(UPDATE_TOO_SMALL, samples(cold)) == ["warning"]
    assert names(UPDATE_TOO_SMALL, samples(layer(update=0.0))) == ["warning"]
    assert names(UPDATE_TOO_SMALL, samples(layer(update=2e-6), eps=1.0)) == ["warning"]
    assert names(UPDATE_TOO_SMALL, samples(layer(update=2e-6), eps=1.0, adam=False)) == []
    done = layer(update=2e-6, gradient=1e-6)  # learnt by heart; Adam remembers larger gradients
    assert names(UPDATE_TOO_SMALL, samples(done)) == []
    end = layer(rate=1e-6, update=5e-7)  # the end of a schedule
    assert names(UPDATE_TOO_SMALL, samples(end)) == []
    head = layer("head", rate=0.0, peak=0.0, update=0.0)
    assert names(UPDATE_TOO_SMALL, samples(layer(), head)) == ["groups"]
    assert names(UPDATE_TOO_SMALL, samples()) == ["warning"]  # a norm, and no gradient
    assert names(UPDATE_TOO_SMALL, samples(norm=math.nan)) == []


def test_too_large():
    wild = layer(update=0.01)
    assert names(UPDATE_TOO_LARGE, samples(wild, loss=3.0)) == ["warning"]
    assert names(UPDATE_TOO_LARGE, samples(wild, loss=1.0)) == []  # it learns
    assert names(UPDATE_TOO_LARGE, samples(layer(), loss=3.0)) == []
    assert names(UPDATE_TOO_LARGE, samples(wild, loss=math.nan)) == []


def test_a_sample_measures_what_the_step_did():
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(torch.randn(8, 64)).square().mean().backward()
    before, gradient = model.weight.detach().clone(), model.weight.grad.clone()
    watch = LayerWatch()
    watch.before(model, optimizer)
    optimizer.step()
    weight, bias = watch.after(2, 1.0, 1.0, 0.25).layers
    assert (weight.name, weight.sampled, weight.still, bias.dims) == ("weight", 4096, 0, 1)
    rms = {"gradient": gradient / 0.25, "weight": before, "update": 0.5 * gradient}
    for name, tensor in rms.items():
        expected = tensor.square().mean().sqrt().item()
        assert math.isclose(getattr(weight, name), expected, rel_tol=1e-4), name


def test_rounding_is_measured_in_bfloat16():
    model = nn.Linear(64, 64, bias=False).bfloat16()
    nn.init.constant_(model.weight, 0.05)
    for rate, still in ((1e-6, 4096), (1e-2, 0)):
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        model.weight.grad = torch.ones_like(model.weight)
        watch = LayerWatch()
        watch.before(model, optimizer)
        optimizer.step()
        (seen,) = watch.after(2, 1.0, 1.0, 1.0).layers
        assert (seen.still, seen.coarse, seen.coarse_moved) == (still, still, 0)


# ---------------------------------------------------------------- units


def test_dead_units():
    def found(**changes):
        usual = {"name": "a", "function": "relu", "units": 16, "dead": 16, "samples": 3}
        units = LayerUnits(**{**usual, "positions": 96, **changes})
        return names(DEAD_UNIT, ActivationUnits((units,)))

    assert found() == ["warning"]
    assert found(dead=8) == []
    assert found(samples=2) == []
    assert found(positions=8) == []
    assert found(units=4, dead=4) == []
    gate = {"function": "tanh", "dead": 0, "flat": 0.9}
    assert found(**gate, followed=True) == ["warning"]
    assert found(**gate) == []  # an output that is sure of itself
    assert found(**{**gate, "flat": 0.6}, followed=True) == []  # a trained pooler


def test_units_that_die_in_mid_run_and_functions():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 8)

        def forward(self, x):
            y = self.second(torch.relu(self.first(x)))
            return torch.relu(y - 1e6)  # no weight follows: a loss's hinge

    torch.manual_seed(0)
    model, watch = Net(), ActivationWatch()
    for step in (2, 5, 10, 20):
        if step == 5:
            nn.init.constant_(model.first.bias, -50.0)
        watch.arm(model, step)
        model(torch.randn(32, 4))
        watch.disarm()
    (relu,) = watch.measure().layers
    assert (relu.dead, relu.samples, relu.function) == (8, 4, "relu")
    assert relu.name.startswith("call 1 of relu in ")
    assert relu.name.endswith("Net.forward")
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_units_are_watched_and_the_hooks_come_off():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh())
    with torch.no_grad():
        model[0].bias[:3] = -50.0
        model[2].bias[:2] = 50.0
    watch = ActivationWatch()
    for step in (2, 5, 10):
        watch.arm(model, step)
        model(torch.randn(32, 4))
        watch.disarm()
    model(torch.randn(32, 4))
    relu, tanh = watch.measure().layers
    assert (relu.dead, relu.units, relu.samples, relu.positions) == (3, 8, 3, 96)
    assert (tanh.function, tanh.dead) == ("tanh", 2)
    assert not model[1]._forward_hooks


# ---------------------------------------------------------------- rows


def ordered(second, epoch=8):
    state, last = {}, None
    plan = Plan(2 * epoch, epoch, 2)
    orders = [*range(epoch), *second]
    for i, place in enumerate(orders, 1):
        window = Window((Step(i, 1.0, 1e-3, rows=(place, place + 100)),), plan=plan)
        state, measured = follow_order(state, window, {})
        last = measured or last
    return last


def test_orders():
    assert names(ORDER_REPEATS, ordered(range(8))) == ["warning"]
    assert names(ORDER_REPEATS, ordered(reversed(range(8)))) == []
    assert ordered(range(8)).sorted is False
    assert names(ORDER_REPEATS, EpochOrder(2, 2, 4, True)) == []
    assert follow_order({}, Window((Step(1, 1.0, 1e-3),), plan=Plan(4, 2, 2)), {})[1] is None


def test_waiting():
    steps = tuple(Step(i, 1.0, 1e-3, seconds=0.1, waiting=0.05) for i in range(1, 40))
    _, measured = follow_waiting({}, Window(steps, ended=True), {})
    assert math.isclose(measured.share, 0.5)
    assert names(WAITING_FOR_DATA, measured) == ["note"]
    assert names(WAITING_FOR_DATA, Waiting(100, 0.1, 0.001, 0.01)) == []
    assert names(WAITING_FOR_DATA, Waiting(100, 0.004, 0.002, 0.5)) == []  # two milliseconds
    (fault,) = WAITING_FOR_DATA.judge(Waiting(100, 0.1, 0.0, 0.4))
    assert "bursts" in fault.message
