"""What does the loss reach, going backward?

A parameter that the loss does not reach never trains, a tensor that the model does not know of is
never updated, saved or moved, and an input without a gradient is not used. All three leave the
loss falling on what is left. One backward pass on a few rows tells them apart from what is sparse
(experts), optional (a pooler that comes with the checkpoint) or zero for the first step alone
(the second factor of a low-rank adapter).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault, Severity
from hf_recipe.instruments.batches import Batch
from hf_recipe.instruments.overrides import asks_for_training, mentions
from hf_recipe.instruments.reach import (
    SPARSE,
    grouped,
    is_own,
    leaves_of,
    noting_calls,
    own_parts,
    places_in,
    places_of,
)
from hf_recipe.instruments.subject import Subject
from hf_recipe.instruments.trace import Trace, few_rows, trace

TEACHERS = ("trainer.teacher", "trainer.ref")  # another check looks whether they train
MORE_BATCHES = 3  # in training mode, before a parameter counts as never reached
NAMED = 5


@dataclass(frozen=True)
class Unreached:
    """A module all of whose trainable parameters the loss does not reach.

    Attributes:
        name: of the module, or of a single parameter.
        tensors, elements: how many it holds.
        called: whether any of it ran.
        own: whether the user wrote it; False: it comes with a library's model.
        sparse: whether it is an expert, which few rows need not reach.
        adapter: whether an adapter was put on a model here.
    """

    name: str
    tensors: int
    elements: int
    called: bool
    own: bool
    sparse: bool
    adapter: bool


@dataclass(frozen=True)
class ReachedParameters(Measurement):
    """Which trainable parameters the loss reaches.

    Attributes:
        trainable: tensors that ask for a gradient.
        reached: those among them that a batch's loss reaches.
        zero: whether every gradient is exactly 0.
        cut: whether no input has a gradient either, although the model has run on it.
        reentrant: whether checkpointing of activations keeps a gradient from parameters that
            have one without it.
        unreached: by module.
    """

    trainable: int
    reached: int
    zero: bool
    cut: bool
    reentrant: bool
    unreached: tuple[Unreached, ...]


@dataclass(frozen=True)
class UnregisteredTensors(Measurement):
    """Tensors with a gradient that are not among the model's parameters.

    Attributes:
        places: the attributes in which they stand, "" where they were not found.
        elements: how many numbers they hold together.
        registered: parameters of the model that the loss reaches.
    """

    places: tuple[str, ...]
    elements: int
    registered: int


# ---------------------------------------------------------------- the probe


def measure_reach(subject: Subject) -> Iterator[ReachedParameters | UnregisteredTensors]:
    """One backward pass; up to three forwards more where something was not reached."""
    model = subject.model
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise Skip("no parameter trains")
    checkpointed = _checkpoints(model)
    names = ("activation_checkpointing", "gradient_checkpointing")  # the older name comes second
    if any(getattr(subject.args, name, False) for name in names) and not checkpointed:
        raise Skip("activation checkpointing is switched on by train(): looked at then")
    with noting_calls(model) as called:
        batch = few_rows(subject)
        labels = batch.labels
        if isinstance(labels, torch.Tensor) and bool((labels == -100).all()):
            raise Skip("no label of the batch counts, so nothing can have a gradient")
        own = subject.trainer is not None and asks_for_training(subject.trainer)
        made = trace(subject, batch, training=own)
        in_graph = leaves_of(made.loss)
        reached, zero, cut = _backward(made, list(trainable.values()), in_graph)
        missing = [n for n, p in trainable.items() if id(p) not in reached]
        reentrant = False
        if checkpointed:
            before, reached = reached, set()
            for batch in _more_batches(subject, made.batch):
                reached |= _reached_in_training(subject, batch, trainable)
                if before <= reached:
                    break
            reentrant = any(
                id(p) in before - reached and not SPARSE.search(n) for n, p in trainable.items()
            )
            missing = [n for n, p in trainable.items() if id(p) not in reached]
        elif missing:
            for batch in _more_batches(subject, made.batch):
                again = trace(subject, batch, training=True, grasp=False)
                reached |= {id(t) for t in leaves_of(again.loss)}
            missing = [n for n, p in trainable.items() if id(p) not in reached]
    yield ReachedParameters(
        trainable=len(trainable),
        reached=len(trainable) - len(missing),
        zero=zero,
        cut=cut,
        reentrant=reentrant,
        unreached=tuple(_groups(model, missing, trainable, called)),
    )
    yield _unregistered(subject, made, in_graph)


def _checkpoints(model: nn.Module) -> bool:
    return any(
        vars(module).get("gradient_checkpointing") is True
        or (is_own(module) and mentions(type(module).forward.__code__, "checkpoint"))
        for module in model.modules()
    )


def _backward(
    made: Trace, trainable: list[nn.Parameter], in_graph: list[torch.Tensor]
) -> tuple[set[int], bool, bool]:
    """(ids of reached parameters, all gradients are 0, no input is reached)."""
    if not made.loss.requires_grad:
        return set(), False, False
    known = {id(tensor) for tensor in in_graph}
    targets = [p for p in trainable if id(p) in known]
    inputs = [leaf.tensor for leaf in made.leaves]
    found = torch.autograd.grad(made.loss, [*targets, *inputs], allow_unused=True)
    own, of_inputs = found[: len(targets)], found[len(targets) :]
    reached = {id(p) for p, g in zip(targets, own, strict=True) if g is not None}
    zero = bool(reached) and not any(g is not None and bool(g.count_nonzero()) for g in own)
    return reached, zero, bool(inputs) and all(g is None for g in of_inputs)


def _reached_in_training(
    subject: Subject, batch: Batch, trainable: dict[str, nn.Parameter]
) -> set[int]:
    """Reentrant checkpointing hides its part of the graph: only a whole backward shows it."""
    if any(getattr(p, "_post_accumulate_grad_hooks", None) for p in trainable.values()):
        raise Skip("the optimizer steps inside backward, so no trial backward is made")
    made = trace(subject, batch, training=True, grasp=False, checkpointing=True)
    if made.loss.requires_grad:
        made.loss.backward()  # type: ignore[no-untyped-call]
    found = {id(p) for p in trainable.values() if p.grad is not None}
    for parameter in trainable.values():
        parameter.grad = None
    return found


def _more_batches(subject: Subject, first: Batch) -> list[Batch]:
    if subject.first_inputs is not None:
        return [first]
    size = max(len(first), 2)
    return [first, *subject.batches("train", rows=MORE_BATCHES * size, size=size)][:MORE_BATCHES]


def _groups(
    model: nn.Module,
    missing: list[str],
    trainable: dict[str, nn.Parameter],
    called: set[int],
) -> Iterator[Unreached]:
    modules = dict(model.named_modules())
    own = own_parts(model, missing)
    others = [name for name in trainable if name not in own]
    for place, names in grouped(missing, others).items():
        yield Unreached(
            name=place,
            tensors=len(names),
            elements=sum(trainable[n].numel() for n in names),
            called=any(id(modules[n.rpartition(".")[0]]) in called for n in names),
            own=any(own[n] for n in names),
            sparse=all(SPARSE.search(n) for n in names),
            adapter=all("lora_" in n or "adapter" in n for n in names),
        )


def _unregistered(
    subject: Subject, made: Trace, in_graph: list[torch.Tensor]
) -> UnregisteredTensors:
    registered = {id(p) for p in subject.model.parameters()}
    groups = subject.optimizer.param_groups if subject.optimizer is not None else []
    held = {id(p) for group in groups for p in group["params"]}
    leaves = {id(leaf.tensor) for leaf in made.leaves}
    foreign = [t for t in in_graph if id(t) not in registered | held | leaves]
    places = places_of(subject.model, foreign)
    places = places_in(subject.trainer, "trainer", foreign) | places
    foreign = [t for t in foreign if not places.get(id(t), "").startswith(TEACHERS)]
    foreign = [t for t in foreign if isinstance(t, nn.Parameter) or id(t) in places]
    return UnregisteredTensors(
        places=tuple(sorted(places.get(id(t), "") for t in foreign)),
        elements=sum(t.numel() for t in foreign),
        registered=sum(id(t) in registered for t in in_graph),
    )


# ---------------------------------------------------------------- the checks


def never_reached(reach: ReachedParameters) -> Iterator[Fault]:
    """Trainable parameters without a gradient."""
    if reach.reached == 0 or reach.zero:
        what = "has no gradient at all" if reach.reached == 0 else "has a gradient of exactly 0"
        yield Fault(
            f"the loss {what} on any of {reach.trainable} trainable tensors",
            subject="loss",
            severity="error",
            evidence={
                "seen": f"the loss {what}",
                "expected": "a gradient",
                "follows_from": "symmetric-init" if reach.zero else None,
            },
            fix="return loss  # no .detach(), .item(), torch.no_grad(), argmax or factor of 0",
        )
        return
    severed = [u for u in reach.unreached if not u.sparse]
    count = sum(u.tensors for u in severed)
    if not count:
        return
    ran = sum(u.tensors for u in severed if u.called)
    lost = (reach.cut and ran > 0) or 2 * ran >= reach.trainable
    if lost or reach.reentrant:
        yield _severed(reach, severed, count)
        return
    for part in severed:
        yield _idle(part)


def _severed(reach: ReachedParameters, severed: list[Unreached], count: int) -> Fault:
    names = ", ".join(u.name for u in severed[:NAMED])
    cause, fix = "; the graph is cut above them", None
    if reach.reentrant:
        cause = "; reentrant checkpointing gives no gradient where its inputs need none"
        fix = 'TrainingArguments(..., gradient_checkpointing_kwargs={"use_reentrant": False})'
    return Fault(
        f"{count} of {reach.trainable} trainable tensors ran and get no gradient{cause}: {names}",
        subject="backbone",
        severity="error",
        evidence={
            "seen": f"{reach.reached} of {reach.trainable} tensors reached",
            "expected": f"{reach.trainable}",
            "unreached": tuple(u.name for u in severed[:20]),
        },
        fix=fix or "h = self.backbone(x)  # no .detach(), .data or torch.no_grad() around it",
    )


def _idle(part: Unreached) -> Fault:
    severity: Severity = "warning" if part.own or part.adapter else "note"
    what = "runs, and nothing of it reaches the loss" if part.called else "is never called"
    return Fault(
        f"{part.name} ({part.elements} numbers) is trainable and {what}",
        subject=part.name,
        severity=severity,
        evidence={"seen": what, "expected": "a gradient", "elements": part.elements},
        fix=f"model.{part.name}.requires_grad_(False)  # or use it in forward",
    )


def outside_the_model(tensors: UnregisteredTensors) -> Iterator[Fault]:
    """Parameters that the model does not know of."""
    if not tensors.places:
        return
    named = [place for place in tensors.places if place]
    names = ", ".join(named[:NAMED]) or "not found in any attribute of the model"
    yield Fault(
        f"{len(tensors.places)} tensors ({tensors.elements} numbers) get a gradient and are not "
        f"among the model's parameters: {names}",
        subject=named[0].partition("[")[0] if named else "",
        evidence={
            "seen": f"{len(tensors.places)} tensors outside",
            "expected": "0",
            "places": tuple(named[:20]),
        },
    )


FOLLOW_GRADIENT = Probe(
    "follow the gradient",
    "probe",
    (ReachedParameters, UnregisteredTensors),
    measure_reach,
    needs=("unsharded",),
)

PARAMETER_WITHOUT_GRADIENT = Check(
    name="parameter-without-gradient",
    stage="baselines",
    severity="error",
    moments=("probe",),
    why="What the loss does not reach keeps its first values, whatever the curve does.",
    fix="model.unused.requires_grad_(False)  # or use it in forward",
    source="Karpathy, A Recipe for Training Neural Networks, 2019; peft issue 1142 (2023)",
    unsure="Parts that a library's model brings along unused (poolers, mask tokens) are a note; "
    "experts are left to be judged over steps. A backbone run under torch.no_grad() on purpose "
    "should have requires_grad_(False).",
    judges=(never_reached,),
    explains=("input-without-gradient", "input-ignored", "frozen-by-accident"),
)

UNREGISTERED_PARAMETER = Check(
    name="unregistered-parameter",
    stage="baselines",
    severity="error",
    moments=("probe",),
    why="A layer in a plain list is not trained, not saved, and not moved to the device.",
    fix="self.layers = nn.ModuleList(layers)",
    source="torch.nn.Module documentation (2025): parameters() sees registered modules alone",
    unsure="Parameters of a loss of one's own that the optimizer holds are left in peace.",
    judges=(outside_the_model,),
)
