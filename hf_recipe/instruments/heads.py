"""What a model's head predicts, row by row: logits aligned with their labels, for any head.

A head is read from what one batch gave: the outputs, the labels in the inputs, the class of the
model and its config. Where a class says nothing (a custom module), the shapes decide, and between
"position t predicts label t" and "position t predicts label t+1" the reading that reproduces the
loss that was observed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from hf_recipe.core.check import Skip

SOFTMAX, BINARY, REGRESSION = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)
UNEVEN_TASKS = ("causal", "masked", "seq2seq", "tokens", "segmentation")  # words; "none" rules
Rebuild = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Head:
    """The supervised rows of one batch.

    Attributes:
        task: "classification", "tokens", "causal", "masked", "seq2seq", "choice", "span",
            "segmentation", "contrastive", "multi-label" or "regression".
        problem_type: which loss: softmax, binary (one per output) or squared error.
        logits: (rows, outputs), float; only rows that are supervised.
        labels: (rows,) class indices, or (rows, outputs) floats.
        groups: (rows,) the example of the batch each row came from.
        smoothing: label smoothing that the run applies.
        raw: the tensor that the output layer makes, as the model returned it.
        rebuild: another such tensor -> logits of the same rows.
        auxiliary: part of the loss that is not the head's (router loss).
    """

    task: str
    problem_type: str
    logits: torch.Tensor
    labels: torch.Tensor
    groups: torch.Tensor
    raw: torch.Tensor
    rebuild: Rebuild
    smoothing: float = 0.0
    auxiliary: float = 0.0

    def row_losses(self, logits: torch.Tensor | None = None) -> torch.Tensor:
        """The loss of each row, (rows,): nats, or squared error; mean over a row's outputs."""
        z = self.logits if logits is None else logits
        if self.problem_type == SOFTMAX:
            return functional.cross_entropy(
                z, self.labels, reduction="none", label_smoothing=self.smoothing
            )
        if self.problem_type == BINARY:
            return functional.binary_cross_entropy_with_logits(
                z, self.labels, reduction="none"
            ).mean(-1)
        return (z - self.labels).square().mean(-1)

    def loss(self, logits: torch.Tensor | None = None) -> float:
        """Mean over the supervised rows, without the auxiliary part."""
        return float(self.row_losses(logits).double().mean())


def bare(model: nn.Module) -> nn.Module:
    """The model under an adapter's wrapper."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def read_head(
    model: nn.Module,
    inputs: Mapping[str, Any],
    outputs: Any,
    *,
    smoothing: float = 0.0,
    observed: float | None = None,
    prefer: str = "",
) -> Head:
    """Align what the model returned for `inputs` with its labels.

    Args:
        model: the module that was run; adapters' wrappers are looked through.
        inputs: the batch, labels included.
        outputs: what the forward returned: a mapping, a tuple or a tensor.
        smoothing: ``args.label_smoothing_factor``.
        observed: the loss that was observed; settles readings that the shapes leave open.
        prefer: the task as it was read before; settles them too.

    Raises:
        Skip: no logits, no labels, or shapes that fit no known head.
    """
    if isinstance(outputs, Mapping):
        if outputs.get("logits_per_image") is not None and "labels" not in inputs:
            return _contrastive(outputs["logits_per_image"])
        if "start_positions" in inputs and outputs.get("start_logits") is not None:
            return _span(inputs, outputs)
    labels = _labels(inputs)
    if labels is None:
        raise Skip("the batch has no labels that the loss at the start could be expected from")
    logits = _logits(outputs, labels)
    if logits is None:
        raise Skip("the model returns no logits, so the expected loss cannot be told")
    heads = _readings(bare(model), logits, labels.to(logits.device), smoothing)
    heads = [h for h in heads if len(h.labels)]
    if not heads:
        raise Skip("no position of the batch is supervised")
    auxiliary = _auxiliary(model, outputs)
    if smoothing:  # a compute_loss of the user's own may not apply what the arguments say
        heads += [replace(h, smoothing=0.0) for h in heads]
    heads.sort(key=lambda h: h.task != prefer)
    if len(heads) > 1 and observed is not None:
        heads.sort(key=lambda h: abs(h.loss() + auxiliary - observed))
    return replace(heads[0], auxiliary=auxiliary)


def _labels(inputs: Mapping[str, Any]) -> torch.Tensor | None:
    for name in ("labels", "label", "label_ids", "targets", "target", "y"):
        labels = inputs.get(name)
        if isinstance(labels, torch.Tensor):
            return labels.detach()
    return None


def _logits(outputs: Any, labels: torch.Tensor) -> torch.Tensor | None:
    """The logits among the outputs: by name, else the first that has a row per label."""
    if isinstance(outputs, torch.Tensor):
        return outputs.detach()
    if isinstance(outputs, Mapping):
        for name in ("logits", "prediction_logits", "scores", "predictions", "prediction"):
            named = outputs.get(name)
            if isinstance(named, torch.Tensor):
                return named.detach()
        values: Any = outputs.values()
    elif isinstance(outputs, (tuple, list)):
        values = outputs
    else:
        return None
    for value in values:
        made = isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim
        if made and labels.ndim and value.shape[0] == labels.shape[0]:
            logits: torch.Tensor = value.detach()
            return logits
    return None


def _auxiliary(model: nn.Module, outputs: Any) -> float:
    """The router's share of a mixture-of-experts loss, where the model adds it."""
    if not isinstance(outputs, Mapping) or outputs.get("aux_loss") is None:
        return 0.0
    weight = getattr(getattr(model, "config", None), "router_aux_loss_coef", 0.0) or 0.0
    return float(weight) * float(outputs["aux_loss"])


def _readings(
    model: nn.Module, logits: torch.Tensor, labels: torch.Tensor, smoothing: float
) -> list[Head]:
    """Every reading that shapes and class leave open, the likeliest first."""
    config = getattr(model, "config", None)
    declared = getattr(config, "problem_type", None)
    name = type(model).__name__
    if name.endswith("ForCTC"):
        raise Skip("a CTC loss sums over alignments: its start is not a mean over rows")
    single = logits.ndim <= 1 or logits.shape[-1] == 1
    if declared == REGRESSION or (single and labels.numel() == logits.numel()):
        return [_floats(logits, labels, REGRESSION)]
    if labels.is_floating_point() and labels.shape == logits.shape:
        return [_floats(logits, labels, declared or BINARY)]
    if labels.is_floating_point():
        raise Skip(f"labels {_shape(labels)} are no targets for outputs {_shape(logits)}")
    if logits.ndim == 4 and labels.ndim == 3:
        return [_segmentation(config, logits, labels, smoothing)]
    if labels.ndim == logits.ndim == 2 and labels.shape[-1] == 1:
        labels = labels[:, 0]
    if labels.shape == logits.shape[:-1]:
        if labels.ndim == 1:
            task = "choice" if name.endswith("ForMultipleChoice") else "classification"
            return [_softmax(task, logits, labels, smoothing)]
        return _sequences(model, logits, labels, smoothing)
    raise Skip(f"labels {_shape(labels)} do not fit logits {_shape(logits)}")


def _sequences(
    model: nn.Module, logits: torch.Tensor, labels: torch.Tensor, smoothing: float
) -> list[Head]:
    name, config = type(model).__name__, getattr(model, "config", None)
    encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    causal_names = ("CausalLM", "LMHeadModel", "ForConditionalGeneration")
    straight = _softmax("tokens", logits, labels, smoothing)
    if encoder_decoder:
        return [replace(straight, task="seq2seq")]
    if "MaskedLM" in name:
        return [replace(straight, task="masked")]
    if name.endswith("ForTokenClassification"):
        return [straight]
    shifted = _softmax("causal", logits, labels, smoothing, shift=True)
    if any(part in name for part in causal_names):
        return [shifted]
    return [straight, shifted]


def _softmax(
    task: str, logits: torch.Tensor, labels: torch.Tensor, smoothing: float, shift: bool = False
) -> Head:
    if shift:
        labels = labels[..., 1:]
    keep = (labels != -100).reshape(-1)
    groups = torch.arange(len(labels), device=labels.device)
    groups = groups.reshape(-1, *[1] * (labels.ndim - 1)).expand(labels.shape).reshape(-1)

    def rebuild(raw: torch.Tensor) -> torch.Tensor:
        raw = raw.reshape(logits.shape)
        raw = raw[..., :-1, :] if shift else raw
        return raw.reshape(-1, raw.shape[-1])[keep].float()

    y = labels.reshape(-1)[keep].long()
    if len(y) and (int(y.min()) < 0 or int(y.max()) >= logits.shape[-1]):
        raise Skip("a label lies outside the head's outputs")
    return Head(
        task, SOFTMAX, rebuild(logits), y, groups[keep], logits, rebuild, smoothing=smoothing
    )


def _floats(logits: torch.Tensor, labels: torch.Tensor, problem_type: str) -> Head:
    if labels.numel() != logits.numel():
        raise Skip(f"labels {_shape(labels)} are no targets for outputs {_shape(logits)}")
    outputs = logits.shape[-1] if logits.ndim > 1 else 1
    y = labels.reshape(-1, outputs).float()
    keep = (torch.isfinite(y) & (y != -100)).all(-1)
    per_example = len(y) // max(len(labels), 1)
    groups = torch.arange(len(y), device=y.device) // max(per_example, 1)

    def rebuild(raw: torch.Tensor) -> torch.Tensor:
        return raw.reshape(-1, outputs)[keep].float()

    task = "regression" if problem_type == REGRESSION else "multi-label"
    return Head(task, problem_type, rebuild(logits), y[keep], groups[keep], logits, rebuild)


def _segmentation(
    config: Any, logits: torch.Tensor, labels: torch.Tensor, smoothing: float
) -> Head:
    ignored = getattr(config, "semantic_loss_ignore_index", -100)
    keep = ((labels != ignored) & (labels != -100)).reshape(-1)
    groups = torch.arange(len(labels), device=labels.device)[:, None, None].expand(labels.shape)

    def rebuild(raw: torch.Tensor) -> torch.Tensor:
        raw = raw.reshape(logits.shape).float()
        if raw.shape[-2:] != labels.shape[-2:]:
            raw = functional.interpolate(
                raw, size=labels.shape[-2:], mode="bilinear", align_corners=False
            )
        return raw.movedim(1, -1).reshape(-1, raw.shape[1])[keep]

    y = labels.reshape(-1)[keep].long()
    return Head(
        "segmentation", SOFTMAX, rebuild(logits), y, groups.reshape(-1)[keep], logits, rebuild,
        smoothing=smoothing,
    )  # fmt: skip


def _span(inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Head:
    """Start and end of an answer: two softmaxes over positions, whose losses are averaged."""
    raw = torch.stack([outputs["start_logits"], outputs["end_logits"]], dim=-1).detach()
    length = raw.shape[1]
    y = torch.stack([inputs["start_positions"], inputs["end_positions"]]).to(raw.device)
    y = y.reshape(2, -1).clamp(0, length)
    keep = (y != length).reshape(-1)  # answers cut off are not supervised
    groups = torch.arange(y.shape[1], device=y.device).expand(y.shape).reshape(-1)[keep]

    def rebuild(made: torch.Tensor) -> torch.Tensor:
        return made.reshape(raw.shape).permute(2, 0, 1).reshape(-1, length)[keep].float()

    return Head("span", SOFTMAX, rebuild(raw), y.reshape(-1)[keep], groups, raw, rebuild)


def _contrastive(logits: torch.Tensor) -> Head:
    """Pairs in a batch: each side picks its partner among all, and the two are averaged."""
    raw = logits.detach()
    size = len(raw)
    y = torch.arange(size, device=raw.device).repeat(2)

    def rebuild(made: torch.Tensor) -> torch.Tensor:
        made = made.reshape(raw.shape).float()
        return torch.cat([made, made.T])

    return Head("contrastive", SOFTMAX, rebuild(raw), y, y, raw, rebuild)


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(str(n) for n in tensor.shape) or "scalar"
