"""The recipe's line "generalise a special case": batched against one by one.

What is written for one row and then vectorised can go wrong in the batch alone: positions counted
from the padding, padding that counts in the mean, a sum in the place of a mean. Each of a few rows
is run alone, its padding cut off, and compared with what it gave in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch

from hf_recipe.baselines.loss_pairs import padding_counts
from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.batches import Batch
from hf_recipe.instruments.heads import bare
from hf_recipe.instruments.padding import pad_positions
from hf_recipe.instruments.subject import Subject
from hf_recipe.instruments.trace import Trace, few_rows, trace


@dataclass(frozen=True)
class OneByOne(Measurement):
    """A batch, and its rows alone with their padding cut off.

    Attributes:
        batched: loss of the batch.
        alone: loss of each row by itself.
        supervised: labels that count in each row, where the loss is a mean over positions, else 1.
        positions: positions of each row, its padding left out; 1 where rows are not sequences.
        width: positions of the batch.
        difference: largest difference of a row's predictions, in the batch and alone, relative to
            their standard deviation; None where they cannot be lined up.
        left: whether padding stands before the tokens.
        padded: positions of padding that were cut off.
        half: whether predictions are in half precision.
        stock: whether the loss is what a model of transformers returns by itself.
    """

    batched: float
    alone: tuple[float, ...]
    supervised: tuple[int, ...]
    positions: tuple[int, ...]
    width: int
    difference: float | None
    left: bool
    padded: int
    half: bool = False
    stock: bool = False


def measure_one_by_one(subject: Subject) -> Iterator[OneByOne]:
    """One forward pass of a few rows, and one of each row."""
    batch = few_rows(subject)
    rows = len(batch)
    leading = [v for v in batch.inputs.values() if isinstance(v, torch.Tensor) and v.ndim]
    if rows < 2 or any(v.shape[0] != rows for v in leading):
        raise Skip("the batch's tensors do not lead with its rows")
    mask = batch.inputs.get("attention_mask")
    mask = mask if isinstance(mask, torch.Tensor) else None
    pads = pad_positions(subject, batch.inputs, mask)
    if mask is not None and mask.ndim > 2:
        raise Skip("the batch brings a mask of its own shape, which no single row's would have")
    with torch.no_grad():
        whole = trace(subject, batch, grasp=False)
        parts = [trace(subject, _alone(batch, pads, row), grasp=False) for row in range(rows)]
    ids = batch.inputs.get("input_ids")
    width = int(ids.shape[1]) if isinstance(ids, torch.Tensor) and ids.ndim == 2 else 1
    kept = [width] * rows if pads is None else [int(n) for n in (~pads).sum(1)]
    logits = whole.logits
    yield OneByOne(
        batched=float(whole.loss),
        alone=tuple(float(part.loss) for part in parts),
        supervised=tuple(_supervised(subject, batch)),
        positions=tuple(kept),
        width=width,
        difference=_difference(whole, parts, pads),
        left=pads is not None and bool(pads[:, 0].any()),
        padded=0 if pads is None else int(pads.sum()),
        half=logits is not None and logits.dtype in (torch.bfloat16, torch.float16),
        stock=_is_stock(subject, whole),
    )


def _is_stock(subject: Subject, whole: Trace) -> bool:
    own = whole.outputs.get("loss") if isinstance(whole.outputs, Mapping) else None
    stock = type(bare(subject.model)).__module__.startswith("transformers.")
    return stock and own is not None and float(own) == float(whole.loss)


def _alone(batch: Batch, pads: torch.Tensor | None, row: int) -> Batch:
    """One row, the columns that are padding in it taken out of every tensor that has them."""
    one = batch.take([row])
    if pads is None or not bool(pads[row].any()):
        return one
    width, columns = pads.shape[1], (~pads[row]).nonzero()[:, 0]
    inputs = {
        name: value[:, columns]
        if isinstance(value, torch.Tensor) and value.ndim == 2 and value.shape[1] == width
        else value
        for name, value in one.inputs.items()
    }
    return Batch(inputs, one.rows)


def _supervised(subject: Subject, batch: Batch) -> list[int]:
    labels = batch.labels
    if not isinstance(labels, torch.Tensor) or labels.ndim < 2 or labels.is_floating_point():
        return [1] * len(batch)
    if not getattr(subject.config, "is_encoder_decoder", False) and labels.shape[1] > 1:
        ids = batch.inputs.get("input_ids")
        if isinstance(ids, torch.Tensor) and ids.shape == labels.shape:
            same = labels == ids
            if bool((same | (labels == -100)).all()):  # next tokens: the first is never predicted
                labels = labels[:, 1:]
    return [int(n) for n in (labels != -100).flatten(1).sum(1)]


def _difference(whole: Trace, parts: list[Trace], pads: torch.Tensor | None) -> float | None:
    logits = whole.logits
    if logits is None or logits.ndim < 2 or logits.shape[0] != len(parts):
        return None
    largest = 0.0
    for row, part in enumerate(parts):
        own = part.logits
        if own is None or own.shape[0] != 1:
            return None
        seen = logits[row]
        if pads is not None and logits.ndim == 3 and logits.shape[1] == pads.shape[1]:
            seen = seen[~pads[row]]
        if seen.shape != own[0].shape:
            return None
        gap = (seen.float() - own[0].float()).abs()
        largest = max(largest, float(gap.max()) if gap.numel() else 0.0)
    spread = float(logits.float().std()) if logits.numel() > 1 else 0.0
    return largest / spread if spread > 0 else None


def batched_differs(
    rows: OneByOne,
    *,
    tolerance: Annotated[
        float, "of the predictions' spread: single precision leaves under 1e-4, positions tenths"
    ] = 1e-2,
    rounding: Annotated[float, "relative, of a loss; single precision leaves 1e-6"] = 1e-3,
) -> Iterator[Fault]:
    """A row in the batch is not the row alone, or the batch's loss not their mean."""
    if rows.half:
        tolerance, rounding = max(tolerance, 0.1), max(rounding, 0.02)
    if not all(math.isfinite(loss) for loss in (rows.batched, *rows.alone)):
        return
    if rows.padded and rows.difference is not None and not rows.difference <= tolerance:
        yield _positions_fault(rows)
        return
    count = len(rows.alone)
    means = [_mean(rows.alone, n) for n in ((1,) * count, rows.supervised, rows.positions)]
    if any(abs(rows.batched - mean) <= rounding * max(abs(mean), 1e-9) for mean in means):
        return
    sums = [(mean, float(count), "the sum over its rows") for mean in means[:2]]
    diluted = [
        (mean, counted, "a mean that counts padding")
        for counted in _shares_counted(rows)
        for mean in means[1:]
    ]
    for mean, factor, what in sums + diluted:
        if factor != 1 and abs(rows.batched / factor - mean) <= rounding * max(abs(mean), 1e-9):
            yield Fault(
                f"the loss of {count} rows is {rows.batched:.4g}, {what}: "
                f"{factor:.3g} times the mean of its rows, {mean:.4g}",
                subject="loss",
                severity="note" if rows.stock else "warning",  # CTC heads add up by default
                evidence={
                    "seen": f"{rows.batched:.4g}",
                    "expected": f"{mean:.4g}",
                    "factor": factor,
                },
                fix='loss = F.cross_entropy(logits, labels, reduction="mean", ignore_index=-100)',
            )
            return


def _shares_counted(rows: OneByOne) -> Iterator[float]:
    """The share of the batch's places that are no padding: all, and those with a token before."""
    for lost in (0, 1):
        places = len(rows.alone) * (rows.width - lost)
        if places > 0:
            yield sum(max(n - lost, 0) for n in rows.positions) / places


def _mean(values: Sequence[float], weights: Sequence[int]) -> float:
    total = sum(weights)
    weighted = math.fsum(v * n for v, n in zip(values, weights, strict=True))
    return weighted / total if total else math.nan


def _positions_fault(rows: OneByOne) -> Fault:
    side = "left" if rows.left else "right"
    fix = "position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)" if rows.left else None
    return Fault(
        f"with {rows.padded} positions of {side} padding, predictions of the same rows move by "
        f"{rows.difference:.2g} of their spread",
        subject="padding",
        severity="warning"
        if rows.left
        else "note",  # behind the tokens it is padding-leak's affair
        evidence={
            "seen": f"{rows.difference:.2g} of the predictions' spread",
            "expected": "0",
            "padded": rows.padded,
            "batched": rows.batched,
        },
        fix=fix,
    )


COMPARE_ONE_BY_ONE = Probe("run rows one by one", "probe", (OneByOne,), measure_one_by_one)

PADDED_LOSS_DIFFERS = Check(
    name="padded-loss-differs",
    stage="baselines",
    severity="warning",
    moments=("probe",),
    why="What a row gives must not depend on the rows that it is batched with.",
    fix='tokenizer.padding_side = "right"  # or hand position_ids to the model',
    source="Karpathy, A Recipe for Training Neural Networks, 2019 (generalise a special case)",
    unsure="Losses that weigh classes or compare rows are no mean of their rows' and are left in "
    "peace, unless they are exactly the sum.",
    judges=(batched_differs, padding_counts),
)
