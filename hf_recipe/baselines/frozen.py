"""Which parts of the model do not train, and does that look meant?

A frozen backbone under a head that trains is a method. A head drawn at random that never trains,
adapters that a wrapper has frozen, or a few layers without gradient between others that have one
train without a word, to a worse loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from hf_recipe.baselines.new_tokens import mean_rows
from hf_recipe.core.check import Check, Measurement, Probe
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.heads import bare
from hf_recipe.instruments.subject import Subject

LOADED = "_is_hf_initialized"  # transformers leaves it on every tensor that came from a checkpoint
ADAPTER = ("lora_", "prompt_encoder", "prompt_embeddings", "adapter_", "ia3_", "vera_", "hada_")


@dataclass(frozen=True)
class Stack:
    """A row of like blocks (the layers of an encoder), in order.

    Attributes:
        name: dotted name.
        blocks: how many.
        frozen: numbers of the blocks in which nothing trains.
        trains_before: whether something trains before the first frozen block.
        drawn: whether the frozen blocks were drawn at random, rather than loaded.
    """

    name: str
    blocks: int
    frozen: tuple[int, ...]
    trains_before: bool
    drawn: bool


@dataclass(frozen=True)
class TrainableParts(Measurement):
    """What trains, counted in numbers (elements); tensors with two names count once.

    Attributes:
        elements, trainable: of the whole model.
        loaded: whether some of the tensors came out of a checkpoint.
        adapted: whether adapters (PEFT) are on the model.
        adapter_tensors, adapter_trainable: tensors of the active adapters, and those that train.
        head: name of the output layers; empty: not told.
        head_elements, head_trainable: their numbers, and those that train.
        head_drawn: whether they were drawn at random.
        head_writes: whether they give a vocabulary, as a language model's output embedding does.
        frozen_parts: children of the model (or of its base model) in which nothing trains.
        stacks: rows of like blocks.
    """

    elements: int
    trainable: int
    loaded: bool
    adapted: bool
    adapter_tensors: int
    adapter_trainable: int
    head: str
    head_elements: int
    head_trainable: int
    head_drawn: bool
    frozen_parts: tuple[str, ...]
    stacks: tuple[Stack, ...] = ()
    head_writes: bool = False


def measure_parts(subject: Subject) -> Iterator[TrainableParts]:
    """Read ``requires_grad`` off every parameter."""
    model = subject.model
    named = dict(model.named_parameters())
    adapters = _active_adapters(model, named)
    loaded = any(is_loaded(p) for p in named.values())
    head_name, head = output_parts(model)
    if any(p.requires_grad for p in head):
        head_name, head = _frozen_end(model, head_name, head)
    yield TrainableParts(
        elements=sum(p.numel() for p in named.values()),
        trainable=sum(p.numel() for p in named.values() if p.requires_grad),
        loaded=loaded,
        adapted=hasattr(model, "peft_config"),
        adapter_tensors=len(adapters),
        adapter_trainable=sum(named[name].requires_grad for name in adapters),
        head=head_name,
        head_elements=sum(p.numel() for p in head),
        head_trainable=sum(p.numel() for p in head if p.requires_grad),
        head_drawn=_looks_drawn(head) and not (loaded and _resized(head)),
        frozen_parts=_frozen_parts(bare(model)),
        stacks=tuple(_stacks(bare(model))),
        head_writes=_writes(bare(model)),
    )


def is_loaded(parameter: nn.Parameter) -> bool:
    """Whether transformers filled this tensor from a checkpoint."""
    return bool(vars(parameter).get(LOADED, False))


def _looks_drawn(parameters: list[nn.Parameter]) -> bool:
    """Whether tensors are as an initialisation leaves them: constant vectors, or torch's own draw.

    Weights that a state dict brought bear no mark; but training moves biases and norms.
    """
    if any(is_loaded(p) for p in parameters):
        return False
    vectors = [p.detach() for p in parameters if p.ndim <= 1 and p.numel() > 1]
    if all(bool((v == v[0]).all()) for v in vectors):
        return True
    matrices = [p.detach() for p in parameters if p.ndim == 2]
    if len(matrices) != 1 or len(vectors) != 1:
        return False
    bound = float(matrices[0].shape[1]) ** -0.5  # nn.Linear draws both uniformly within it
    highest, other = float(matrices[0].abs().max()), float(vectors[0].abs().max())
    return bool(0.5 * bound < highest <= bound and other <= bound)


def _resized(head: list[nn.Parameter]) -> bool:
    """Whether a head over a vocabulary was made anew for added tokens, and filled from the old.

    `resize_token_embeddings` copies what was loaded into tensors that bear no mark, and puts the
    mean into the rows that it adds.
    """
    return any(p.ndim == 2 and mean_rows(p.detach()) < len(p) for p in head)


def output_parts(model: nn.Module) -> tuple[str, list[nn.Parameter]]:
    """Name and parameters of what stands after the base model; else of the last linear layer."""
    model = bare(model)
    base = getattr(model, "base_model", None)
    if isinstance(base, nn.Module) and base is not model:
        inner = {id(p) for p in base.parameters()}
        outer = {n: p for n, p in model.named_parameters() if id(p) not in inner}
        if outer:
            parts = dict.fromkeys(name.split(".")[0] for name in outer)
            return ", ".join(parts), list(outer.values())
        return "", []
    last = None
    trains = [p for p in model.parameters() if p.requires_grad]
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.ndim != 2 or isinstance(module, nn.Embedding):
            continue
        if not _is_copy(weight, trains):
            last = (name, list(module.parameters(recurse=False)))
    shared = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    if last is None or any(id(p) in shared for p in last[1]):
        return "", []
    return last


def _writes(model: nn.Module) -> bool:
    """Whether the model has an output embedding: its head belongs to the base, not to a task."""
    output = getattr(model, "get_output_embeddings", None)
    return output is not None and output() is not None


def _frozen_end(
    model: nn.Module, name: str, head: list[nn.Parameter]
) -> tuple[str, list[nn.Parameter]]:
    """The head's last linear layer where that alone is frozen; else the whole head."""
    inside = {id(p) for p in head}
    linear = [
        (path, list(module.parameters(recurse=False)))
        for path, module in bare(model).named_modules()
        if isinstance(module, nn.Linear) and id(module.weight) in inside
    ]
    if linear and not any(p.requires_grad for p in linear[-1][1]):
        return linear[-1]
    return name, head


def _is_copy(parameter: nn.Parameter, trains: list[nn.Parameter]) -> bool:
    """Whether a frozen tensor holds what one that trains holds: a slow target beside it."""
    if parameter.requires_grad:
        return False
    alike = [p for p in trains if p.shape == parameter.shape and p.device == parameter.device]
    return any(torch.equal(p.detach(), parameter.detach()) for p in alike)


def _active_adapters(model: nn.Module, named: dict[str, nn.Parameter]) -> list[str]:
    """Names of the tensors that belong to the active adapter."""
    active = getattr(model, "active_adapter", None)
    if not hasattr(model, "peft_config") or not isinstance(active, str):
        return []
    return [
        name
        for name in named
        if any(mark in name for mark in ADAPTER) and (f".{active}" in name or name.endswith(active))
    ]


def _frozen_parts(model: nn.Module) -> tuple[str, ...]:
    found = []
    for name, child in model.named_children():
        own = list(child.parameters())
        if own and not any(p.requires_grad for p in own):
            found.append(name)
        elif child is getattr(model, "base_model", None):
            for inner, part in child.named_children():
                tensors = list(part.parameters())
                if tensors and not any(p.requires_grad for p in tensors):
                    found.append(f"{name}.{inner}")
    return tuple(found)


def _stacks(model: nn.Module) -> Iterator[Stack]:
    """Every list of at least two blocks of one kind, some of which train and some do not."""
    order = {id(p): (i, p) for i, p in enumerate(model.parameters())}
    for name, module in model.named_modules():
        blocks = list(module.children())
        like = len({type(block) for block in blocks}) == 1
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(blocks) < 2 or not like:
            continue
        if not all(any(True for _ in block.parameters()) for block in blocks):
            continue
        frozen = [
            i
            for i, block in enumerate(blocks)
            if not any(p.requires_grad for p in block.parameters())
        ]
        if frozen:
            tensors = [p for i in frozen for p in blocks[i].parameters()]
            start = min(order[id(p)][0] for p in tensors)
            yield Stack(
                name=name,
                blocks=len(blocks),
                frozen=tuple(frozen[:100]),
                trains_before=any(i < start and p.requires_grad for i, p in order.values()),
                drawn=_looks_drawn(tensors) and any(p.ndim <= 1 for p in tensors),
            )


# ---------------------------------------------------------------- verdicts


def head_frozen(parts: TrainableParts) -> Iterator[Fault]:
    """Output layers that were drawn at random and do not train, while something else does."""
    if not parts.head_elements or parts.head_trainable or not parts.trainable:
        return
    # Where adapters are on a model that was drawn at random throughout, its output embedding is
    # as much the base as the rest; the head of a task is new in any case.
    if not parts.head_drawn or (parts.adapted and not parts.loaded and parts.head_writes):
        return
    names = parts.head.split(", ")
    yield Fault(
        f"the head ({parts.head}, {parts.head_elements:,} numbers) is drawn at random and frozen, "
        f"while {parts.trainable:,} other numbers train",
        subject=parts.head,
        fix=f"LoraConfig(..., modules_to_save={names})"
        if parts.adapted
        else "; ".join(f"model.{name}.requires_grad_(True)" for name in names),
        evidence={
            "seen": "0 of the head's numbers train",
            "expected": f"{parts.head_elements:,}",
            "trainable": parts.trainable,
        },
    )


def frozen_by_accident(parts: TrainableParts) -> Iterator[Fault]:
    """Adapters or layers without gradient; a note where a whole part is frozen."""
    if parts.adapted:
        still = parts.adapter_tensors - parts.adapter_trainable
        if still and parts.trainable:
            yield Fault(
                f"{still} of {parts.adapter_tensors} tensors of the active adapter do not train, "
                f"while {parts.trainable:,} other numbers do",
                subject="adapter",
                severity="warning",
                fix="PeftModel.from_pretrained(model, path, is_trainable=True)",
                evidence={"seen": f"{still} frozen", "expected": "0 frozen"},
            )
        return
    odd = [stack for stack in parts.stacks if _unmeant(stack)]
    for stack in odd:
        listed = ", ".join(str(i) for i in stack.frozen[:8])
        why = (
            "drawn at random, so they pass on noise for ever"
            if stack.drawn
            else "although something before them trains"
        )
        yield Fault(
            f"{len(stack.frozen)} of {stack.blocks} blocks of {stack.name} (number {listed}) do "
            f"not train, {why}",
            subject=stack.name,
            severity="warning",
            fix=f"model.{stack.name}.requires_grad_(True)",
            evidence={
                "seen": f"{len(stack.frozen)} of {stack.blocks} frozen",
                "expected": "all train, or the lowest ones with everything before them",
            },
        )
    frozen = parts.elements - parts.trainable
    whole = [p for p in parts.frozen_parts if not any(s.name.startswith(p) for s in odd)]
    if whole and not odd:
        yield Fault(
            f"{frozen:,} of {parts.elements:,} numbers do not train: {', '.join(whole[:5])}",
            subject="model",
            evidence={"seen": f"{parts.trainable:,} train", "expected": "as meant"},
        )


def _unmeant(stack: Stack) -> bool:
    if len(stack.frozen) == stack.blocks:
        return False  # the whole of it: a method
    # So are the lowest blocks with everything before them; a bug freezes something in between.
    lowest = stack.frozen == tuple(range(len(stack.frozen)))
    return stack.trains_before or (stack.drawn and not lowest)


PARTS = Probe("read what trains", "static", (TrainableParts,), measure_parts)

HEAD_FROZEN = Check(
    name="head-frozen",
    stage="baselines",
    severity="warning",
    moments=("static",),
    why="A head drawn at random that never trains makes the whole model learn to undo it.",
    fix="model.classifier.requires_grad_(True)",
    source="Hugging Face forum and transformers issues on freezing (2021)",
    unsure="Heads that are fixed by design (simplex classifiers, random projections).",
    judges=(head_frozen,),
    explains=("loss-not-decreasing", "one-batch-not-overfit"),
)
FROZEN_BY_ACCIDENT = Check(
    name="frozen-by-accident",
    stage="baselines",
    severity="note",
    moments=("static",),
    why="What is frozen keeps its weights, and nothing in the log says so.",
    fix="model.requires_grad_(True)",
    source="trl issue 3926 (2025); TrainCheck, Jiang et al. (2025)",
    unsure="Layers frozen above ones that train, on purpose; reservoir-like models of random "
    "layers.",
    judges=(frozen_by_accident,),
)
