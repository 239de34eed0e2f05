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
    """

    name: str
    connected: bool
    gradient: float
    moves: bool | None


@dataclass(frozen=True)
class InputReach(Measurement):
    """The influence of each input that can be differentiated for.

    Attributes:
        inputs: one by one.
        parameters: whether the loss has a gradient on any parameter (the positive control).
        zeroed: whether a trainable weight is all zeros, as a gate or a head may start.
        tokens, idle: real tokens of ``input_ids``, and those with a gradient of exactly 0.
    """

    inputs: tuple[InputInfluence, ...]
    parameters: bool
    zeroed: bool
    tokens: int = 0
    idle: int = 0


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
    tokens, idle = _tokens(subject, made, of_outputs)
    yield InputReach(
        inputs=tuple(influences.values()),
        parameters=reached,
        tokens=tokens,
        idle=idle,
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
    return InputInfluence(
        name=leaf.name,
        connected=of_loss is not None or of_outputs is not None,
        gradient=largest,
        moves=_moves(subject, made, leaf.name) if largest == 0 else None,
    )


def _tokens(
    subject: Subject, made: Trace, of_outputs: list[torch.Tensor | None]
) -> tuple[int, int]:
    """Real tokens of ``input_ids``, and those that no gradient of the outputs comes back to."""
    ids = made.batch.inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        return 0, 0
    sizes, looked_up = torch.zeros(ids.shape, device=ids.device), torch.zeros_like(ids[0])
    for leaf, gradient in zip(made.leaves, of_outputs, strict=True):
        start = _start(ids, leaf.ids)
        if start is None or gradient is None or gradient.ndim != 3:
            continue
        columns = slice(start, start + gradient.shape[1])
        sizes[:, columns] = torch.maximum(sizes[:, columns], gradient.amax(-1))
        looked_up[columns] = 1
    if not bool(looked_up.any()):
        return 0, 0
    mask = made.received.get("attention_mask")
    mask = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
    pads = pad_positions(subject, made.batch.inputs, mask)
    real = ~pads if pads is not None and pads.shape == sizes.shape else sizes >= 0
    left = looked_up == 0
    if bool(left.any()) and _moves(subject, made, "input_ids", left):
        return 0, 0  # they are used in a way that no embedding shows
    return int(real.sum()), int((real & (sizes == 0)).sum())


def _start(ids: torch.Tensor, part: torch.Tensor | None) -> int | None:
    """The column from which `part`, that was looked up, stands in `ids`."""
    if part is None or part.ndim != 2 or len(part) != len(ids) or part.shape[1] > ids.shape[1]:
        return None
    width = part.shape[1]
    places = range(ids.shape[1] - width + 1)
    return next((k for k in places if torch.equal(ids[:, k : k + width], part)), None)


def _moves(
    subject: Subject, made: Trace, name: str, columns: torch.Tensor | None = None
) -> bool | None:
    """Whether loss or outputs change when the rows of one input, or some columns, are exchanged."""
    value = made.batch.inputs.get(name)
    if not isinstance(value, torch.Tensor) or value.shape[0] < 2:
        return None
    other = value.roll(1, 0)
    if columns is not None:
        other = torch.where(columns, other, value)
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
    reached = any(given.gradient > 0 for given in reach.inputs)
    if reached and reach.tokens and reach.idle > share * reach.tokens:
        yield Fault(
            f"{reach.idle} of {reach.tokens} real tokens have no influence on the outputs",
            subject="input_ids",
            evidence={
                "seen": f"gradient 0 on {reach.idle / reach.tokens:.0%} of the tokens",
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
