"""Does the optimizer hold what the model trains, and does what it holds move?

An optimizer built before the model's parameters were replaced (by adapters, by a resized
embedding, by a wrapper) goes on updating the old tensors: loss and gradient norm look alive, and
not one weight of the model changes. Identity of the tensors shows it before step 1; two steps of
the run prove it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import nn

from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.subject import Subject

NAMED = 5  # names shown of a longer list


@dataclass(frozen=True)
class OptimizerCoverage(Measurement):
    """Which trainable tensors the optimizer holds; tensors with two names count once.

    Attributes:
        trainable, held: trainable tensors of the model, and those of them in the optimizer.
        unheld: names of the others, in the model's order, at most twenty.
        unheld_elements, trainable_elements: how many numbers they hold.
        foreign: tensors in the optimizer that are not the model's.
    """

    trainable: int
    held: int
    unheld: tuple[str, ...]
    unheld_elements: int
    trainable_elements: int
    foreign: int


@dataclass(frozen=True)
class ParametersMoved(Measurement):
    """Which of the sampled parameters changed over the first steps.

    Judged are parameters that a gradient reached at a size their precision can show: the learning
    rate times it exceeds the spacing of float32 at the weight.

    Attributes:
        steps: optimizer steps looked at.
        watched: trainable tensors sampled.
        reached: those with such a gradient.
        still: names of the reached ones of which no sampled element changed, at most twenty.
        still_count: how many there are.
    """

    steps: int
    watched: int
    reached: int
    still: tuple[str, ...]
    still_count: int


# ---------------------------------------------------------------- before step 1


def measure_coverage(subject: Subject) -> Iterator[OptimizerCoverage]:
    """Compare the tensors of model and optimizer by identity."""
    if subject.optimizer is None:
        raise Skip("there is no optimizer yet")
    optimizer = getattr(subject.optimizer, "optimizer", subject.optimizer)  # AcceleratedOptimizer
    if _steps_in_backward(subject.args):
        raise Skip("this optimizer updates inside the backward pass and holds no parameters")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    # Parameters with two names come once.
    trainable = {n: p for n, p in subject.model.named_parameters() if p.requires_grad}
    unheld = [name for name, p in trainable.items() if id(p) not in held]
    yield OptimizerCoverage(
        trainable=len(trainable),
        held=len(trainable) - len(unheld),
        unheld=tuple(unheld[:20]),
        unheld_elements=sum(trainable[name].numel() for name in unheld),
        trainable_elements=sum(p.numel() for p in trainable.values()),
        foreign=len(held - {id(p) for p in subject.model.parameters()}),
    )


def _steps_in_backward(args: Any) -> bool:
    name = str(getattr(args.optim, "value", args.optim))
    return "lomo" in name or "layerwise" in name


# ---------------------------------------------------------------- over the first steps


@dataclass
class _Sample:
    parameter: nn.Parameter
    indices: torch.Tensor
    before: torch.Tensor
    reached: bool = False
    moved: bool = False


@dataclass
class ParameterWatch:
    """Compares a few elements of every trainable parameter before and after an optimizer step.

    Call `start` before the first step, and `measure` right after each optimizer step to be looked
    at, while its gradients are still there (``on_optimizer_step``). Costs one copy of at most
    `elements` numbers each time.
    """

    elements: int = 262_144
    steps: int = 0
    _samples: dict[str, _Sample] = field(default_factory=dict)

    def start(self, model: nn.Module) -> None:
        """Remember the sampled elements as they are now."""
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad and p.numel()}
        share = max(1, min(64, self.elements // max(len(trainable), 1)))
        self.steps, self._samples = 0, {}
        for name, parameter in trainable.items():
            size = parameter.numel()
            count = min(share, size)
            indices = torch.arange(count, device=parameter.device) * size // count
            self._samples[name] = _Sample(parameter, indices, _elements(parameter, indices))

    @torch.no_grad()
    def measure(self, optimizer: Any, *, skipped: bool = False) -> ParametersMoved | None:
        """What has moved since `start`; None when the step was skipped (float16 scaling).

        Args:
            optimizer: the one that stepped; its groups' ``lr`` say how large a change to expect.
            skipped: whether the gradient scaler left this step out.
        """
        if skipped:
            return None
        self.steps += 1
        rates = {id(p): float(g["lr"]) for g in optimizer.param_groups for p in g["params"]}
        # A tensor that no group holds is expected to move as the others are.
        usual = max(rates.values(), default=0.0)
        for sample in self._samples.values():
            rate = rates.get(id(sample.parameter), usual)
            now = _elements(sample.parameter, sample.indices)
            sample.moved |= bool((now != sample.before).any())
            sample.reached |= _visible(sample, rate)
        reached = {name: s for name, s in self._samples.items() if s.reached}
        still = [name for name, sample in reached.items() if not sample.moved]
        return ParametersMoved(
            steps=self.steps,
            watched=len(self._samples),
            reached=len(reached),
            still=tuple(still[:20]),
            still_count=len(still),
        )


WATCH = "parameter_watch"  # where the subject's cache keeps the run's `ParameterWatch`


def take_parameters_moved(subject: Subject) -> Iterator[ParametersMoved]:
    """Yield what the run's watch sees; call it right after an optimizer step, unguarded."""
    watch = subject.cache.get(WATCH)
    if watch is None or subject.optimizer is None:
        raise Skip("nobody watches the parameters")
    moved = watch.measure(subject.optimizer)
    if moved is not None:
        yield moved


def _elements(tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1)[indices].clone()


def _visible(sample: _Sample, rate: float) -> bool:
    """Whether a plain gradient step would have changed a sampled element in float32."""
    gradient = sample.parameter.grad
    if gradient is None or gradient.is_sparse or sample.parameter.dtype != torch.float32:
        return False  # half precision rounds small steps away: another fault
    step = rate * _elements(gradient, sample.indices).abs()
    return bool((step > torch.finfo(torch.float32).eps * sample.before.abs()).any())


# ---------------------------------------------------------------- the check


def unheld_parameters(coverage: OptimizerCoverage) -> Iterator[Fault]:
    """Trainable tensors without an optimizer, or an optimizer of other tensors."""
    missing = coverage.trainable - coverage.held
    evidence = {
        "seen": f"{coverage.held} of {coverage.trainable} held",
        "expected": "all held, none foreign",
        "foreign": coverage.foreign,
        "unheld_elements": coverage.unheld_elements,
        "trainable_elements": coverage.trainable_elements,
    }
    if missing:
        stale = (
            f"; it holds {coverage.foreign} tensors that are not the model's (built before the "
            "parameters were replaced?)"
            if coverage.foreign
            else ""
        )
        yield Fault(
            f"the optimizer does not hold {missing} of {coverage.trainable} trainable tensors "
            f"({coverage.unheld_elements:,} of {coverage.trainable_elements:,} numbers): "
            f"{_names(coverage.unheld, missing)}{stale}",
            evidence=evidence,
        )
    elif coverage.foreign:
        yield Fault(
            f"the optimizer also holds {coverage.foreign} tensors that the model does not: "
            "a checkpoint of the model will not save them",
            severity="note",
            evidence=evidence,
        )


def still_parameters(
    moved: ParametersMoved,
    *,
    min_steps: Annotated[
        int, "the first step's rate may be zero (warm-up) and adapters move from the second on"
    ] = 2,
) -> Iterator[Fault]:
    """Parameters that a gradient reaches and no step changes."""
    if moved.steps < min_steps or not moved.still_count:
        return
    yield Fault(
        f"{moved.still_count} of {moved.reached} parameters that a gradient reaches did not change "
        f"in {moved.steps} optimizer steps: {_names(moved.still, moved.still_count)}",
        evidence={
            "seen": f"{moved.still_count} still",
            "expected": "0 still",
            "reached": moved.reached,
            "watched": moved.watched,
            "steps": moved.steps,
        },
    )


def _names(names: tuple[str, ...], count: int) -> str:
    more = f" and {count - NAMED} more" if count > NAMED else ""
    return ", ".join(names[:NAMED]) + more


MEASURE_COVERAGE = Probe(
    name="compare optimizer and model",
    moment="static",
    measures=(OptimizerCoverage,),
    take=measure_coverage,
    needs=("optimizer", "unsharded"),
)

MEASURE_MOVED = Probe(
    name="see parameters move",
    moment="run",
    measures=(ParametersMoved,),
    take=take_parameters_moved,
    needs=("optimizer", "unsharded"),
)

PARAMETER_UNOPTIMIZED = Check(
    name="parameter-unoptimized",
    stage="baselines",
    severity="error",
    moments=("static", "run"),
    why="What the optimizer does not hold never learns, while loss and gradient norm look alive.",
    fix="Trainer(..., optimizers=(AdamW(model.parameters(), lr=args.learning_rate), None))",
    source="accelerate issues 2665 and 3209 (2024); Karpathy, A Recipe for Training (2019)",
    unsure="A loss with parameters of its own in the optimizer gives a note. A backbone left out "
    "on purpose should say so: requires_grad_(False) also saves its backward pass.",
    judges=(unheld_parameters, still_parameters),
    # clipping, too: the norm counts the gradients of what the optimizer does not hold
    explains=("loss-not-decreasing", "update-too-small", "clipping-dominates"),
)
