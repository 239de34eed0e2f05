"""One pass of a few rows with its graph kept: what the outputs and the loss depend on.

Token ids cannot be differentiated for, so the output of every embedding that reads them is taken
in their place. Embeddings are met where they are looked up, not where they are declared: a model
may tie two of them, call one twice (encoder and decoder) or be no HF model at all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from hf_recipe.core.check import Skip
from hf_recipe.instruments.batches import Batch
from hf_recipe.instruments.heads import bare
from hf_recipe.instruments.row_losses import logits_of
from hf_recipe.instruments.subject import Subject

ROWS = 4
NO_SOURCE = ("mask", "label", "target", "position", "weight", "token_type")
Watcher = Callable[[Any, Sequence[Any], Mapping[str, Any]], None]


@dataclass(frozen=True)
class Leaf:
    """Something in the batch that the outputs can be differentiated for.

    Attributes:
        name: of the input; "embedded ids" where looked-up ids are none of the inputs.
        tensor: a floating-point input, or what an embedding made of integer ones.
        ids: the integers that were looked up; None for a floating-point input.
    """

    name: str
    tensor: torch.Tensor
    ids: torch.Tensor | None = None


@dataclass
class Trace:
    """A pass in evaluation mode, its graph kept.

    Attributes:
        batch: the rows.
        loss: as the Trainer computes it.
        outputs: what the model returned; None where it was not called exactly once.
        received: the arguments that reached the model, by name.
        leaves: what can be differentiated for, in the order of their use.
    """

    batch: Batch
    loss: torch.Tensor
    outputs: Any
    received: dict[str, Any]
    leaves: list[Leaf] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Rows of the batch's own tensors (a flattened batch of many examples has one)."""
        tensors = [v for v in self.batch.inputs.values() if isinstance(v, torch.Tensor) and v.ndim]
        return int(tensors[0].shape[0]) if tensors else 0

    @property
    def logits(self) -> torch.Tensor | None:
        """The model's predictions, or None where they cannot be told from its other outputs."""
        if isinstance(self.outputs, torch.Tensor):
            return self.outputs
        found = logits_of(self.outputs)
        return found if found is not None and found.is_floating_point() else None

    @property
    def token_leaf(self) -> Leaf | None:
        """The embedded tokens that the logits run along: (rows, positions, width)."""
        logits = self.logits
        if logits is None:
            return None
        fitting = [
            leaf
            for leaf in self.leaves
            if leaf.ids is not None
            and leaf.ids.ndim == 2
            and leaf.tensor.ndim == 3
            and leaf.tensor.shape[:2] == logits.shape[:2]
        ]
        return fitting[-1] if fitting else None

    def gradients(self, scalar: torch.Tensor) -> list[torch.Tensor | None]:
        """The size of the gradient of `scalar` for each leaf: (rows, rest), float.

        Raises:
            Skip: it is not finite: NaN says nothing of what depends on what.
        """
        if not scalar.requires_grad:
            return [None for _ in self.leaves]
        found = torch.autograd.grad(
            scalar, [leaf.tensor for leaf in self.leaves], retain_graph=True, allow_unused=True
        )
        sizes: list[torch.Tensor | None] = [
            None if g is None else g.detach().float().abs() for g in found
        ]
        if not all(g is None or bool(g.isfinite().all()) for g in sizes):
            raise Skip("gradients are not finite: weights, inputs or outputs hold NaN or infinity")
        return sizes

    def along(self, leaf: Leaf, scalar: torch.Tensor) -> torch.Tensor:
        """The largest gradient of `scalar` on each token of `leaf`: (rows, positions).

        Raises:
            Skip: `scalar` does not depend on them at all.
        """
        index = next(i for i, other in enumerate(self.leaves) if other is leaf)
        gradient = self.gradients(scalar)[index]
        if gradient is None:
            raise Skip("the outputs do not depend on the embedded tokens")
        return gradient.amax(-1)


class _Reading(TorchFunctionMode):
    """Takes note of embedding look-ups, and shows every call to `watchers`."""

    def __init__(
        self, model: nn.Module, batch: Batch, watchers: Sequence[Watcher], grasp: bool
    ) -> None:
        super().__init__()
        embeddings = getattr(model, "get_input_embeddings", None)
        table = _table(embeddings) if callable(embeddings) else None
        self.table = table
        self.watchers, self.grasp = watchers, grasp
        self.leaves: list[Leaf] = []
        self.rows = len(batch)
        self.inputs = {
            name: value
            for name, value in batch.inputs.items()
            if isinstance(value, torch.Tensor)
            and not value.is_floating_point()
            and value.ndim
            and value is not batch.labels
            and not any(word in name for word in NO_SOURCE)
        }

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        for watch in self.watchers:
            watch(function, args, kwargs)
        made = function(*args, **kwargs)
        if not self.grasp or function is not functional.embedding:
            return made
        ids = args[0] if args else kwargs["input"]
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        name = self._name(ids, weight)
        if name is None:
            return made
        if not made.requires_grad:
            made.requires_grad_(True)
        self.leaves.append(Leaf(name, made, ids))
        return made.clone()  # a model may write into it

    def _name(self, ids: torch.Tensor, weight: torch.Tensor) -> str | None:
        for name, value in self.inputs.items():
            if value is ids or (
                value.numel() == ids.numel() and torch.equal(value.reshape(-1), ids.reshape(-1))
            ):
                return name
        if weight is self.table:
            return "embedded ids"
        lead = ids.shape[0] if ids.ndim else 0
        if self.table is not None or self.rows < 2 or lead != self.rows:
            return None
        return None if bool((ids == ids[:1]).all()) else "embedded ids"


def _table(embeddings: Callable[[], Any]) -> torch.Tensor | None:
    try:
        return getattr(embeddings(), "weight", None)
    except NotImplementedError:  # a model of transformers that embeds no tokens
        return None


def trace(
    subject: Subject,
    batch: Batch,
    *,
    watchers: Sequence[Watcher] = (),
    training: bool = False,
    grasp: bool = True,
    checkpointing: bool = False,
) -> Trace:
    """Run `batch` through the Trainer's loss and keep the graph.

    Args:
        watchers: shown every torch function that is called, before it runs.
        training: in training mode instead of evaluation.
        grasp: whether inputs are made differentiable.
        checkpointing: whether parts that are checkpointed in the reentrant way stay so: they can
            be gone back through by a whole backward pass alone.
    """
    model = subject.model
    if training:  # as the Trainer calls them: either may be the user's own
        model.train()
    else:
        model.eval()
    inputs = dict(batch.inputs)
    leaves: list[Leaf] = []
    for name, value in batch.inputs.items():
        if grasp and _differentiable(name, value, batch):
            leaf = value.detach().clone().requires_grad_(True)
            leaves.append(Leaf(name, leaf))
            inputs[name] = leaf.clone()
    returned: list[Any] = []
    received: list[dict[str, Any]] = []
    hooks = [
        model.register_forward_pre_hook(
            lambda module, args, kwargs: received.append({**_named(model, args), **kwargs}),
            with_kwargs=True,
        ),
        model.register_forward_hook(lambda module, args, output: returned.append(output)),
    ]
    reading = _Reading(model, batch, watchers, grasp)
    try:
        with nullcontext() if checkpointing else _straight(), reading:
            loss = subject.compute_loss(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    once = len(returned) == 1
    return Trace(
        batch,
        loss,
        returned[0] if once else None,
        received[0] if once else {},
        leaves + reading.leaves,
    )


@contextmanager
def _straight() -> Iterator[None]:
    """Reentrant checkpoints run their part as it is, so that its graph is there."""
    kind: Any = CheckpointFunction
    kind.apply = staticmethod(lambda function, preserve, *args: function(*args))
    try:
        yield
    finally:
        del kind.apply


def _named(model: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    names = inspect.signature(bare(model).forward).parameters
    return dict(zip(names, args, strict=False))


def _differentiable(name: str, value: Any, batch: Batch) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.ndim > 0
        and value is not batch.labels
        and not any(word in name for word in NO_SOURCE)
    )


def few_rows(subject: Subject, rows: int = ROWS) -> Batch:
    """A small batch: of the data set, or the first rows of the step that is under way.

    Never more rows than the run's own batch has, but two.
    """
    size = int(getattr(subject.args, "per_device_train_batch_size", rows))
    rows = max(2, min(rows, size))
    batch = subject.batch("train", size=rows)
    if subject.first_inputs is not None and len(batch) > rows:
        batch = batch.take(range(rows))
    if not batch.inputs:
        raise Skip("the batch is empty")
    return batch


def random_direction(logits: torch.Tensor) -> torch.Tensor:
    """What logits are projected on: a plain sum of them may cancel exactly."""
    shape = logits.shape[1:]
    return torch.randn(shape, device=logits.device).to(logits.dtype)
