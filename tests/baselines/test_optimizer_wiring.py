import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from hf_recipe.baselines.optimizer_wiring import (
    PARAMETER_UNOPTIMIZED,
    WATCH,
    OptimizerCoverage,
    ParametersMoved,
    ParameterWatch,
    measure_coverage,
    take_parameters_moved,
)
from hf_recipe.core.check import Skip
from hf_recipe.trainer.preflight import subject_of_trainer
from tests.models import arguments, bert, llama, progressions, words


def faults(measurement, **thresholds):
    return list(PARAMETER_UNOPTIMIZED.judge(measurement, thresholds))


# ---------------------------------------------------------------- arithmetic


def test_unheld_parameters_are_named():
    names = tuple(f"layer.{i}.weight" for i in range(8))
    (fault,) = faults(OptimizerCoverage(10, 2, names, 8_000, 10_000, 0))
    assert fault.severity is None
    assert "8 of 10" in fault.message
    assert "layer.4.weight and 3 more" in fault.message
    assert "stale" not in fault.message


def test_a_stale_optimizer_is_told_apart():
    (fault,) = faults(OptimizerCoverage(2, 1, ("a",), 10, 20, 1))
    assert "holds 1 tensors that are not the model's" in fault.message


def test_a_loss_with_parameters_of_its_own_is_a_note():
    (fault,) = faults(OptimizerCoverage(10, 10, (), 0, 100, 1))
    assert fault.severity == "note"


def test_full_coverage_is_silent():
    assert faults(OptimizerCoverage(10, 10, (), 0, 100, 0)) == []
    assert faults(OptimizerCoverage(0, 0, (), 0, 0, 0)) == []


def test_still_parameters_are_judged_from_the_second_step_on():
    assert faults(ParametersMoved(1, 10, 10, ("a",), 1)) == []
    (fault,) = faults(ParametersMoved(2, 10, 10, ("a", "b"), 2))
    assert "2 of 10 parameters that a gradient reaches" in fault.message
    assert faults(ParametersMoved(2, 10, 10, (), 0)) == []


# ---------------------------------------------------------------- measured


def coverage(model, optimizer, folder):
    from transformers import Trainer

    trainer = Trainer(model=model, args=arguments(folder), train_dataset=words(16))
    trainer.optimizer = optimizer
    (measured,) = measure_coverage(subject_of_trainer(trainer, fresh=True))
    return measured


def test_tied_and_frozen_parameters_are_not_missed(tmp_path):
    model = llama(tie_word_embeddings=True)
    model.model.layers[0].requires_grad_(False)
    trainable = [p for p in model.parameters() if p.requires_grad]
    measured = coverage(model, torch.optim.SGD(trainable, lr=0.1), tmp_path)
    assert measured.held == measured.trainable == len(trainable)
    assert faults(measured) == []


def test_a_head_replaced_later_is_left_behind(tmp_path):
    model = bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.classifier = nn.Linear(32, 4)
    measured = coverage(model, optimizer, tmp_path)
    assert measured.unheld == ("classifier.weight", "classifier.bias")
    assert measured.foreign == 2
    assert len(faults(measured)) == 1


def test_without_an_optimizer_it_is_skipped(tmp_path):
    with pytest.raises(Skip, match="no optimizer"):
        coverage(bert(), None, tmp_path)


def stepped(model, optimizer, steps=2, loss=lambda m: m(torch.ones(4, 6)).square().mean()):
    watch = ParameterWatch()
    watch.start(model)
    for _ in range(steps):
        loss(model).backward()
        optimizer.step()
        measured = watch.measure(optimizer)
        optimizer.zero_grad()
    return measured


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def test_a_healthy_optimizer_moves_everything():
    model = network()
    measured = stepped(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    assert measured.reached == measured.watched == 4
    assert faults(measured) == []


def test_an_optimizer_of_other_tensors_moves_nothing():
    model, other = network(), network()
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3)
    measured = stepped(model, optimizer)
    assert measured.still_count == 4
    assert len(faults(measured)) == 1


def test_an_optimizer_that_passes_one_tensor_over_is_found():
    class Forgetful(torch.optim.SGD):
        def step(self, closure=None):
            model[0].weight.grad = None if model[0].weight.grad is None else kept(model[0].weight)
            return super().step(closure)

    def kept(parameter):
        self_gradient[0] = parameter.grad
        parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    self_gradient = [None]
    model = network()
    optimizer = Forgetful(model.parameters(), lr=0.1)
    watch = ParameterWatch()
    watch.start(model)
    for _ in range(2):
        model(torch.ones(4, 6)).square().mean().backward()
        optimizer.step()
        model[0].weight.grad = self_gradient[0]
        measured = watch.measure(optimizer)
        optimizer.zero_grad()
    assert measured.still == ("0.weight",)


def test_what_no_gradient_reaches_is_not_judged():
    model = network()
    model.add_module("unused", nn.Linear(3, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    measured = stepped(model, optimizer, loss=lambda m: m[:3](torch.ones(4, 6)).square().mean())
    assert measured.watched == 6
    assert measured.reached == 4
    assert faults(measured) == []


@pytest.mark.parametrize("change", ["bfloat16", "zero rate", "tiny rate"])
def test_steps_too_small_for_the_weights_are_another_fault(change):
    model = network()
    if change == "bfloat16":
        model = model.to(torch.bfloat16)
    rate = {"bfloat16": 1e-8, "zero rate": 0.0, "tiny rate": 1e-12}[change]
    dtype = next(model.parameters()).dtype
    measured = stepped(
        model,
        torch.optim.SGD(model.parameters(), lr=rate),
        loss=lambda m: m(torch.ones(4, 6, dtype=dtype)).square().mean(),
    )
    assert faults(measured) == []


def test_a_skipped_step_does_not_count():
    model = network()
    watch = ParameterWatch()
    watch.start(model)
    assert watch.measure(torch.optim.SGD(model.parameters(), lr=0.1), skipped=True) is None
    assert watch.steps == 0


def test_the_watch_sees_a_real_run_through_its_probe(tmp_path):
    from transformers import Trainer

    seen = []

    class Watching(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                self.subject = subject_of_trainer(trainer, fresh=True)
                self.subject.cache[WATCH] = ParameterWatch()
                self.subject.cache[WATCH].start(kwargs["model"])

        def on_optimizer_step(self, args, state, control, **kwargs):
            seen.extend(take_parameters_moved(self.subject))

    trainer = Trainer(
        model=llama(),
        args=arguments(tmp_path, max_steps=2),
        train_dataset=progressions(32),
        callbacks=[Watching()],
    )
    trainer.train()
    assert [m.steps for m in seen] == [1, 2]
    assert seen[-1].reached > 0
    assert faults(seen[-1]) == []
