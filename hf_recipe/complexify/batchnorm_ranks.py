"""Do processes agree on BatchNorm's running statistics when a forward pass begins?

DistributedDataParallel copies rank 0's buffers to all before each forward pass, so that they
differ by one update at most. Where that is switched off, every process keeps statistics of its
own: each evaluates a model of its own, and the saved one is rank 0's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.subject import Subject

CHANNELS, LAYERS = 64, 64  # that are compared


@dataclass(frozen=True)
class RankStatistics(Measurement):
    """Running statistics over the ranks; differences in running standard deviations.

    Attributes:
        step: optimizer steps done.
        ranks: processes.
        layers: BatchNorm layers with running statistics.
        at_forward: largest difference of a channel's mean or spread when a forward pass began.
        now: the same, after that step: what an evaluation would read.
        worst: the layer with the largest difference.
    """

    step: int
    ranks: int
    layers: int
    at_forward: float
    now: float
    worst: str


Statistics = dict[str, tuple[list[float], list[float]]]


def statistics_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Per layer, (2, channels): running mean and variance of some channels; copies."""
    found: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if len(found) == LAYERS:
            break
        if not isinstance(module, _BatchNorm):
            continue
        mean, variance = module.running_mean, module.running_var
        if mean is not None and variance is not None:
            both = torch.stack([mean[:CHANNELS], variance[:CHANNELS]])
            found[name] = both.detach().double().clone()
    return found


def plain(statistics: dict[str, torch.Tensor]) -> Statistics:
    """The same as lists, read from the device."""
    return {n: (both[0].tolist(), both[1].tolist()) for n, both in statistics.items()}


def largest(everyone: list[Statistics]) -> tuple[float, str]:
    """(largest difference to rank 0 in running standard deviations, its layer)."""
    worst, where = 0.0, ""
    for name, (mean, variance) in everyone[0].items():
        for other in everyone[1:]:
            there = other.get(name, (mean, variance))
            for m, v, n, w in zip(mean, variance, *there, strict=True):
                spread = max(v, w, 1e-12) ** 0.5
                gap = max(abs(m - n) / spread, abs(v**0.5 - w**0.5) / spread)
                if not gap <= worst:
                    worst, where = gap, name
    return worst, where


def compared(step: int, forward: list[Statistics], now: list[Statistics]) -> RankStatistics:
    """The measurement of all ranks' statistics."""
    worst, where = largest(forward)
    return RankStatistics(
        step=step,
        ranks=len(now),
        layers=len(now[0]),
        at_forward=worst,
        now=largest(now)[0],
        worst=where,
    )


def differ(
    statistics: RankStatistics,
    *,
    apart: Annotated[float, "standard deviations; copied buffers are equal to the last bit"] = 1e-3,
) -> Iterator[Fault]:
    """Statistics that were not made equal before a forward pass."""
    if not statistics.layers or statistics.at_forward <= apart:
        return
    yield Fault(
        f"BatchNorm's running statistics differ between {statistics.ranks} processes by up to "
        f"{statistics.at_forward:.2g} standard deviations when a forward pass begins, and by "
        f"{statistics.now:.2g} after step {statistics.step}",
        subject=statistics.worst,
        evidence={
            "seen": f"{statistics.at_forward:.2g} standard deviations apart",
            "expected": "the same on all processes",
            "layers": statistics.layers,
            "step": statistics.step,
        },
    )


def take(subject: Subject) -> Iterator[RankStatistics]:
    """Nothing on one process."""
    raise Skip("there is one process, or no BatchNorm layer with running statistics")


COMPARE_STATISTICS = Probe("compare BatchNorm over ranks", "ranks", (RankStatistics,), take)

BATCHNORM_RANKS_DIFFER = Check(
    name="batchnorm-ranks-differ",
    stage="complexify",
    severity="warning",
    moments=("ranks",),
    why="Each process evaluates with statistics of its own, and rank 0's alone are saved: the "
    "metric belongs to no model there is.",
    fix="TrainingArguments(..., ddp_broadcast_buffers=True)  # or nn.SyncBatchNorm",
    source="Wu and Johnson, Rethinking 'Batch' in BatchNorm (2021), section 4",
    unsure="A run that averages the statistics itself right before each evaluation.",
    judges=(differ,),
)
