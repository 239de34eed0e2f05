"""How one batch is memorised, whatever the model: own optimizer, own rate, everything put back.

One setting memorised nine tiny models of nine kinds: SGD with momentum 0.9, clipped at norm 1, rate
0.03, dropout off. Where it does not, a few steps of each of a ladder of rates, of SGD and of Adam,
choose another. A regression's output layer begins at the mean target: how far targets lie from zero
is another check's affair, and would be all that these steps are spent on.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_recipe.core.check import Skip
from hf_recipe.instruments.batches import Batch
from hf_recipe.instruments.distributed import from_rank_0
from hf_recipe.instruments.heads import REGRESSION, read_head
from hf_recipe.instruments.redraw import Watch
from hf_recipe.instruments.subject import Subject

MOMENTUM, BETAS, CLIP, WARMUP = 0.9, (0.9, 0.99), 1.0, 5
LADDER_STEPS = 15
NORMS = (nn.modules.batchnorm._BatchNorm,)


@dataclass(frozen=True)
class Trial:
    """An optimizer and its rate."""

    optimizer: str
    rate: float

    def of(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer over `parameters`."""
        if self.optimizer == "Adam":
            return torch.optim.Adam(parameters, lr=self.rate, betas=BETAS)
        return torch.optim.SGD(parameters, lr=self.rate, momentum=MOMENTUM)


FIRST = Trial("SGD", 3e-2)
LADDER = (
    *(Trial("SGD", rate) for rate in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)),
    *(Trial("Adam", rate) for rate in (1e-3, 3e-3, 1e-2)),
)


def descend(
    subject: Subject,
    batch: Batch,
    parameters: Sequence[nn.Parameter],
    trial: Trial,
    steps: int,
    goal: float,
) -> list[float]:
    """Losses of up to `steps` steps; ends at `goal`; halves the rate where the loss blows up."""
    optimizer, rate = trial.of(parameters), trial.rate
    agree = agreement(subject.model)
    losses: list[float] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / WARMUP)
        optimizer.zero_grad(set_to_none=True)
        loss = subject.compute_loss(batch.inputs)
        losses.append(agree(float(loss.detach())))
        if losses[-1] <= goal or not math.isfinite(losses[-1]):
            break
        if losses[-1] > 3 * losses[0] + 1:
            rate /= 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
    with torch.no_grad():
        losses.append(agree(float(subject.compute_loss(batch.inputs))))
    for parameter in parameters:
        parameter.grad = None
    return losses


def best_trial(
    subject: Subject,
    batch: Batch,
    parameters: Sequence[nn.Parameter],
    weights: Sequence[torch.Tensor],
) -> Trial:
    """What comes down furthest in a few steps from `weights`, which are put back."""
    found: list[tuple[float, int]] = []
    for index, trial in enumerate(LADDER):
        losses = descend(subject, batch, parameters, trial, LADDER_STEPS, -math.inf)
        put_back(subject.model, parameters, weights)
        if math.isfinite(losses[-1]):
            found.append((losses[-1], index))
    return LADDER[min(found)[1]] if found else LADDER[0]


def first_gradient(subject: Subject, batch: Batch, parameters: Sequence[nn.Parameter]) -> float:
    """Norm of the loss's gradient; NaN where it has none, 0 where it reaches no parameter."""
    loss = subject.compute_loss(batch.inputs)
    if not loss.requires_grad or not parameters:
        return math.nan
    loss.backward()  # and not autograd.grad: sharded parameters are told by their hooks
    gradients = [p.grad for p in parameters if p.grad is not None]
    for parameter in parameters:
        parameter.grad = None
    if not gradients:
        return 0.0
    norm = torch.nn.utils.get_total_norm(gradients)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def centre_regression(subject: Subject, batch: Batch) -> None:
    """Let a regression's mean prediction be the mean target, where its output layer has a bias."""
    if is_sharded(subject.model):
        return
    watch = Watch(subject.model)
    with torch.no_grad(), watch.watching():
        loss = float(subject.compute_loss(batch.inputs))
    try:
        head = read_head(subject.model, batch.inputs, watch.outputs, observed=loss)
    except Skip:
        return
    found = watch.output_layer(head.raw)
    bias = None if found is None else found[0].bias
    if head.problem_type != REGRESSION or bias is None or not bias.requires_grad:
        return
    shift = head.labels.double().mean(0) - head.logits.double().mean(0)
    if shift.numel() == bias.numel() and bool(shift.isfinite().all()):
        with torch.no_grad():
            bias.add_(shift.reshape(bias.shape).to(bias))


# ------------------------------------------------------------------ what is put back


def without_noise(model: nn.Module) -> None:
    """Dropout and its kin off; BatchNorm as in training, recurrent layers as cuDNN needs them."""
    model.eval()
    for module in model.modules():
        if isinstance(module, NORMS):
            module.train()


@contextlib.contextmanager
def kept_weights(model: nn.Module) -> Iterator[None]:
    """Put every weight back on exit; of a sharded one this process's part."""
    parameters = list(model.parameters())
    weights = [p.detach().clone() for p in parameters]
    try:
        yield
    finally:
        put_back(model, parameters, weights)


def put_back(
    model: nn.Module, parameters: Sequence[nn.Parameter], weights: Sequence[torch.Tensor]
) -> None:
    """Give `parameters` of `model` the values `weights`."""
    reshard(model)
    with torch.no_grad():
        for parameter, value in zip(parameters, weights, strict=True):
            parameter.copy_(value)


def reshard(model: nn.Module) -> None:
    """Let go of gathered parameters: a forward leaves some, and later ones would read them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are spread over processes, each of which holds its part (FSDP2)."""
    return any(isinstance(m, FSDPModule) for m in model.modules()) or any(
        isinstance(p, DTensor) for p in model.parameters()
    )


def agreement(model: nn.Module) -> Callable[[float], float]:
    """What makes a loss the same on all processes that must decide alike: that of the first."""
    return from_rank_0 if is_sharded(model) else _alone


def _alone(value: float) -> float:
    return value
