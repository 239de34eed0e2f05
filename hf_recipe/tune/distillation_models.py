"""What a student and its teacher are: what they take, how they end, what their outputs mean.

Pure functions over modules, their configs and their batches.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_recipe.tune.distillation_heads import Task
from hf_recipe.tune.distillation_loss import Head

# What models do to their head's output, as their configs call it.
MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
DIVIDERS = ("logits_scaling",)
SOFTCAPS = ("final_logit_softcapping",)

# What a model is asked to find: a teacher must answer without seeing it.
ANSWERS = ("labels", "start_positions", "end_positions", "shift_labels")


# ------------------------------------------------------------------ what they take


def questions(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The batch without what is to be found."""
    return {name: value for name, value in inputs.items() if name not in ANSWERS}


def with_decoder(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The batch, with the decoder's inputs where a model would make them out of labels."""
    full = dict(inputs)
    make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if (
        encodes
        and make is not None
        and full.get("labels") is not None
        and full.get("decoder_input_ids") is None
    ):
        full["decoder_input_ids"] = make(labels=full["labels"])
    return full


def moved(module: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the module takes of the questions, where it lies and in its own dtype."""
    parameter = next(module.parameters())
    return {
        k: v.to(parameter.device, parameter.dtype if v.is_floating_point() else None)
        if isinstance(v, Tensor)
        else v
        for k, v in accepted(module, questions(inputs)).items()
    }


def accepted(module: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that the module's forward takes by name (all of them where it takes any)."""
    parameters = inspect.signature(module.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(inputs)
    return {name: value for name, value in inputs.items() if name in parameters}


def forward_names(module: nn.Module) -> set[str]:
    """The names of what the module's forward takes."""
    parameters = inspect.signature(module.forward).parameters.values()
    return {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def name_inputs(module: nn.Module, names: Collection[str]) -> None:
    """Let a module whose forward takes anything say which inputs it wants."""
    answer, kind = functools.partial(type(module).forward, module), inspect.Parameter
    said = [kind(name, kind.KEYWORD_ONLY, default=None) for name in sorted(names)]
    answer.__signature__ = inspect.Signature(said)  # type: ignore[attr-defined]
    module.forward = answer


# ------------------------------------------------------------------ what they mean


class SpacesDiffer(ValueError):
    """Teacher and student mean different things by the same output."""


@dataclass(frozen=True)
class Space:
    """What a model's outputs stand for: how many, and their names in order ("" where unnamed)."""

    size: int
    names: tuple[str, ...] = ()


def space_of(model: nn.Module, task: Task) -> Space | None:
    """The label space or vocabulary of a model; None where its config does not tell."""
    config = getattr(model, "config", None)
    if config is None or task.kind == "spans":
        return None
    head = output_head(model)
    if head is not None:
        return Space(int(head.weight.shape[0]))
    named = getattr(config, "id2label", None)
    if not named or type(model).__name__.endswith("MultipleChoice"):
        return None
    names = tuple(str(named[i]) for i in sorted(named))
    return Space(len(names), () if names[0].upper().startswith("LABEL_") else names)


def first_difference(student: Sequence[str], teacher: Sequence[str]) -> int | None:
    """Where two lists of the same names stand in another order; None where they do not.

    Names that are other words altogether ("pos" and "positive") say nothing about the order.
    """
    ours = [name.strip().lower() for name in student]
    theirs = [name.strip().lower() for name in teacher]
    if sorted(ours) != sorted(theirs):
        return None
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)


def first_other_token(student: Any, teacher: Any) -> int | None:
    """The lowest id that two tokenizers give to different tokens; None where there is none."""
    ours = {index: token for token, index in student.get_vocab().items()}
    theirs = {index: token for token, index in teacher.get_vocab().items()}
    return next((i for i in sorted(ours.keys() & theirs.keys()) if ours[i] != theirs[i]), None)


# ------------------------------------------------------------------ how they end


def is_sharded(module: nn.Module) -> bool:
    """Whether the weights are split over processes: no layer can then be used by itself."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def output_head(model: nn.Module) -> nn.Linear | None:
    """The plain linear layer that turns hidden states into a vocabulary's logits, or None."""
    find: Callable[[], Any] | None = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    return head if type(head) is nn.Linear else None  # adapters and quantized heads are not plain


def declared_head(model: nn.Module) -> Head:
    """What the config says is done to the head's output."""
    config = model.config
    values = {n: getattr(config, n, None) for n in (*MULTIPLIERS, *DIVIDERS, *SOFTCAPS)}
    scale = 1.0
    for name in MULTIPLIERS:
        scale *= values[name] or 1.0
    for name in DIVIDERS:
        scale /= values[name] or 1.0
    return Head(scale, next((values[n] for n in SOFTCAPS if values[n]), None))


@contextmanager
def head_input(head: nn.Module, positions: int) -> Iterator[list[Tensor]]:
    """Collect what the head is given, and let only the first positions through to it."""
    taken: list[Tensor] = []

    def take(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        taken.append(arguments[0])
        return (arguments[0][:, :positions], *arguments[1:])

    handle = head.register_forward_pre_hook(take)
    try:
        yield taken
    finally:
        handle.remove()


def rebuilds(model: nn.Module, inputs: Mapping[str, Any], positions: int = 8) -> bool:
    """Whether `declared_head` of the head's input gives the model's own logits.

    Runs the model once without gradient, over its own random state, which is put back.
    """
    head = output_head(model)
    assert head is not None
    devices = [head.weight.device] if head.weight.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices), head_input(head, positions) as taken:
        outputs = model(**inputs)
    if len(taken) != 1 or taken[0].ndim != 3 or outputs.get("logits") is None:
        return False
    own = outputs["logits"].float()
    with torch.no_grad():
        built = declared_head(model).logits(
            taken[0][:, :positions].to(head.weight.dtype), head.weight, head.bias, torch.float32
        )
    if own.shape != built.shape:
        return False
    exact = outputs["logits"].dtype == taken[0].dtype == torch.float32
    close = 1e-4 if exact else 3e-2
    return bool((own - built).abs().max() <= close * own.abs().max().clamp(min=1e-3))
