"""The largest batch that fits, and the smallest that is fast: before the rate is tuned to one.

A batch is chosen by the machine, not by quality: as large as fits, where it is faster (Tuning
Playbook). So micro-batches grow and are bisected on the data's longest rows, with gradients and
the optimizer's state in place, since a run that survives its first batches dies at the longest;
and the speed of each size is taken. What a step learns from (micro-batch x accumulation x
processes) stays as it is: the split alone is advised.

On a CPU nothing refuses memory, the kernel kills; there every tensor is counted and what would
pass the budget, by the line through the sizes before it, is not tried.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from hf_recipe.core.check import Check, Measurement
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.fitting import rate_at, split_batch

MARGIN = 0.9  # of the largest that fits: fragments, and tensors of the user's own


@dataclass(frozen=True)
class BatchSize(Measurement):
    """Which micro-batches fit on one device, and how fast they are.

    Attributes:
        largest: rows that fit, the smallest over all processes; 0: not even one.
        bounded: whether the rows of the data set, not memory, were the bound.
        longest: tokens (or numbers) of the longest row, which the batches were made of.
        memory_bytes: what a step may take in all; 0: what the device gives.
        used_bytes: what the largest took, or by the line would take.
        speeds: rows a second by rows of a micro-batch, forward, backward and update.
        knee: the fewest rows that reach 95 % of the best speed.
        current, accumulation, processes: as the run stands.
        noise_scale, noise_low, noise_high: rows from which on a larger batch averages little
            noise away, at the weights as they are; NaN where it was not told.
        accelerator: whether the device refuses memory by itself.
    """

    largest: int
    bounded: bool
    longest: int
    memory_bytes: int
    used_bytes: int
    speeds: dict[str, float]
    knee: int
    current: int
    accumulation: int
    processes: int = 1
    noise_scale: float = math.nan
    noise_low: float = math.nan
    noise_high: float = math.nan
    accelerator: bool = False

    @property
    def rates(self) -> dict[int, float]:
        """Rows a second by rows of a micro-batch."""
        return {int(size): rate for size, rate in self.speeds.items()}

    @property
    def safe(self) -> int:
        """The largest with a margin, where memory is the bound."""
        return self.largest if self.bounded else max(1, int(self.largest * MARGIN))

    @property
    def advised(self) -> tuple[int, int]:
        """(rows of a micro-batch, accumulation) that keep the rows of a step."""
        effective = self.current * self.accumulation
        rows = split_batch(effective, largest=self.safe, wanted=self.knee)
        return rows, effective // rows


# ---------------------------------------------------------------- judging


def batch_size_small(
    found: BatchSize,
    *,
    worth: Annotated[float, "a tenth faster, above the noise of five timings; our choice"] = 1.1,
) -> Iterator[Fault]:
    """The run's micro-batches are too large to fit, or smaller than what the machine is fast at."""
    rows = found.current
    evidence = {
        "seen": f"{rows} rows a micro-batch",
        "expected": f"{found.knee} to {found.largest} rows",
        "largest": found.largest,
        "knee": found.knee,
        "noise_scale": found.noise_scale,
    }
    if rows > found.largest and not found.bounded:
        if found.largest == 0:
            yield Fault("not even one of the longest rows fits", evidence=evidence)
            return
        size, times = found.advised
        yield Fault(
            f"{found.largest} of the longest rows fit, the run takes {rows}: it ends where they "
            "stand in one batch",
            severity="warning" if found.accelerator else "note",
            evidence=evidence,
            fix=_arguments(size, times),
        )
        return
    if rows >= found.knee or not found.rates or found.largest == 0:
        return
    now = rate_at(found.rates, rows)
    size, times = found.advised
    gain = rate_at(found.rates, size) / now
    text = f"{rows} rows a micro-batch; {found.largest} fit, and speed levels off at {found.knee}"
    if gain >= worth:
        yield Fault(
            f"{text}: the same step as {size} x {times} is {gain:.2g} times as fast",
            evidence=evidence,
            fix=_arguments(size, times),
        )
    elif rate_at(found.rates, found.knee) / now >= worth:
        gain = rate_at(found.rates, found.knee) / now
        yield Fault(
            f"{text}, {gain:.2g} times as fast; that is another training, its rate to be tuned "
            "again",
            evidence=evidence,
            fix=_arguments(found.knee, 1),
        )


def _arguments(size: int, times: int) -> str:
    given = f"per_device_train_batch_size={size}, gradient_accumulation_steps={times}"
    return f"TrainingArguments({given})"


BATCH_SIZE_SMALL = Check(
    name="batch-size-small",
    stage="baselines",
    severity="note",
    moments=("probe",),
    why="A batch is chosen by the machine: as large as fits and is faster, never for quality.",
    fix="TrainingArguments(per_device_train_batch_size=..., gradient_accumulation_steps=...)",
    source="Deep Learning Tuning Playbook (2023); McCandlish et al. (2018)",
    unsure="Measured without DistributedDataParallel, torch.compile and the data loader around "
    "it; on a shared machine speeds are noisy. A model with BatchNorm learns otherwise from "
    "another micro-batch. The noise scale grows while training.",
    judges=(batch_size_small,),
    call="recipe.find_batch_size()",
)
