"""Which inputs, and which tokens, have any influence?

An input that no gradient reaches is data that was paid for and is not used: a mask turned round,
a graph cut at the first layer, a feature that the forward takes and forgets. The gradient is asked
first, from the loss and from the outputs; where it is silent, the input is changed, so that what
is used without being differentiable is not accused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch

from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.batches import Batch
from hf_recipe.instruments.padding import pad_positions
from hf_recipe.instruments.subject import Subject
from hf_recipe.instruments.trace import Leaf, Trace, few_rows, random_direction, trace


@dataclass(frozen=True)
class InputInfluence:
    """What one input does.

    Attributes:
        name: of the input.
        connected: whether the graph of the loss or of the outputs leads to it.
        gradient: the largest gradient on it, of the loss or of the outputs.
        moves: whether the loss or the outputs change with it; None where that was not tried.
        tokens, idle: real tokens looked at, and those with a gradient of exactly 0.
    """

    name: str
    connected: bool
    gradient: float
    moves: bool | None
    tokens: int = 0
    idle: int = 0


@dataclass(frozen=True)
class InputReach(Measurement):
    """The influence of each input that can be differentiated for.

    Attributes:
        inputs: one by one.
        parameters: whether the loss has a gradient on any parameter (the positive control).
        zeroed: whether a trainable weight is all zeros, as a gate or a head may start.
    """

    inputs: tuple[InputInfluence, ...]
    parameters: bool
    zeroed: bool


def measure_inputs(subject: Subject) -> Iterator[InputReach]:
    """Two backward passes, and a forward for each input that they do not reach."""
    made = trace(subject, few_rows(subject))
    if not made.leaves:
        raise Skip("no floating-point input and no embedded ids to differentiate for")
    of_loss = made.gradients(made.loss)
    logits, of_outputs = made.logits, of_loss
    if logits is not None and logits.ndim:
        of_outputs = made.gradients((logits * random_direction(logits)).sum())
    trainable = [p for p in subject.model.parameters() if p.requires_grad]
    reached = made.loss.requires_grad and any(
        g is not None and bool(g.count_nonzero())
        for g in torch.autograd.grad(made.loss, trainable, allow_unused=True)
    )
    influences: dict[str, InputInfluence] = {}
    for leaf, a, b in zip(made.leaves, of_loss, of_outputs, strict=True):
        if leaf.name in influences and influences[leaf.name].gradient > 0:
            continue
        influences[leaf.name] = _influence(subject, made, leaf, a, b)
    yield InputReach(
        inputs=tuple(influences.values()),
        parameters=reached,
        zeroed=any(p.ndim > 1 and not bool(p.detach().count_nonzero()) for p in trainable)
        or any(p.numel() == 1 and float(p.detach()) == 0 for p in trainable),
    )


def _influence(
    subject: Subject,
    made: Trace,
    leaf: Leaf,
    of_loss: torch.Tensor | None,
    of_outputs: torch.Tensor | None,
) -> InputInfluence:
    largest = max((float(g.max()) for g in (of_loss, of_outputs) if g is not None), default=0.0)
    tokens = idle = 0
    if leaf.name == "input_ids" and of_outputs is not None and of_outputs.ndim == 3:
        sizes = of_outputs.amax(-1)
        mask = made.received.get("attention_mask")
        mask = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
        pads = pad_positions(subject, made.batch.inputs, mask)
        real = ~pads if pads is not None and pads.shape == sizes.shape else sizes >= 0
        tokens, idle = int(real.sum()), int((real & (sizes == 0)).sum())
    return InputInfluence(
        name=leaf.name,
        connected=of_loss is not None or of_outputs is not None,
        gradient=largest,
        moves=_moves(subject, made, leaf.name) if largest == 0 else None,
        tokens=tokens,
        idle=idle,
    )


def _moves(subject: Subject, made: Trace, name: str) -> bool | None:
    """Whether loss or outputs change when the rows of one input change places."""
    value = made.batch.inputs.get(name)
    if not isinstance(value, torch.Tensor) or value.shape[0] < 2:
        return None
    other = value.roll(1, 0)
    if torch.equal(other, value):
        return None
    with torch.no_grad():
        again = trace(subject, Batch({**made.batch.inputs, name: other}), grasp=False)
    if float(again.loss) != float(made.loss.detach()):
        return True
    a, b = again.logits, made.logits
    return a is not None and b is not None and a.shape == b.shape and not torch.equal(a, b)


# ---------------------------------------------------------------- the check


def without_influence(
    reach: InputReach,
    *,
    share: Annotated[
        float, "of the real tokens; a turned mask leaves out all but one or two; our choice"
    ] = 0.5,
) -> Iterator[Fault]:
    """An input, or most tokens, without any influence on loss and outputs."""
    if not reach.parameters:
        return  # a loss without any gradient is another check's affair
    for given in reach.inputs:
        if given.gradient == 0:
            # a gate or a head that starts at zero hides everything behind it for one step
            if given.moves is True and given.connected:
                continue
            if given.connected and reach.zeroed:
                continue
            yield _unused(given)
        elif given.tokens and given.idle > share * given.tokens:
            yield Fault(
                f"{given.idle} of {given.tokens} real tokens have no influence on the outputs",
                subject=given.name,
                evidence={
                    "seen": f"gradient 0 on {given.idle / given.tokens:.0%} of the tokens",
                    "expected": "a gradient on every token",
                },
                fix="attention_mask = (input_ids != pad_token_id).long()  # 1 on tokens",
            )


def _unused(given: InputInfluence) -> Fault:
    what = (
        "changes the outputs, but no gradient comes back to it"
        if given.moves
        else "has no influence on loss and outputs"
    )
    return Fault(
        f"{given.name} {what}",
        subject=given.name,
        severity="note" if given.moves else "warning",
        evidence={"seen": f"{given.name} {what}", "expected": "a gradient", "moves": given.moves},
    )


FOLLOW_INPUTS = Probe("follow inputs", "probe", (InputReach,), measure_inputs)

INPUT_WITHOUT_GRADIENT = Check(
    name="input-without-gradient",
    stage="baselines",
    severity="warning",
    moments=("probe",),
    why="An input without influence is data that was paid for and is not used.",
    fix="look at what forward does with it: a mask turned round, a detach, an unused argument",
    source="Karpathy, A Recipe for Training Neural Networks, 2019",
    unsure="A gate that starts at zero hides an input for one step. An input that is used without "
    "being differentiable is a note.",
    judges=(without_influence,),
    explains=("input-ignored", "loss-not-decreasing"),
)
