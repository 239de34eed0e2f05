"""What goes into the loss: shapes that broadcast, and probabilities in the place of logits.

Predictions of shape (rows, 1) against labels of shape (rows,) make a table of every prediction
against every label: the loss falls to the labels' variance and stays there. A softmax in front of
a cross-entropy leaves a floor far above zero; without the logarithm that nll_loss leaves to its
caller, the surest rows teach the least. All are seen in the operands of one pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from hf_recipe.baselines.loss_pairs import pairs_mixed
from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.batches import Batch
from hf_recipe.instruments.overrides import asks_for_training
from hf_recipe.instruments.subject import Subject
from hf_recipe.instruments.trace import few_rows, trace

ELEMENTWISE = {
    functional.mse_loss: "mse_loss",
    functional.l1_loss: "l1_loss",
    functional.smooth_l1_loss: "smooth_l1_loss",
    functional.huber_loss: "huber_loss",
    functional.binary_cross_entropy: "binary_cross_entropy",
    functional.binary_cross_entropy_with_logits: "binary_cross_entropy_with_logits",
}
ARITHMETIC = {
    torch.sub: "-",
    torch.Tensor.sub: "-",
    torch.Tensor.__sub__: "-",
    torch.Tensor.__rsub__: "-",
    torch.rsub: "-",
    torch.mul: "*",
    torch.Tensor.mul: "*",
    torch.Tensor.__mul__: "*",
    torch.Tensor.__rmul__: "*",
}
EXPECTING_LOGITS = {
    functional.cross_entropy: "cross_entropy",
    functional.binary_cross_entropy_with_logits: "binary_cross_entropy_with_logits",
    functional.log_softmax: "log_softmax",
    torch.log_softmax: "log_softmax",
    torch.Tensor.log_softmax: "log_softmax",
}
EXPECTING_LOGARITHMS = {functional.nll_loss: "nll_loss", functional.kl_div: "kl_div"}
SQUASHING = ("SoftmaxBackward", "SigmoidBackward")
RESHAPING = (
    "View", "Reshape", "Squeeze", "Unsqueeze", "ToCopy", "Clone", "Transpose", "Permute",
    "TBackward", "Select", "Slice", "Alias", "Expand", "Index", "Split",
)  # fmt: skip


@dataclass(frozen=True)
class Operands(Measurement):
    """Two tensors that met in a loss and broadcast to more than either.

    Attributes:
        where: "mse_loss", ..., or "-" and "*" for arithmetic with the labels.
        prediction, target, result: their shapes.
        rows: in the batch.
    """

    where: tuple[str, ...]
    prediction: tuple[tuple[int, ...], ...]
    target: tuple[tuple[int, ...], ...]
    rows: int


@dataclass(frozen=True)
class LogitsGiven(Measurement):
    """What went where logits, or log-probabilities, are expected.

    Attributes:
        seen: calls that expect them.
        where: those of them that got probabilities.
        made_by: "softmax" or "sigmoid" where the graph shows it, "values" where only the numbers
            do (in [0, 1], adding up to 1); one per call.
        outputs: number of classes.
    """

    seen: int
    where: tuple[str, ...] = ()
    made_by: tuple[str, ...] = ()
    outputs: int = 0


class OperandWatch:
    """Shown every torch function of a pass, keeps what concerns the loss."""

    def __init__(self, batch: Batch) -> None:
        self.rows = len(batch)
        labels = batch.labels
        self.labels = labels if isinstance(labels, torch.Tensor) else None
        self.broadcast: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
        self.seen = 0
        self.squashed: list[tuple[str, str, int]] = []

    def __call__(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Look at one call before it runs."""
        try:
            kind = ELEMENTWISE.get(function) or ARITHMETIC.get(function)
            expects = EXPECTING_LOGITS.get(function) or EXPECTING_LOGARITHMS.get(function)
        except TypeError:  # not hashable
            return
        if kind is not None:
            self._shapes(function, kind, args, kwargs)
        if expects is not None:
            self._logits(function, expects, args, kwargs)

    def _shapes(
        self, function: Any, kind: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        pair = [*args[:2], *(kwargs[k] for k in ("input", "target", "other") if k in kwargs)][:2]
        if len(pair) < 2 or not all(isinstance(x, torch.Tensor) for x in pair):
            return
        a, b = pair
        if a.shape == b.shape or not a.ndim or not b.ndim:
            return
        if function in ARITHMETIC:
            if b.requires_grad and not a.requires_grad:
                a, b = b, a
            meet = a.requires_grad and self._is_label(b) and a.ndim != b.ndim
            if not meet:
                return
        try:
            size = math.prod(np.broadcast_shapes(tuple(a.shape), tuple(b.shape)))
        except ValueError:  # the call itself will say so
            return
        if size > max(a.numel(), b.numel()):
            self.broadcast.append((kind, tuple(a.shape), tuple(b.shape)))

    def _is_label(self, tensor: torch.Tensor) -> bool:
        labels = self.labels
        return (
            labels is not None
            and not tensor.requires_grad
            and tensor.numel() == labels.numel()
            and tensor.numel() > 1
            and bool((tensor.reshape(-1) == labels.reshape(-1).to(tensor.device)).all())
        )

    def _logits(
        self, function: Any, where: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        given = args[0] if args else kwargs.get("input")
        if not isinstance(given, torch.Tensor) or not given.is_floating_point():
            return
        if where == "log_softmax" and not given.requires_grad:
            return
        self.seen += 1
        values = given.detach().float()
        if not values.numel() or not bool(((values >= 0) & (values <= 1)).all()):
            return
        made_by = squashed_by(given)
        by_class = function in (functional.cross_entropy, functional.nll_loss)
        axis = 1 if by_class and given.ndim > 1 else -1
        count = values.shape[axis] if values.ndim else 1
        sums = values.sum(axis) if values.ndim else values
        if made_by is None and where != "binary_cross_entropy_with_logits" and count > 1:
            made_by = "values" if bool(((sums - 1).abs() < 1e-3).all()) else None
        if made_by is not None:
            self.squashed.append((where, made_by, int(count)))


def squashed_by(tensor: torch.Tensor) -> str | None:
    """ "softmax" or "sigmoid" if that is what made `tensor`, changes of shape left aside."""
    node = tensor.grad_fn
    while node is not None:
        name = node.name()
        if name.startswith(SQUASHING):
            return "softmax" if name.startswith("Softmax") else "sigmoid"
        if not name.startswith(RESHAPING) or not node.next_functions:
            return None
        node = node.next_functions[0][0]
    return None


def measure_operands(subject: Subject) -> Iterator[Operands | LogitsGiven]:
    """One forward pass with its loss, every torch function of it looked at."""
    batch = few_rows(subject)
    if batch.labels is None:
        raise Skip("the batch has no labels under a known name")
    watch = OperandWatch(batch)
    trace(subject, batch, watchers=(watch,), grasp=False)
    if subject.trainer is not None and asks_for_training(subject.trainer):
        trace(subject, batch, watchers=(watch,), grasp=False, training=True)
    broadcast = list(dict.fromkeys(watch.broadcast))
    yield Operands(
        where=tuple(where for where, _, _ in broadcast),
        prediction=tuple(shape for _, shape, _ in broadcast),
        target=tuple(shape for _, _, shape in broadcast),
        rows=len(batch),
    )
    yield LogitsGiven(
        seen=watch.seen,
        where=tuple(where for where, _, _ in watch.squashed),
        made_by=tuple(made for _, made, _ in watch.squashed),
        outputs=max((count for _, _, count in watch.squashed), default=0),
    )


# ---------------------------------------------------------------- the checks


def shapes_broadcast(operands: Operands) -> Iterator[Fault]:
    """Predictions and labels make a table instead of pairs."""
    if not operands.where or operands.rows < 2:
        return
    where, prediction, target = operands.where[0], operands.prediction[0], operands.target[0]
    yield Fault(
        f"{where} of shapes {prediction} and {target} compares every row with every other",
        evidence={
            "seen": f"{prediction} and {target}",
            "expected": "equal shapes",
            "rows": operands.rows,
        },
        fix="loss = F.mse_loss(logits.squeeze(-1), labels)  # equal shapes"
        if where in ("mse_loss", "-")
        else None,
    )


def probabilities_given(given: LogitsGiven) -> Iterator[Fault]:
    """Probabilities in the place of logits, or of their logarithms."""
    if not given.where:
        return
    where, made_by = given.where[0], given.made_by[0]
    what = {"softmax": "a softmax's output", "sigmoid": "a sigmoid's output"}.get(
        made_by, "numbers in [0, 1] that add up to 1"
    )
    expected, fix = "logits", "return logits  # no softmax or sigmoid: the loss applies its own"
    if where in EXPECTING_LOGARITHMS.values():
        expected, fix = "log-probabilities", f"F.{where}(logits.log_softmax(-1), ...)  # the log"
    yield Fault(
        f"{where} expects {expected} and gets {what}",
        evidence={"seen": what, "expected": expected, "outputs": given.outputs},
        fix=fix,
    )


WATCH_OPERANDS = Probe(
    "watch the loss's operands", "probe", (Operands, LogitsGiven), measure_operands
)

LOSS_BROADCAST = Check(
    name="loss-broadcast",
    stage="baselines",
    severity="error",
    moments=("probe",),
    why="Every prediction is then pulled to every label: the model learns their mean.",
    fix="loss = F.mse_loss(logits.squeeze(-1), labels)  # equal shapes",
    source="transformers issues 11583 and 11780 (2021); torch.nn.functional.mse_loss warns (2025)",
    unsure="Losses written with other operations than differences and products are not seen.",
    judges=(shapes_broadcast, pairs_mixed),
    explains=(
        "one-batch-not-overfit",
        "input-ignored",
        "initial-loss-unexpected",
        "loss-not-decreasing",
        "padded-loss-differs",
    ),
)

DOUBLE_SOFTMAX = Check(
    name="double-softmax",
    stage="baselines",
    severity="error",
    moments=("probe",),
    why="A second softmax leaves a floor far above 0 (1.46 at ten classes) and faint gradients.",
    fix="return logits  # no softmax or sigmoid: the loss applies its own",
    source="Karpathy, most common neural net mistakes, 2018; UMLAUT, 2021",
    unsure="A log_softmax in front of a cross-entropy changes nothing and is left in peace.",
    judges=(probabilities_given,),
    explains=("one-batch-not-overfit", "initial-loss-unexpected", "input-ignored"),
)
