"""Where a student and its teacher meet: which outputs, at which positions, in which space.

Pure functions over configs, batches and outputs. They know four kinds of head:

    classes     one distribution per row, position or pixel (logits, channels first for images)
    spans       start and end of an answer (question answering)
    values      numbers (regression)
    bernoulli   independent yes-or-no outputs (multi-label)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_recipe.tune.distillation_loss import (
    bernoulli_divergence,
    divergence,
    mixture_logits,
    standardized,
)

Kind = Literal["classes", "spans", "values", "bernoulli"]
Logits = Mapping[str, Tensor]
IGNORED = -100


@dataclass(frozen=True)
class Task:
    """What a batch of this student supervises.

    Attributes:
        kind: the head.
        shift: the logits at position i are trained on the label at i + 1.
        per_position: positions are supervised one by one, also where there are no labels.
        ignored: the label that marks what is not supervised.
    """

    kind: Kind
    shift: bool = False
    per_position: bool = False
    ignored: int = IGNORED

    def labels(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """The labels aligned with `align`-ed logits, or None."""
        labels = inputs.get("shift_labels")
        if labels is None:
            labels = inputs.get("labels")
            if isinstance(labels, Tensor) and self.shift:
                labels = labels[..., 1:]
        return labels if isinstance(labels, Tensor) else None

    def mask(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Which positions or pixels are supervised; None: every row, labelled or not."""
        labels = self.labels(inputs)
        if self.kind != "classes":
            return None
        if labels is not None and labels.ndim > 1:
            supervised: Tensor = labels.ne(self.ignored)
            return supervised
        if not self.per_position:
            return None
        attended = inputs.get("attention_mask")
        if attended is None:
            attended = torch.ones_like(inputs["input_ids"])
        seen: Tensor = attended[..., 1:] if self.shift else attended
        return seen.bool()

    def items(self, inputs: Mapping[str, Any]) -> Tensor:
        """How many rows or positions the batch supervises: what a mean is taken over."""
        mask = self.mask(inputs)
        return torch.tensor(batch_rows(inputs)) if mask is None else mask.sum()

    def labelled(self, inputs: Mapping[str, Any]) -> Tensor:
        """How many of these items carry a label."""
        labels = self.labels(inputs)
        if self.kind == "spans":
            starts = inputs.get("start_positions")
            if starts is None:
                return torch.tensor(0)
            return torch.sum(starts < inputs["input_ids"].shape[-1])
        if labels is None:
            return torch.tensor(0)
        if labels.is_floating_point():
            return labels.isfinite().reshape(labels.shape[0], -1).all(-1).sum()
        if self.kind == "classes":
            return (labels != self.ignored).sum()
        return torch.tensor(labels.shape[0])

    def align(self, logits: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Logits with their classes last, one row of them for every position of the mask."""
        if logits.ndim == 4:  # (batch, classes, height, width), coarser than the labels
            labels = inputs.get("labels")
            if labels is not None and logits.shape[-2:] != labels.shape[-2:]:
                size = labels.shape[-2:]
                logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
            return logits.movedim(1, -1)
        if self.shift and inputs.get("shift_labels") is None:
            return logits[..., :-1, :]
        return logits


def task_of(model: nn.Module, inputs: Mapping[str, Any]) -> Task:
    """What `model` is trained to do with such a batch, by its class, config and labels."""
    config, name = getattr(model, "config", None), type(model).__name__
    names = {kind.__name__ for kind in type(model).__mro__}
    if "start_positions" in inputs or name.endswith("ForQuestionAnswering"):
        return Task("spans")
    labels, problem = inputs.get("labels"), getattr(config, "problem_type", None)
    numbers = isinstance(labels, Tensor) and labels.is_floating_point()
    single = getattr(config, "num_labels", 2) == 1
    if problem == "regression" or (single and (numbers or name.endswith("Classification"))):
        return Task("values")
    if problem == "multi_label_classification" or numbers:
        return Task("bernoulli")
    ignored = IGNORED
    if name.endswith("ForSemanticSegmentation"):
        ignored = int(getattr(config, "semantic_loss_ignore_index", 255))
    return Task("classes", shifts_labels(model), bool(names & _positional_names()), ignored)


def shifts_labels(model: nn.Module) -> bool:
    """Whether the model's own loss moves the labels one position to the left."""
    from transformers.models.auto import modeling_auto as auto

    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return False
    causal = set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    names = {kind.__name__ for kind in type(model).__mro__}
    return bool(names & causal) or getattr(model, "loss_type", "") == "ForCausalLM"


def _positional_names() -> set[str]:
    from transformers.models.auto import modeling_auto as auto

    mappings = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )
    return {name for mapping in mappings for name in mapping.values()}


def batch_rows(inputs: Mapping[str, Any]) -> int:
    """Rows of a batch: the leading axis of its first tensor."""
    for value in inputs.values():
        if isinstance(value, Tensor) and value.ndim:
            return int(value.shape[0])
    raise ValueError(f"the batch holds no tensor, only {', '.join(inputs) or 'nothing'}")


def logits_of(outputs: Any, kind: Kind) -> dict[str, Tensor]:
    """The named logits of a model's outputs."""
    names = ("start_logits", "end_logits") if kind == "spans" else ("logits",)
    if not isinstance(outputs, Mapping):  # a tuple, a loss in front or not, or the bare tensor
        found = [outputs] if isinstance(outputs, Tensor) else [x for x in outputs if _is_table(x)]
        outputs = dict(zip(names, found, strict=False))
    missing = [name for name in names if outputs.get(name) is None]
    if missing:
        raise ValueError(
            f"distillation needs {missing[0]} in the outputs; the model returns "
            f"{', '.join(outputs.keys())}"
        )
    return {name: outputs[name] for name in names}


def _is_table(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def soft_loss(
    task: Task,
    student: Logits,
    teacher: Logits,
    inputs: Mapping[str, Any],
    *,
    num_items: Tensor | float | None = None,
    standardize: bool = False,
    **options: Any,
) -> Tensor:
    """The mean (or sum / num_items) over supervised items of how far student is from teacher.

    Args:
        task: what the batch supervises.
        student, teacher: logits by name.
        standardize: compare each row's logits at mean 0 and standard deviation 1.
        options: those of `divergence`.

    Raises:
        ValueError: logits that the labels are not aligned with.
    """
    if task.kind == "spans":
        attended = inputs.get("attention_mask")
        terms = []
        for name in ("start_logits", "end_logits"):
            pair = [
                x if attended is None else x.masked_fill(attended == 0, -torch.inf)
                for x in (student[name], teacher[name])
            ]
            terms.append(divergence(pair[0], pair[1], num_items=num_items, **options))
        return (terms[0] + terms[1]) / 2
    z, t = student["logits"], teacher["logits"]
    if task.kind == "values":
        if z.shape != t.shape:
            raise ValueError(f"student gives {tuple(z.shape)}, its teacher {tuple(t.shape)}")
        squares = (z.float() - t.float()).square().reshape(z.shape[0], -1).mean(-1)
        return squares.sum() / (max(z.shape[0], 1) if num_items is None else num_items)
    if task.kind == "bernoulli":
        return bernoulli_divergence(z, t, num_items=num_items, **options)
    mask = task.mask(inputs)
    z, t = task.align(z, inputs), task.align(t, inputs)
    if mask is not None and mask.shape != z.shape[:-1]:
        raise ValueError(
            f"labels {tuple(mask.shape)} do not lie on the logits' positions {tuple(z.shape[:-1])}"
        )
    if standardize:
        z, t = standardized(z), standardized(t)
    return divergence(z, t, mask, num_items=num_items, **options)


def merged(
    kind: Kind, each: Sequence[Logits], weights: list[float] | None = None
) -> dict[str, Tensor]:
    """Several teachers as one: probabilities averaged, numbers averaged; logits by name."""
    if len(each) == 1:
        return dict(each[0])
    shares = weights or [1.0] * len(each)
    names = each[0].keys()
    if kind == "values":
        total = sum(shares)
        return {n: sum(w / total * x[n] for w, x in zip(shares, each, strict=True)) for n in names}  # type: ignore[misc]
    if kind == "bernoulli":
        pairs = [{n: torch.stack([x[n], torch.zeros_like(x[n])], -1) for n in names} for x in each]
        mixed = {n: mixture_logits([x[n] for x in pairs], shares) for n in names}
        return {n: x[..., 0] - x[..., 1] for n, x in mixed.items()}
    if each[0][next(iter(names))].ndim == 4:  # channels first
        moved = {n: mixture_logits([x[n].movedim(1, -1) for x in each], shares) for n in names}
        return {n: x.movedim(-1, 1) for n, x in moved.items()}
    return {n: mixture_logits([x[n] for x in each], shares) for n in names}


def smoothed_loss(
    task: Task, logits: Tensor, inputs: Mapping[str, Any], smoothing: float
) -> Tensor:
    """The mean cross-entropy over what is labelled, with smoothed labels.

    Raises:
        ValueError: labels that are no classes.
    """
    labels = task.labels(inputs)
    if task.kind != "classes" or labels is None:
        raise ValueError("label_smoothing_factor smooths classes; these labels are numbers")
    labelled = labels != task.ignored
    z = task.align(logits, inputs)[labelled]
    return F.cross_entropy(z.float(), labels[labelled], label_smoothing=smoothing)


def labelled_loss(task: Task, logits: Tensor, labels: Tensor) -> Tensor:
    """The plain loss over rows with labels alone, where NaN marks a missing number."""
    rows = labels.isfinite().reshape(labels.shape[0], -1).all(-1)
    z, y = logits[rows].float(), labels[rows].float()
    if task.kind == "bernoulli":
        return F.binary_cross_entropy_with_logits(z, y)
    return F.mse_loss(z.reshape(y.shape), y)
