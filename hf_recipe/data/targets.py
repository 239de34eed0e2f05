"""Which token each output is pulled to: the next one, the one after, or the one it has just read.

A causal model has to predict the next token. Where the loss forgets the shift, every output is
compared with the token that it has read itself: the model learns to copy, its loss falls to
nothing, and it cannot generate. Where labels are shifted twice it learns the token after the next.
Neither raises, and neither can be told from labels alone once somebody writes a loss of their own.
So the loss is asked: its gradient on the logits is lowest at the class that it wants to see more
of, whatever was done to labels, logits and weights in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch

from hf_recipe.core.check import Located, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.batches import Batch
from hf_recipe.instruments.subject import Subject
from hf_recipe.instruments.trace import Leaf, Trace, few_rows, trace

LEAK = 1e-5  # of the own gradient: fused kernels leave about 1e-6


@dataclass(frozen=True)
class TargetsRead(Measurement):
    """Where the targets of a model's outputs stand among the tokens that it reads.

    Attributes:
        positions: outputs that the loss has a gradient on, the last two of a row left out.
        own, following, later: of these, outputs whose target is the token at the same position,
            at the next and at the one after; equal tokens count for each.
        causal: whether outputs depend on earlier tokens and on no later one; None where targets
            stand where they should, so that it was not looked at.
        reads_own: whether they depend on the token at their own position.
    """

    positions: int
    own: int
    following: int
    later: int
    causal: bool | None = None
    reads_own: bool | None = None


def measure_targets(subject: Subject) -> Iterator[Located]:
    """One pass and its loss's gradient on the logits; one backward more where it looks odd."""
    batch = few_rows(subject)
    if not _has_sequences(batch):
        raise Skip("the rows are no sequences of tokens, or have one label each")
    made = trace(subject, batch)
    leaf, logits = made.token_leaf, made.logits
    if leaf is None or leaf.ids is None or logits is None or logits.ndim != 3:
        raise Skip("the outputs do not run along the tokens")
    if logits.shape[1] < 4 or not made.loss.requires_grad:
        raise Skip("rows of fewer than four tokens, or a loss without a gradient")
    (gradient,) = torch.autograd.grad(made.loss, [logits], retain_graph=True, allow_unused=True)
    if gradient is None:
        raise Skip("the loss is not computed from the outputs that the model returns")
    strength, target = gradient.detach()[:, :-2].min(-1)
    pulled, ids = strength < 0, leaf.ids.to(target.device)
    own, following, later = (
        int((pulled & (target == there)).sum()) for there in (ids[:, :-2], ids[:, 1:-1], ids[:, 2:])
    )
    causal = reads_own = None
    if max(own, later) > following:
        causal, reads_own = _reads(made, leaf, logits, pulled)
    yield Located(TargetsRead(int(pulled.sum()), own, following, later, causal, reads_own), "train")


def _has_sequences(batch: Batch) -> bool:
    """Whether anything runs along tokens: asked before a pass is paid for."""
    if isinstance(batch.labels, torch.Tensor) and batch.labels.ndim < 2:
        return False
    tensors = [v for v in batch.inputs.values() if isinstance(v, torch.Tensor)]
    return any(v.ndim == 2 and not v.is_floating_point() for v in tensors)


def _reads(
    made: Trace, leaf: Leaf, logits: torch.Tensor, pulled: torch.Tensor
) -> tuple[bool, bool]:
    """(reads earlier tokens and none later, reads the token at its own position)."""
    picked = torch.zeros_like(logits)
    looked = []
    for row, line in enumerate(pulled):
        places = line[1:].nonzero()[:, 0].tolist()
        if places:
            place = places[len(places) // 2] + 1
            picked[row, place] = torch.randn_like(picked[row, place])
            looked.append((row, place))
    if not looked:
        return False, False
    sizes = made.along(leaf, (logits * picked).sum())
    own = min(float(sizes[row, place]) for row, place in looked)
    earlier = min(float(sizes[row, :place].max()) for row, place in looked)
    behind = max(float(sizes[row, place + 1 :].max()) for row, place in looked)
    return earlier > 0 and behind <= LEAK * max(own, earlier), own > 0


def targets_misplaced(
    seen: TargetsRead,
    *,
    share: Annotated[float, "of the outputs; a loss that is wired so gives 1.0"] = 0.95,
    right: Annotated[float, "share pulled to the next token; repeated tokens count twice"] = 0.5,
    enough: Annotated[int, "outputs that must agree: by chance one in V^16 does"] = 16,
) -> Iterator[Fault]:
    """A causal model that is trained to copy its input, or to leave a token out."""
    if seen.positions < enough or not seen.causal or seen.following > right * seen.positions:
        return
    evidence = {"expected": "the next token", "positions": seen.positions}
    if seen.own >= share * seen.positions and seen.reads_own:
        told = f"{seen.own / seen.positions:.1%} of {seen.positions} outputs"
        yield Fault(
            f"the loss pulls {told} to the token that they have just read: the shift is missing, "
            "and the model learns to copy its input",
            evidence={"seen": f"{told} pulled to their own token", **evidence},
            fix="loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())",
        )
    elif seen.later >= share * seen.positions:
        told = f"{seen.later / seen.positions:.1%} of {seen.positions} outputs"
        yield Fault(
            f"the loss pulls {told} to the token after the next: labels are shifted twice",
            evidence={"seen": f"{told} pulled two tokens ahead", **evidence},
        )


READ_TARGETS = Probe(
    name="read the loss's targets",
    moment="probe",
    measures=(TargetsRead,),
    take=measure_targets,
)
