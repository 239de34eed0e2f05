"""Do all processes hold the same weights, and train on different rows?

Data-parallel processes begin with the same weights and add the same averaged gradient, so their
weights are equal to the last bit; a loss that goes around the wrapper, or a parameter replaced
after it, lets them drift apart without a word. And where all of them read the same rows, the
second process adds cost and no data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import nn

from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.subject import Subject

ELEMENTS = 262_144
WEIGHTS, BATCHES = "rank_weights", "rank_batches"  # keys of a subject's cache


@dataclass(frozen=True)
class RankWeights(Measurement):
    """A checksum of the weights on every rank.

    Attributes:
        step: optimizer steps done.
        ranks: processes.
        spread: largest difference of two ranks' sums over the sum of absolute values.
        apart: ranks that differ from rank 0.
    """

    step: int
    ranks: int
    spread: float
    apart: tuple[int, ...]


@dataclass(frozen=True)
class RankBatches(Measurement):
    """The first micro-batches on every rank.

    Attributes:
        ranks: processes.
        compared: micro-batches compared.
        shared: those whose inputs are the same on at least two ranks.
        distinct: different ones among rank 0's: constant data cannot be told apart.
    """

    ranks: int
    compared: int
    shared: int
    distinct: int


@torch.no_grad()
def checksum(model: nn.Module) -> torch.Tensor:
    """Three sums over at most 262,144 evenly spaced elements: plain, alternating, absolute.

    Returns:
        (3,) float64 on the model's device. Parameters that the wrapper was told to leave alone
        are left out.
    """
    ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    parameters = [p for n, p in model.named_parameters() if n not in ignored and p.numel()]
    share = max(1, ELEMENTS // max(len(parameters), 1))
    parts = [p.detach().reshape(-1)[:: -(-p.numel() // share)] for p in parameters]
    flat = torch.cat([part.double().to(parts[0].device) for part in parts])
    signs = torch.arange(flat.numel(), device=flat.device) % 7 - 3
    return torch.stack([flat.sum(), (flat * signs).sum(), flat.abs().sum()])


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """A hash of a micro-batch's tensors, "" where there is none."""
    digest, seen = hashlib.sha1(usedforsecurity=False), False
    for name in sorted(inputs):
        value = inputs[name]
        if isinstance(value, torch.Tensor):
            seen = True
            digest.update(f"{name}{tuple(value.shape)}".encode())
            flat = value.detach().reshape(-1)[:65_536]
            digest.update(flat.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16] if seen else ""


def weights_of(step: int, sums: list[list[float]]) -> RankWeights:
    """The measurement of all ranks' checksums."""
    scale = max(abs(sums[0][2]), 1e-300)
    gaps = [max(abs(a - b) for a, b in zip(each, sums[0], strict=True)) for each in sums]
    apart = tuple(i for i, gap in enumerate(gaps) if not gap <= 1e-10 * scale)
    return RankWeights(step=step, ranks=len(sums), spread=max(gaps) / scale, apart=apart)


def batches_of(prints: list[list[str]]) -> RankBatches:
    """The measurement of all ranks' fingerprints, one list of equal length a rank."""
    columns = list(zip(*prints, strict=False))
    known = [column for column in columns if all(column)]
    return RankBatches(
        ranks=len(prints),
        compared=len(known),
        shared=sum(len(set(column)) < len(column) for column in known),
        distinct=len({column[0] for column in known}),
    )


def take_weights(subject: Subject) -> Iterator[RankWeights]:
    """Yield what the run's last comparison gave."""
    if WEIGHTS not in subject.cache:
        raise Skip("there is one process")
    yield subject.cache[WEIGHTS]


def take_batches(subject: Subject) -> Iterator[RankBatches]:
    """Yield what the first steps' comparison gave."""
    if BATCHES not in subject.cache:
        raise Skip("there is one process")
    yield subject.cache[BATCHES]


def diverged(weights: RankWeights) -> Iterator[Fault]:
    """Weights that are not the same numbers."""
    if not weights.apart:
        return
    yield Fault(
        f"after step {weights.step} the weights of {len(weights.apart)} of {weights.ranks} "
        f"processes differ from rank 0's (relative {weights.spread:.1e})",
        evidence={
            "seen": f"{len(weights.apart)} apart",
            "expected": "the same weights",
            "spread": weights.spread,
            "step": weights.step,
        },
    )


def shared(
    batches: RankBatches,
    *,
    few: Annotated[int, "micro-batches: one may be alike by chance in tiny data"] = 2,
) -> Iterator[Fault]:
    """Processes that get the same inputs at every step."""
    if batches.compared < few or batches.distinct < few or batches.shared < batches.compared:
        return
    yield Fault(
        f"in {batches.shared} of {batches.compared} micro-batches processes trained on the same "
        f"inputs: {batches.ranks} processes, and the data of fewer",
        evidence={
            "seen": f"{batches.shared} of {batches.compared} alike",
            "expected": "different rows on each rank",
            "ranks": batches.ranks,
        },
    )


COMPARE_WEIGHTS = Probe(
    name="compare ranks' weights", moment="ranks", measures=(RankWeights,), take=take_weights
)
COMPARE_BATCHES = Probe(
    name="compare ranks' batches", moment="ranks", measures=(RankBatches,), take=take_batches
)

RANKS_DIVERGED = Check(
    name="ranks-diverged",
    stage="complexify",
    severity="error",
    moments=("ranks",),
    why="Processes with different weights train different models, and rank 0's alone is saved.",
    fix="loss = model(**inputs).loss  # the model that compute_loss is given, not self.model",
    source="pytorch issue 104336 (2023); trl issue 7245 (2025)",
    unsure="Methods that average weights only now and then (local SGD) drift on purpose.",
    judges=(diverged,),
    explains=("loss-diverged", "loss-spike"),
)

RANKS_SHARE_DATA = Check(
    name="ranks-share-data",
    stage="complexify",
    severity="error",
    moments=("ranks",),
    why="Processes that read the same rows do the work of one at the price of all.",
    fix="accelerator.prepare(dataloader)  # or DistributedSampler(dataset)",
    source="DeepSpeed issue 5360 (2024); transformers issue 11254 (2021)",
    unsure="Tensor and sequence parallel processes share their rows rightly; they are left out.",
    judges=(shared,),
)

__all__ = ["RANKS_DIVERGED", "RANKS_SHARE_DATA", "RankBatches", "RankWeights"]
