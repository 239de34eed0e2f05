"""A training_step of one's own: a division forgotten, gradients kept, and steps that are right."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer

import hf_recipe
from hf_recipe.baselines.step_gradient import (
    StepGradient,
    carried_over,
    explained,
    never_divided,
)
from tests.gallery.harness import Case, alarms, assert_found, assert_silent, everything, run
from tests.models import arguments, batchnorm, bert, points, signature, words

SCALED, KEPT = "loss-scaled-by-accumulation", "gradient-accumulates"


def step(count=4, whole=1.0, carried=0.0, residual=1e-6):
    return StepGradient(count, whole, whole / count, whole / count, carried, residual)


@pytest.mark.parametrize(
    ("seen", "scaled", "kept"),
    [
        (step(), False, False),
        (step(whole=4.0), True, False),
        (step(whole=0.25), True, False),
        (step(whole=4.0, carried=None), True, False),
        (step(carried=1.0), False, True),
        (step(carried=0.9), False, False),  # momentum
        (step(whole=1.3), False, False),  # weighted on purpose
        (step(whole=4.0, carried=1.0, residual=0.4), False, False),  # another training
        (step(whole=float("nan"), residual=float("nan")), False, False),
        (step(count=1), False, False),
        (StepGradient(4, 0.25, 0.0, 1.0, None, 1e-9), True, False),  # the last one alone counts
    ],
)
def test_judging(seen, scaled, kept):
    assert (bool(list(never_divided(seen))), bool(list(carried_over(seen)))) == (scaled, kept)


def test_known_sums_are_taken_apart():
    draw = torch.Generator().manual_seed(0)
    parts = list(torch.randn(3, 500, generator=draw, dtype=torch.double))
    before = torch.randn(500, generator=draw, dtype=torch.double)
    seen = explained(0.5 * parts[0] + 0.3 * parts[1] + 0.2 * parts[2] + before, parts, before)
    assert seen.whole == pytest.approx(1.0)
    assert (seen.least, seen.most) == (pytest.approx(0.6), pytest.approx(1.5))
    assert seen.carried == pytest.approx(1.0)
    assert seen.residual < 1e-9
    many = [parts[0]] * 16
    assert explained(parts[0] * 16, many, None).whole == pytest.approx(16)


class OwnStep(Trainer):
    """A step as many scripts have it."""

    divides, keeps, adversarial = True, False, False

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, inputs)
        if self.divides:
            loss = loss / self.args.gradient_accumulation_steps
        self.accelerator.backward(loss)
        if self.adversarial:
            table = model.get_input_embeddings().weight
            moved = 0.5 * table.grad / (table.grad.norm() + 1e-9)
            table.data.add_(moved)
            self.accelerator.backward(self.compute_loss(model, inputs))
            table.data.sub_(moved)
        if self.keeps:
            bank = vars(self).setdefault("bank", {})
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    parameter.grad.add_(bank.get(name, 0))
                    bank[name] = parameter.grad.detach().clone()
        return loss.detach()


def own_step(folder, *, model=bert, data=words, accumulation=1, **changes):
    trainer = OwnStep(
        model=model(),
        args=arguments(folder, max_steps=4, gradient_accumulation_steps=accumulation),
        train_dataset=data(64),
    )
    for name, value in changes.items():
        setattr(trainer, name, value)
    return trainer


def undivided(folder, faulty):
    return own_step(folder, accumulation=4, divides=not faulty)


def undivided_norms(folder, faulty):
    return own_step(folder, model=batchnorm, data=points, accumulation=2, divides=not faulty)


def kept(folder, faulty):
    return own_step(folder, keeps=faulty)


CASES = [
    Case(SCALED, undivided, "error", name="undivided"),
    Case(SCALED, undivided_norms, "error", name="undivided-batchnorm"),
    Case(KEPT, kept, "error", name="kept"),
]
for case in CASES:
    case.settings.setdefault("select", [SCALED, KEPT])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fault_is_found(case, tmp_path):
    assert_found(case, tmp_path)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fixed_twin_is_silent(case, tmp_path):
    report = assert_silent(case, tmp_path)
    assert any(stored.kind == "StepGradient" for stored in report.measurements)


def test_another_training_raises_no_alarm(tmp_path):
    report = run(own_step(tmp_path, adversarial=True), select=[SCALED, KEPT])
    assert alarms(report) == set(), [f.message for f in everything(report)]


def test_a_retraced_run_is_bit_identical(tmp_path):
    bare = own_step(tmp_path / "bare", accumulation=2)
    bare.train()
    watched = own_step(tmp_path / "watched", accumulation=2)
    recipe = hf_recipe.attach(watched)
    watched.train()
    kinds = [stored.kind for stored in recipe.report.measurements]
    recipe.detach()
    assert "StepGradient" in kinds
    assert recipe.report.crashed == {}
    assert signature(watched) == signature(bare)
