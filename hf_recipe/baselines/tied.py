"""Are input and output embeddings one tensor where the config says so, and two where it does not?

Two tensors that should be one drift apart: the saved file keeps one of them, and what is loaded
again is another model. One tensor that should be two trains against itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.heads import bare
from hf_recipe.instruments.subject import Subject


@dataclass(frozen=True)
class EmbeddingTie(Measurement):
    """Input and output embeddings of a language model.

    Attributes:
        declared: ``tie_word_embeddings`` of the config.
        shared: whether both are one tensor.
        equal: whether their values are the same.
        input_name, output_name: names of the parameters.
        elements: numbers in the output embedding.
        adapted: whether adapters (PEFT) are on the model, which may hold a copy of either.
        own_class: whether the model's class is not one of transformers'.
    """

    declared: bool
    shared: bool
    equal: bool
    input_name: str
    output_name: str
    elements: int
    adapted: bool
    own_class: bool


def measure_tie(subject: Subject) -> Iterator[EmbeddingTie]:
    """Compare the two tensors by identity and by value."""
    from transformers import PreTrainedModel

    model = bare(subject.model)
    if not isinstance(model, PreTrainedModel):
        raise Skip("the model has no config that says whether its embeddings are tied")
    output = model.get_output_embeddings()
    try:
        entrance = model.get_input_embeddings()
    except NotImplementedError:
        entrance = None
    first, last = getattr(entrance, "weight", None), getattr(output, "weight", None)
    if not isinstance(first, torch.Tensor) or not isinstance(last, torch.Tensor) or last.ndim != 2:
        raise Skip("the model has no input and output embedding")
    declared = getattr(model.config.get_text_config(), "tie_word_embeddings", None)
    never = declared and not model._tied_weights_keys  # the class cannot tie them
    if declared is None or never or first.shape != last.shape:
        raise Skip("the config does not say whether the embeddings are tied")
    entrance_name = _name_of(subject.model, first)
    yield EmbeddingTie(
        declared=bool(declared),
        shared=first.data_ptr() == last.data_ptr(),
        equal=torch.equal(first, last.to(first.device)),
        input_name=entrance_name,
        output_name=_name_of(subject.model, last, besides=entrance_name),
        elements=last.numel(),
        adapted=hasattr(subject.model, "peft_config"),
        own_class=not type(model).__module__.startswith("transformers."),
    )


def _name_of(model: nn.Module, weight: torch.Tensor, besides: str = "") -> str:
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if p is weight]
    return next((name for name in names if name != besides), besides or "?")


def untied_embedding(tie: EmbeddingTie) -> Iterator[Fault]:
    """Config and tensors disagree."""
    if tie.declared == tie.shared:
        return
    unsure = tie.adapted or tie.own_class
    if tie.declared:
        message = (
            f"config.tie_word_embeddings is set, but {tie.output_name} ({tie.elements:,} numbers) "
            f"is another tensor than {tie.input_name}, "
            + ("with the same values so far" if tie.equal else "with other values")
        )
    else:
        message = (
            f"config.tie_word_embeddings is False, but {tie.output_name} and {tie.input_name} are "
            f"one tensor of {tie.elements:,} numbers"
        )
    yield Fault(
        message,
        subject=tie.output_name,
        severity="note" if unsure else None,
        fix=None if tie.declared else "model.lm_head.weight = nn.Parameter(weight.clone())",
        evidence={
            "seen": "one tensor" if tie.shared else "two tensors",
            "expected": "one tensor" if tie.declared else "two tensors",
        },
    )


TIE = Probe("compare the embeddings", "static", (EmbeddingTie,), measure_tie, ("unsharded",))

UNTIED_EMBEDDING = Check(
    name="untied-embedding",
    stage="baselines",
    severity="warning",
    moments=("static",),
    why="What config and tensors disagree on is lost at the next save and load: the file keeps one "
    "embedding for both.",
    fix="model.tie_weights()",
    source="transformers issue 37031 (2025)",
    unsure="Adapters that keep a copy of one embedding on purpose give a note.",
    judges=(untied_embedding,),
)
