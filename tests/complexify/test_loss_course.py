import math

import pytest
import torch
from torch import nn

from hf_recipe.complexify.loss_course import (
    LOSS_NOT_FINITE,
    NonFiniteEvaluation,
    NonFiniteSteps,
    follow_evaluations,
    follow_steps,
)
from hf_recipe.complexify.nonfinite_origin import NonFiniteOrigin, first_nonfinite
from hf_recipe.instruments.quiet import quiet
from hf_recipe.instruments.window import Evaluation, Step, Window
from tests.models import bert, words

NAN, INF = float("nan"), float("inf")


def course(losses, norms=None, size=3, micro=None):
    """Fold a course of losses, a few steps a window; the last measurement."""
    state, last = {}, None
    norms = norms or [1.0] * len(losses)
    steps = [
        Step(i, loss, 1e-3, norm, micro_losses=(micro or {}).get(i, ()), rows=(i, i + 1))
        for i, (loss, norm) in enumerate(zip(losses, norms, strict=True), 1)
    ]
    windows = [Window(steps=tuple(steps[i : i + size])) for i in range(0, len(steps), size)]
    for window in [*windows, Window(ended=True)]:
        state, measured = follow_steps(state, window, {})
        last = measured or last
    return last


def faults(measurement, **thresholds):
    return list(LOSS_NOT_FINITE.judge(measurement, thresholds))


def test_the_first_step_is_named_however_it_is_flushed():
    for size in (1, 3, 100):
        measured = course([2.0, 1.9, 1.8, NAN, NAN, NAN], size=size)
        assert (measured.first_loss, measured.losses, measured.value) == (4, 3, "nan")
        (fault,) = faults(measured)
        assert fault.examples == (4, 5)
        assert "step 4" in fault.message


def test_the_gradient_that_came_before_is_named_and_the_micro_batch():
    measured = course([2.0, 1.9, 1.8, INF], [1.0, 1.0, NAN, 1.0], micro={4: (1.0, INF)})
    assert (measured.first_norm, measured.micro_batch) == (3, 1)
    assert "gradient was not finite from step 3" in faults(measured)[0].message


def test_a_scaler_that_searches_is_silent():
    assert faults(course([2.0] * 40, [INF] * 10 + [1.0] * 20 + [INF] + [1.0] * 9)) == []


def test_a_gradient_that_stays_infinite_is_found():
    (fault,) = faults(course([2.0] * 40, [INF] * 40))
    assert fault.subject == "gradient"


def test_a_healthy_course_is_measured_and_silent():
    measured = course([2.0 - i / 100 for i in range(50)])
    assert measured.steps == 50
    assert faults(measured) == []
    assert NonFiniteSteps.from_values(measured.values()) == measured


def evaluated(batches=(), rows=(), metrics=None, seen=None, split="validation"):
    window = Window(evaluation=Evaluation(10, split, tuple(rows), tuple(batches), metrics or {}))
    return follow_evaluations({}, window, seen or {})[1]


def test_nan_batches_are_found_whatever_the_log_says():
    (fault,) = faults(evaluated([0.69, NAN, 0.7, NAN], metrics={"eval_loss": 0.6928}))
    assert "2 of 4 batches" in fault.message
    assert "0.6928" in fault.message
    (logged,) = faults(evaluated(metrics={"eval_loss": NAN}))
    assert "nan" in logged.message


def test_rows_without_a_label_are_no_alarm():
    assert faults(evaluated([0.6, 0.7], [0.5, NAN, 0.7], {"eval_loss": 0.65})) == []
    assert len(faults(evaluated([], [0.5, INF, 0.7], {"eval_loss": 0.65}))) == 1


def test_an_evaluation_after_the_training_loss_has_gone_says_no_more():
    seen = {"NonFiniteSteps": course([1.0, NAN])}
    measured = evaluated([NAN, NAN], seen=seen)
    assert isinstance(measured, NonFiniteEvaluation)
    assert faults(measured) == []


# ---------------------------------------------------------------- where it began


def batch(rows=4):
    return {k: torch.tensor(v) for k, v in words(rows)[:].items()}


def origin(model, inputs, **options):
    with quiet(model):
        return first_nonfinite(model, inputs, **options)


def test_a_healthy_pass_has_no_origin():
    found = origin(bert().eval(), batch())
    assert found == NonFiniteOrigin("")
    assert faults(found) == []


def test_a_weight_is_named():
    model = bert()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.bias[3] = NAN
    found = origin(model, batch(), step=7)
    assert (found.where, found.name) == ("parameter", "bert.encoder.layer.1.output.dense.bias")
    assert (found.bad, found.step) == (1, 7)
    assert "at step 7" in faults(found)[0].message


class Rooted(nn.Module):
    """A square root whose gradient is infinite at zero, and a logarithm."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.linear, self.act = kind, nn.Linear(3, 3, bias=False), nn.Identity()

    def forward(self, features, labels=None):
        hidden = self.act(self.linear(features))
        if self.kind == "log":
            return {"loss": hidden.abs().mean(1).log().mean(), "hidden": hidden}
        return {"loss": hidden.abs().sqrt().mean(), "hidden": hidden}


def test_an_input_is_named_with_its_rows():
    features = torch.randn(4, 3)
    features[2, 1] = NAN
    found = origin(Rooted("sqrt"), {"features": features})
    assert (found.where, found.name, found.batch_rows) == ("input", "features", (2,))


def test_a_module_is_named_with_its_rows():
    model, features = Rooted("sqrt"), torch.randn(4, 3)
    model.act.register_forward_hook(lambda m, a, out: out.index_fill(0, torch.tensor([1]), NAN))
    found = origin(model, {"features": features})
    assert (found.where, found.name, found.module) == ("output", "act", "Identity")
    assert found.batch_rows == (1,)


def test_the_loss_itself_and_the_backward_pass_are_named():
    zero = {"features": torch.zeros(4, 3)}
    assert origin(Rooted("log"), zero).where == "loss"
    found = origin(Rooted("sqrt"), zero)
    assert (found.where, found.name) == ("gradient", "linear.weight")
    assert len(faults(found)) == 1


@pytest.mark.parametrize("value", [NAN, INF])
def test_masks_of_minus_infinity_are_no_origin(value):
    model = Rooted("sqrt")
    model.act.register_forward_hook(lambda m, a, out: None)
    masks = nn.Identity()
    model.add_module("mask", masks)
    inner = model.forward

    def forward(features, labels=None):
        masks(torch.full((4, 4), -math.inf))
        return inner(features)

    model.forward = forward
    assert origin(model, {"features": torch.rand(4, 3) + 1.0}).where == ""
