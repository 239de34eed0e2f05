"""What weight decay pulls on: matrices, or biases and the scales of norms too.

The Trainer leaves biases and norms out; an optimizer built by hand from ``model.parameters()``
does not, and AdamW decays by default. `decay_groups` makes the groups right.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.subject import Subject


@dataclass(frozen=True)
class DecayGroups(Measurement):
    """What the optimizer's groups decay.

    Attributes:
        highest: the highest ``weight_decay`` of a group that holds vectors.
        vectors: tensors of at most one dimension (biases, norms) in groups that decay.
        all_vectors: such tensors in the optimizer.
        first: name of the first that decays.
    """

    highest: float
    vectors: int
    all_vectors: int
    first: str


def measure_groups(subject: Subject) -> Iterator[DecayGroups]:
    """Read the groups of the optimizer."""
    optimizer: Any = getattr(subject.optimizer, "optimizer", subject.optimizer)
    names = {id(p): name for name, p in subject.model.named_parameters()}
    vectors = [
        (names[id(p)], float(group.get("weight_decay") or 0.0))
        for group in optimizer.param_groups
        for p in group["params"]
        if id(p) in names and p.ndim <= 1 and p.numel() > 1
    ]
    if not vectors:
        raise Skip("the optimizer holds no biases or norms of this model")
    decayed = [(name, decay) for name, decay in vectors if decay > 0]
    yield DecayGroups(
        highest=max((decay for _, decay in decayed), default=0.0),
        vectors=len(decayed),
        all_vectors=len(vectors),
        first=decayed[0][0] if decayed else "",
    )


def decay_on_norms(groups: DecayGroups) -> Iterator[Fault]:
    """Biases and norms in a group that decays."""
    if not groups.vectors:
        return
    yield Fault(
        f"weight decay {groups.highest:g} also pulls on {groups.vectors} of {groups.all_vectors} "
        f"biases and norms (first {groups.first})",
        subject="weight_decay",
        evidence={"seen": f"{groups.vectors} vectors decay", "expected": "matrices alone"},
    )


def is_decayed(model: nn.Module, name: str) -> bool:
    """Whether weight decay may pull on a parameter: a matrix that is no norm's and no embedding's.

    An embedding's row is only right when its token occurs; decay would wear out the rare ones.
    """
    parameter = model.get_parameter(name)
    owner = model.get_submodule(name.rpartition(".")[0])
    return parameter.ndim > 1 and not isinstance(owner, nn.Embedding | nn.EmbeddingBag)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups of the trained parameters: matrices decay, all else does not.

    ``torch.optim.AdamW(decay_groups(model, 0.1), lr=1e-3)``

    Raises:
        ValueError: a decay that is negative, or nothing to train.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must not be negative; got {weight_decay}")
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter of this model is trained")
    return [
        {"params": [p for n, p in trained if is_decayed(model, n) is decayed], "weight_decay": rate}
        for decayed, rate in ((True, weight_decay), (False, 0.0))
    ]


GROUPS = Probe(
    "read the optimizer's groups", "static", (DecayGroups,), measure_groups, needs=("optimizer",)
)

DECAY_ON_NORMS = Check(
    name="decay-on-norms",
    stage="regularize",
    severity="note",
    moments=("static",),
    why="Pulling a norm's scale or a bias to zero limits nothing that overfits.",
    fix="torch.optim.AdamW(hf_recipe.decay_groups(model, 0.1), lr=1e-3)",
    source="Trainer.get_decay_parameter_names, transformers (2026); van Laarhoven 2017",
    unsure="Some recipes decay everything and lose nothing.",
    judges=(decay_on_norms,),
)
