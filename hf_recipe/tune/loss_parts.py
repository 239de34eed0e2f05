"""What a loss is made of: the `kl_div` and `cross_entropy` calls in it, seen while it is computed.

A distillation loss of the user's own has no arguments to read. Its calls of torch's functions tell
how it softens (the student's log-probabilities are its logits over T) and how it weighs (the
derivative of the loss by each call's result).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

CLOSE = 1e-2  # of a sum of probabilities in half precision
MOST = 2**20  # numbers that are looked at


class LossParts(TorchFunctionMode):
    """Notes the divergences and cross-entropies of the loss that is computed within it.

    Attributes:
        averaged: the largest number of classes that a `kl_div` averages over; 0: none does.
        misgiven: "input" or "target" where a `kl_div` is given no distributions there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.averaged, self.misgiven = 0, ""
        self._divergences: list[tuple[Tensor, Tensor]] = []
        self._entropies: list[Tensor] = []
        self._logits: list[Tensor] = []

    @contextmanager
    def watching(self, student: nn.Module) -> Iterator[None]:
        """While the loss is computed, of which `student` gives the logits."""
        hook = student.register_forward_hook(self._note)
        try:
            with self:
                yield
        finally:
            hook.remove()

    def _note(self, module: nn.Module, arguments: Any, outputs: Any) -> None:
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
        if isinstance(logits, Tensor):
            self._logits.append(logits.detach())

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        result = func(*args, **named)
        if func is functional.kl_div:
            self._divergence(result, *args, **named)
        elif func is functional.cross_entropy and result.requires_grad:  # a teacher's does not
            self._entropies.append(result)
        return result

    def _divergence(
        self,
        result: Tensor,
        input: Tensor,
        target: Tensor,
        size_average: Any = None,
        reduce: Any = None,
        reduction: str = "mean",
        log_target: bool = False,
    ) -> None:
        if reduction == "mean" and size_average is None and input.ndim > 1:
            self.averaged = max(self.averaged, input.shape[-1])
        if reduction == "batchmean":
            self._divergences.append((input.detach(), result))
        log_q, p = _few(input.detach()), _few(target.detach())
        given = {"input": log_q.exp(), "target": p.exp() if log_target else p}
        wrong = [name for name, values in given.items() if not _sums_to_one(values)]
        self.misgiven = self.misgiven or next(iter(wrong), "")

    def weights(self, loss: Tensor) -> dict[str, float]:
        """``temperature``, ``kl_weight`` and ``entropy_weight``; {} where the loss is another.

        Args:
            loss: with its graph, which stays.
        """
        if len(self._divergences) != 1 or len(self._entropies) != 1 or len(self._logits) != 1:
            return {}
        log_q, divergence = self._divergences[0]
        temperature = softened_by(self._logits[0], log_q)
        parts = (divergence, self._entropies[0])
        if temperature is None or not all(part.requires_grad and part.ndim == 0 for part in parts):
            return {}
        found = torch.autograd.grad(loss, parts, retain_graph=True, allow_unused=True)
        kl, entropy = (0.0 if g is None else float(g) for g in found)
        return {"temperature": temperature, "kl_weight": kl, "entropy_weight": entropy}


def softened_by(logits: Tensor, log_q: Tensor) -> float | None:
    """The T with which ``log_q`` is log_softmax(logits / T); None where there is none."""
    classes = logits.shape[-1]
    if log_q.shape[-1] != classes or log_q.numel() != logits.numel():
        return None
    z, q = (_few(x.reshape(-1, classes)).double() for x in (logits, log_q))
    z, q = (x - x.mean(-1, keepdim=True) for x in (z, q))
    scale = float((q * q).sum())
    temperature = float((z * q).sum()) / scale if scale > 0 else 0.0
    apart = (z - temperature * q).abs().max()
    return temperature if temperature > 0 and bool(apart <= CLOSE * z.abs().max()) else None


def _few(values: Tensor) -> Tensor:
    """The first rows of a tensor, so many as are looked at without a burden."""
    return values[: max(1, MOST * len(values) // max(values.numel(), 1))]


def _sums_to_one(values: Tensor) -> bool:
    """Whether most of the slices along some axis are distributions; masked ones may be none."""
    if values.numel() == 0:
        return True
    shares = [
        float(((values.sum(axis) - 1).abs() < CLOSE).double().mean()) for axis in range(values.ndim)
    ]
    return bool((values > -CLOSE).all()) and max(shares, default=1.0) >= 0.5
