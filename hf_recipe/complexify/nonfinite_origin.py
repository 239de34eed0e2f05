"""Where a loss stopped being a number: the first tensor of a forward or backward pass that is not.

Called once, when a loss is not finite, on the inputs of that step and before its update (after
it, every weight is NaN and nothing can be told any more).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hf_recipe.core.check import Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.subject import Subject

IGNORED = -100


@dataclass(frozen=True)
class NonFiniteOrigin(Measurement):
    """The first tensor that was not finite, in the order in which they are computed.

    Attributes:
        where: "parameter", "input", "output" (of a module), "labels" (none counts, so the mean is
            over nothing), "loss", "gradient" or "" (none found).
        name: of the parameter, input column or module ("" is the model itself).
        module: its class.
        numbers, bad: numbers in that tensor, and those NaN or infinite.
        batch_rows: rows of the batch that hold them, at most 64; empty where rows are not told
            apart.
        step: optimizer step, where the caller gave it.
    """

    where: str
    name: str = ""
    module: str = ""
    numbers: int = 0
    bad: int = 0
    batch_rows: tuple[int, ...] = ()
    step: int | None = None


LossFunction = Callable[..., Any]


def first_nonfinite(
    model: nn.Module,
    inputs: Mapping[str, Any],
    loss_function: LossFunction | None = None,
    *,
    backward: bool = True,
    step: int | None = None,
) -> NonFiniteOrigin:
    """Run the model once more and find the first tensor that is NaN or infinite.

    Call it inside the quiet guard; it runs a forward pass in the model's present mode, and a
    backward pass where the loss itself is finite. Minus infinity in a module's output is how masks
    are written, and does not count.

    Args:
        model: the bare module.
        inputs: the step's inputs, on the model's device.
        loss_function: (model, inputs) -> loss; default: the model's own.
        backward: whether to look at gradients when the loss is finite.
        step: the optimizer step, to be said in the finding.
    """
    tensors: list[tuple[str, str, torch.Tensor]]
    tensors = [("parameter", n, p) for n, p in model.named_parameters()]
    tensors += [("input", n, v) for n, v in inputs.items() if isinstance(v, torch.Tensor)]
    for where, name, tensor in tensors:
        if bad := _bad(tensor):
            rows = _rows(tensor, len(tensor)) if where == "input" and tensor.ndim else ()
            return NonFiniteOrigin(where, name, "", tensor.numel(), bad, rows, step)
    trace = _Trace(_batch_size(inputs))
    with trace.watching(model):
        loss = loss_function(model, dict(inputs)) if loss_function else _own_loss(model, inputs)
    if trace.found is not None:
        name, kind, values, bad, rows = trace.found
        return NonFiniteOrigin("output", name, kind, values, bad, rows, step)
    if not bool(torch.isfinite(loss.detach()).all()):
        labels = inputs.get("labels")
        if isinstance(labels, torch.Tensor) and labels.numel() and bool((labels == IGNORED).all()):
            return NonFiniteOrigin("labels", "labels", "", labels.numel(), labels.numel(), (), step)
        return NonFiniteOrigin("loss", "", "", loss.numel(), loss.numel(), (), step)
    if backward and loss.requires_grad:
        return _first_gradient(model, loss, step)
    return NonFiniteOrigin("", step=step)


def _own_loss(model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    outputs = model(**inputs)
    loss: torch.Tensor = outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]
    return loss


def _first_gradient(model: nn.Module, loss: torch.Tensor, step: int | None) -> NonFiniteOrigin:
    """The first parameter, in the order of the backward pass, whose gradient is not finite."""
    found: list[tuple[str, int, int]] = []
    handles = []

    def watch(name: str, parameter: nn.Parameter) -> None:
        def look(reached: torch.Tensor) -> None:
            gradient = reached.grad
            if not found and gradient is not None and (bad := _bad(gradient, masks=False)):
                found.append((name, gradient.numel(), bad))

        handles.append(parameter.register_post_accumulate_grad_hook(look))  # type: ignore[no-untyped-call]

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            watch(name, parameter)
    try:
        torch.autograd.backward(loss.sum())
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        return NonFiniteOrigin("", step=step)
    name, values, bad = found[0]
    return NonFiniteOrigin("gradient", name, "", values, bad, (), step)


@dataclass
class _Trace:
    """Remembers the first module that finished with an output that is not finite."""

    batch_size: int
    found: tuple[str, str, int, int, tuple[int, ...]] | None = None
    handles: list[Any] = field(default_factory=list)

    def watching(self, model: nn.Module) -> _Trace:
        for name, module in model.named_modules():
            self.handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __enter__(self) -> _Trace:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def look(module: nn.Module, arguments: Any, output: Any) -> None:
            if self.found is not None:
                return
            for tensor in _tensors(output, top=not name):
                if bad := _bad(tensor):
                    rows = _rows(tensor, self.batch_size)
                    self.found = (name, type(module).__name__, tensor.numel(), bad, rows)
                    return

        return look


def _tensors(value: Any, *, top: bool = False) -> Iterator[torch.Tensor]:
    """Every tensor in a module's output; of the whole model's, all but its loss."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            if not (top and name == "loss"):
                yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            if not (top and isinstance(item, torch.Tensor) and not item.ndim):
                yield from _tensors(item)


def _batch_size(inputs: Mapping[str, Any]) -> int:
    return next((len(v) for v in inputs.values() if isinstance(v, torch.Tensor) and v.ndim), 0)


def _wrong(tensor: torch.Tensor, masks: bool) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.isnan() | tensor.isposinf() if masks else ~tensor.isfinite()


def _bad(tensor: torch.Tensor, *, masks: bool = True) -> int:
    """How many numbers are NaN or infinite; with `masks`, minus infinity is fine."""
    if not tensor.is_floating_point() or tensor.is_sparse:
        return 0
    return int(_wrong(tensor, masks).sum())


def _rows(tensor: torch.Tensor, size: int) -> tuple[int, ...]:
    """Batch rows with such a number; none where the tensor does not lead with rows, or all do."""
    if tensor.ndim == 0 or tensor.shape[0] != size:
        return ()
    wrong = _wrong(tensor, masks=True).reshape(size, -1).any(dim=1)
    return tuple(wrong.nonzero().flatten().tolist()[:64])


def told(origin: NonFiniteOrigin) -> str:
    """Where it began, in words; "" where that was not found."""
    if not origin.where:
        return ""
    what = {
        "parameter": f"the weights of {origin.name} were not finite before the step",
        "input": f"the input {origin.name} is not finite",
        "output": f"it began in the output of {origin.name or 'the model'} ({origin.module})",
        "labels": "no label of the batch counts, so that their mean is 0 / 0",
        "loss": "it began in the loss: the model's outputs are finite",
        "gradient": f"it began in the backward pass: gradient of {origin.name}",
    }[origin.where]
    rows = f", batch rows {', '.join(map(str, origin.batch_rows[:8]))}" if origin.batch_rows else ""
    return f"{what} ({origin.bad:,} of {origin.numbers:,} numbers{rows})"


# What mends it, by where it began; elsewhere the check's own line holds.
FIXES = {
    "parameter": "TrainingArguments(..., learning_rate=args.learning_rate / 10, max_grad_norm=1.0)",
    "input": "dataset = dataset.filter(lambda row: isfinite(row[column]).all())",
    "labels": "look at batch['labels']: does the response template occur, is max_length enough?",
    "loss": "F.cross_entropy(logits, labels)  # for log(softmax(x)); or log(p.clamp_min(1e-8))",
    "gradient": "(x + 1e-8).sqrt()  # sqrt, norm, x / std and arccos have no slope at their edge",
}
# Errors of other checks that this one follows from, where it began there.
FOLLOWS = {"input": "missing-value", "labels": "labels-masked"}


def began_in(origin: NonFiniteOrigin) -> Iterator[Fault]:
    """Say which tensor was the first that was not finite."""
    if not origin.where:
        return
    at = f" at step {origin.step}" if origin.step is not None else ""
    yield Fault(
        f"the training loss is not finite{at}; {told(origin)}",
        fix=FIXES.get(origin.where),
        evidence={
            "seen": f"{origin.where} {origin.name}".strip(),
            "expected": "finite",
            "bad": origin.bad,
            "numbers": origin.numbers,
            "follows_from": FOLLOWS.get(origin.where),
        },
    )


def find_origin(subject: Subject) -> Iterator[NonFiniteOrigin]:
    """Yield where ``subject.first_inputs``, a step's real inputs, lead to NaN or infinity."""
    if subject.first_inputs is None:
        raise Skip("the inputs of the step are gone")
    yield first_nonfinite(
        subject.model,
        subject.first_inputs,
        subject.loss_function,
        step=subject.step,
    )


FIND_ORIGIN = Probe(
    name="find where NaN began",
    moment="run",
    measures=(NonFiniteOrigin,),
    take=find_origin,
    needs=("unsharded",),
)
