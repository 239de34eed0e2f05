"""What a step was: read once, in the model's unit; which modules a guard has to put back."""

import math
from time import perf_counter

import torch
from torch import nn

from hf_recipe.instruments.quiet import quiet
from hf_recipe.instruments.record import Recorder, read_out


def test_scalars_are_read_whatever_they_are():
    values = [1.5, None, torch.tensor(2.0), torch.tensor([3.0]), torch.tensor(4.0).bfloat16()]
    assert read_out(values) == [1.5, 0.0, 2.0, 3.0, 4.0]
    assert read_out([torch.tensor(5.0, requires_grad=True)]) == [5.0]
    assert read_out([]) == []


def test_a_step_of_several_micro_batches_in_the_models_unit():
    recorder = Recorder()
    for loss, row in ((2.0, 3), (4.0, 1)):
        recorder.drawn.append((row,))
        assert recorder.add(torch.tensor(loss))
    recorder.norm, recorder.waiting = torch.tensor(0.5), 0.25
    recorder.take_rate(torch.optim.SGD([torch.zeros(1)], lr=1e-3))
    recorder.began = perf_counter() - 1.0
    recorder.closely, recorder.attends = False, 3
    assert recorder.end_step(1)
    assert not recorder.add(torch.tensor(math.nan))
    assert not recorder.end_step(2)
    first, second = recorder.flush(lambda micro_batches: 2.0 * micro_batches)
    assert (first.loss, first.micro_losses, first.rows) == (1.5, (1.0, 2.0), (3, 1))
    assert (first.grad_norm, first.learning_rate, first.waiting) == (0.5, 1e-3, 0.25)
    assert 1.25 <= first.seconds < 2.25
    assert math.isnan(second.loss)
    assert second.grad_norm is None
    assert recorder.curves["loss"].y == [1.5]
    assert recorder.flush(lambda micro_batches: 1.0) == ()


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.seen, self.names, self.limit = 0, ["a"], None

    def forward(self, x):
        self.seen += 1
        self.names.append("b")
        self.fresh = 1
        del self.limit
        self.inner.register_forward_hook(lambda module, inputs, output: output + 1)
        return self.inner(x)


def test_the_guard_puts_back_what_a_pass_leaves_on_modules():
    model = Counts().train()
    names, own = model.names, dict(vars(model))
    model.inner.eval()
    with quiet(model, model):
        model.eval()
        model(torch.zeros(1, 2)).sum().backward()
    assert vars(model) == own
    assert model.names is names
    assert names == ["a"]
    assert model.training
    assert not model.inner.training
    assert not model.inner._forward_hooks
    assert all(p.grad is None for p in model.parameters())
