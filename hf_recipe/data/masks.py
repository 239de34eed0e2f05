"""Which positions does the loss see?

Labels of -100 are left out of the loss. A collator, a chat template or a truncation that masks
everything gives loss 0.0 and a run that "succeeds"; rows that are masked whole are paid for and
teach nothing. What the network gets is looked at, after the real collator.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch

from hf_recipe.core.check import Check, Located, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.data.source import splits_of
from hf_recipe.data.tokenizer import collated
from hf_recipe.instruments.batches import Batch
from hf_recipe.instruments.held_modules import held_teachers
from hf_recipe.instruments.subject import Subject

IGNORED = -100
PICTURES = 128  # rows without token ids that are collated: a share is known to +- 4 points


@dataclass(frozen=True)
class Supervision(Measurement):
    """How much of the labels the loss sees, in collated batches.

    Attributes:
        rows: rows collated; positions: label positions in them, those of padding left out.
        supervised: positions that count in the loss.
        rows_without: rows without a single one.
        drawn: whether the positions are drawn at random (masked language modelling), so that a
            short row may lawfully have none.
        shifted: whether the model predicts position t + 1 from t, so that the first label of a
            row never counts.
        taught: whether a teacher speaks for rows that carry no label of their own.
        examples: data set rows without a supervised position.
    """

    rows: int
    positions: int
    supervised: int
    rows_without: int
    drawn: bool = False
    shifted: bool = False
    taught: bool = False
    examples: tuple[int, ...] = ()


def shifts_labels(model: Any) -> bool:
    """Whether the model itself compares the output at t with the label at t + 1."""
    name = type(model).__name__
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return False
    return "CausalLM" in name or ("LMHead" in name and "Masked" not in name and "XLNet" not in name)


def take_supervision(subject: Subject) -> Iterator[Located]:
    """Count supervised positions of every split's batches."""
    reasons = []
    for split in splits_of(subject) or ["train"]:
        try:
            yield Located(supervision(subject, split, _batches(subject, split)), split)
        except Skip as reason:
            reasons.append(str(reason))
    if len(reasons) == len(splits_of(subject) or ["train"]):
        raise Skip("; ".join(dict.fromkeys(reasons)))


def _batches(subject: Subject, split: str) -> Iterable[Batch]:
    try:
        return collated(subject, split)
    except Skip:  # no token ids: images have labels too, but each takes milliseconds to read
        return subject.batches(split, rows=PICTURES, size=PICTURES // 8)


def supervision(subject: Subject, split: str, batches: Iterable[Batch]) -> Supervision:
    """The counts over `batches`; raises Skip where the labels are no class numbers."""
    shifted = shifts_labels(subject.model)
    rows = positions = supervised = 0
    one_each = True
    without: list[int] = []
    first: tuple[torch.Tensor, Sequence[int]] | None = None
    for batch in batches:
        labels = class_labels(batch)
        first = first or (labels, batch.rows)
        one_each = one_each and labels.ndim == 1
        counted = labels != IGNORED
        if shifted and counted.ndim == 2:
            counted[:, 0] = False
        per_row = counted.reshape(len(counted), -1).sum(dim=1)
        there = attended(batch, labels)
        rows += len(labels)
        positions += int(there.sum())
        supervised += int(per_row.sum())
        for place in torch.nonzero(per_row == 0).flatten().tolist():
            without.append(batch.rows[place] if batch.rows else -1)
    return Supervision(
        rows=rows,
        positions=positions,
        supervised=supervised,
        rows_without=len(without),
        drawn=first is not None and _is_drawn(subject, split, *first),
        shifted=shifted,
        taught=one_each and bool(held_teachers(subject.trainer, subject.model)),
        examples=tuple(row for row in without[:20] if row >= 0),
    )


def class_labels(batch: Batch) -> torch.Tensor:
    """The batch's labels as (rows,) or (rows, positions) of class numbers, on the CPU.

    Raises:
        Skip: there are none, or they are quantities, flags or start positions.
    """
    labels = batch.inputs.get("labels")
    if labels is None:
        labels = batch.inputs.get("label", batch.inputs.get("label_ids"))
    if not isinstance(labels, torch.Tensor):
        raise Skip("the batches carry no tensor of labels")
    if labels.is_floating_point() or labels.ndim == 0 or labels.dtype == torch.bool:
        raise Skip("the labels are quantities or flags, of which none is masked")
    return labels.detach().cpu().reshape(len(labels), -1) if labels.ndim > 1 else labels.cpu()


def attended(batch: Batch, labels: torch.Tensor) -> torch.Tensor:
    """Which label positions stand over something other than padding, where that can be told."""
    mask = batch.inputs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.shape == labels.shape:
        return mask.detach().cpu() != 0
    return torch.ones_like(labels, dtype=torch.bool)


def _is_drawn(subject: Subject, split: str, one: torch.Tensor, rows: Sequence[int]) -> bool:
    """Whether collating the same rows again masks other positions than in the labels `one`."""
    if "MaskedLM" in type(subject.model).__name__:
        return True
    if not rows:
        return False
    two = class_labels(subject.rows(split).batch(rows))
    return one.shape != two.shape or not torch.equal(one != IGNORED, two != IGNORED)


def labels_masked(
    seen: Supervision,
    *,
    warn_fraction: Annotated[
        float, "rows without supervision; completion-only data lose some to truncation (judged)"
    ] = 0.2,
    enough: Annotated[
        int, "positions from which none drawn at 15 % is no chance (.85^64 < 1e-4)"
    ] = 64,
) -> Iterator[Fault]:
    """Nothing supervised (error), many rows without (warning), some (note)."""
    if not seen.rows or seen.taught:
        return
    share = seen.rows_without / seen.rows
    evidence = {
        "seen": f"supervised positions {seen.supervised:,}/{seen.positions:,}",
        "expected": "some in every row",
        "rows_without": seen.rows_without,
        "fraction": share,
    }
    if seen.supervised == 0:
        if not seen.drawn or seen.positions >= enough:
            yield Fault(
                message=f"no position is supervised: {seen.supervised:,} of {seen.positions:,} "
                f"label positions in {seen.rows:,} rows count in the loss",
                severity="error",
                evidence=evidence,
                examples=seen.examples,
            )
    elif seen.rows_without and not seen.drawn:
        yield Fault(
            message=f"{seen.rows_without:,} of {seen.rows:,} rows ({share:.1%}) have no supervised "
            f"position; {seen.supervised:,} of {seen.positions:,} positions are supervised in all",
            severity="warning" if share > warn_fraction else "note",
            evidence=evidence,
            examples=seen.examples,
        )


SUPERVISION = Probe("count supervised positions", "batch", (Supervision,), take_supervision)

LABELS_MASKED = Check(
    name="labels-masked",
    stage="data",
    severity="warning",
    moments=("batch",),
    why="Labels of -100 are left out of the loss: with nothing supervised the loss is 0.0 or NaN "
    "and the run 'succeeds'.",
    fix="look at batch['labels']: does the response template occur, is max_length long enough?",
    source="trl issues 644 and 1053, 2023; LLaMA-Factory issue 6668, 2026",
    judges=(labels_masked,),
    unsure="Long prompts that truncation leaves without an answer, where that is meant.",
    explains=(
        "loss-not-finite",
        "loss-not-decreasing",
        "one-batch-not-overfit",
        "parameter-without-gradient",
    ),
)
