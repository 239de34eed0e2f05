"""Is a step's gradient the mean of its micro-batches'? Asked where training_step was replaced.

A training_step of one's own has to divide by the number of micro-batches, and to leave nothing of
the step before; forgetting either still trains, at a rate that is a multiple of the one that was
set. It cannot be rehearsed beforehand, since nobody knows what else it does. So the first two
steps are retraced: each micro-batch is run again from the same random state, and the gradient that
the optimizer was about to follow is written as a sum of theirs and of the last step's. Where that
explains it, the coefficients tell; where it does not, as under adversarial training, nothing is
said.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import nn

from hf_recipe.core.check import Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.overrides import mentions, overrides, own_method, replaces
from hf_recipe.instruments.quiet import restore_random_state, save_random_state
from hf_recipe.instruments.subject import Subject

STEPS = (1, 2)  # of this process; the second has one before it
ELEMENTS = 65_536
MOST_PARTS = 8  # micro-batches that are told apart; more are looked at as one sum
TRAIL = "step_trail"  # key of a subject's cache


@dataclass(frozen=True)
class StepGradient(Measurement):
    """A step's gradient before clipping, as a sum of what explains it.

    Attributes:
        micro_batches: of the step.
        whole: what the coefficients of the micro-batches' mean gradients add up to; 1 is right,
            `micro_batches` is a sum that was never divided.
        least, most: the smallest and largest of them, times the number of micro-batches.
        carried: the coefficient of the step before; None for the first step.
        residual: norm of what none explains, over the gradient's.
    """

    micro_batches: int
    whole: float
    least: float
    most: float
    carried: float | None
    residual: float


@dataclass
class StepTrail:
    """What is kept of a step in order to retrace it."""

    micro_batches: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)
    found: torch.Tensor | None = None  # the gradient that the optimizer will follow
    before: torch.Tensor | None = None  # that of the last step

    def add(self, inputs: Mapping[str, Any]) -> None:
        """A micro-batch is about to run."""
        self.micro_batches.append((dict(inputs), save_random_state()))

    def take(self, model: nn.Module, left_by_clipping: float) -> None:
        """The step's gradient is complete, and was clipped to `left_by_clipping` of itself."""
        gradients = [p.grad for p in trained(model)]
        self.found = sampled(model, gradients) / max(left_by_clipping, 1e-12)

    def next(self) -> StepTrail:
        """An empty one for the step after."""
        return StepTrail(before=self.found)


def touched(trainer: Any) -> bool:
    """Whether training_step is of the user's own, or adds to the Trainer's and names gradients."""
    if replaces(trainer, "training_step"):
        return True
    if not overrides(trainer, "training_step"):
        return False
    bodies = [vars(c).get("training_step") for c in type(trainer).__mro__]
    bodies.append(getattr(own_method(trainer, "training_step"), "__func__", None))
    return any(
        mentions(body.__code__, name)
        for body in bodies
        if isinstance(body, types.FunctionType) and not body.__module__.startswith("transformers.")
        for name in ("grad", "zero_grad", "backward")
    )


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that a gradient may reach."""
    return [p for p in model.parameters() if p.requires_grad]


def sampled(model: nn.Module, gradients: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Evenly spaced elements of the trained parameters' gradients, in double precision."""
    parameters = trained(model)
    stride = max(1, -(-sum(p.numel() for p in parameters) // ELEMENTS))
    parts = []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        flat = torch.zeros_like(parameter) if gradient is None else gradient.detach()
        parts.append(flat.reshape(-1)[::stride].double().cpu())
    return torch.cat(parts)


def measure_step_gradient(subject: Subject) -> Iterator[StepGradient]:
    """Run the step's micro-batches again, without a trace. Call it quietly."""
    trail = subject.cache.get(TRAIL)
    if not isinstance(trail, StepTrail) or trail.found is None or not trail.micro_batches:
        raise Skip("training_step is the Trainer's own, or its micro-batches were not seen")
    parts = []
    for inputs, random_state in trail.micro_batches:
        restore_random_state(random_state)
        prepared = subject.trainer._prepare_inputs(inputs)
        loss = subject.compute_loss(prepared)
        gradients = torch.autograd.grad(loss, trained(subject.model), allow_unused=True)
        parts.append(sampled(subject.model, gradients))
    yield explained(trail.found, parts, trail.before)


def explained(
    found: torch.Tensor, parts: Sequence[torch.Tensor], before: torch.Tensor | None
) -> StepGradient:
    """Least squares of `found` over the micro-batches' gradients and the last step's."""
    count = len(parts)
    columns = list(parts) if count <= MOST_PARTS else [torch.stack(list(parts)).mean(0)]
    table = torch.stack([*columns, *([before] if before is not None else [])], 1)
    size = float(found.norm())
    if not size or not bool(table.isfinite().all()) or not bool(found.isfinite().all()):
        raise Skip("a gradient is zero or not finite")
    weights = torch.linalg.lstsq(table, found[:, None], driver="gelsd").solution[:, 0]
    own = weights[: len(columns)] * (count / len(columns))
    return StepGradient(
        micro_batches=count,
        whole=float(own.sum()) / (count / len(columns)),
        least=float(own.min()) * len(columns),
        most=float(own.max()) * len(columns),
        carried=float(weights[-1]) if before is not None else None,
        residual=float((table @ weights - found).norm()) / size,
    )


# ---------------------------------------------------------------- judging

EXPLAINED = Annotated[
    float, "of the gradient's norm; the same numbers in another order leave 1e-6, bfloat16 1e-2"
]


def never_divided(
    step: StepGradient,
    *,
    residual: EXPLAINED = 0.02,
    tolerance: Annotated[float, "relative; an exact multiple is looked for"] = 0.05,
) -> Iterator[Fault]:
    """The step follows k times, or a k-th of, the mean gradient of its k micro-batches."""
    count = step.micro_batches
    if count < 2 or not step.residual <= residual or abs(step.carried or 0.0) > tolerance:
        return
    if abs(step.least) <= tolerance and abs(step.most - 1) <= tolerance:
        yield Fault(
            f"of {count} accumulation steps only some count: the gradients of others are gone "
            "when the optimizer steps",
            subject="accumulation",
            evidence={"seen": f"x{step.whole:.4g}", "expected": "x1", "accumulation": count},
            fix="zero_grad() once a step, after optimizer.step(), and not in training_step",
        )
        return
    factor = next(
        (f for f in (float(count), 1 / count) if abs(step.whole / f - 1) <= tolerance), None
    )
    if factor is None:
        return
    yield Fault(
        f"the gradient of {count} accumulation steps is x{step.whole:.3g} their mean: "
        + ("training_step never divides" if factor > 1 else "it is divided twice"),
        subject="accumulation",
        evidence={"seen": f"x{step.whole:.4g}", "expected": "x1", "accumulation": count},
        fix="self.accelerator.backward(loss / self.args.gradient_accumulation_steps)"
        if factor > 1
        else "divide by the number of micro-batches once: in training_step or in the loss",
    )


def carried_over(
    step: StepGradient,
    *,
    residual: EXPLAINED = 0.02,
    tolerance: Annotated[float, "relative; what is kept whole is looked for, no momentum"] = 0.05,
) -> Iterator[Fault]:
    """The gradient of the step before stands whole in this step's."""
    if step.carried is None or not step.residual <= residual:
        return
    if abs(step.carried - 1) <= tolerance:
        yield Fault(
            "the gradient that the optimizer follows holds the whole gradient of the step before: "
            "gradients add up from step to step",
            evidence={"seen": f"x{step.carried:.3g} of the step before", "expected": "x0"},
            fix="start each step from zero gradients in training_step",
        )


RETRACE_STEP = Probe(
    name="retrace a step's gradient",
    moment="run",
    measures=(StepGradient,),
    take=measure_step_gradient,
    needs=("trainer", "unsharded"),
)
