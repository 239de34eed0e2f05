"""Worst examples: from predictions back to data.

What a trained model gets wrong, surely and often, says more of the data than its mean does: wrong
labels stand at the head, classes that are taken for each other come in pairs, and a slice that
does badly has a reason. Evenly spaced rows of the first evaluation set are run once more at the
end, in evaluation mode and without a trace. Tables that show rows stay on this machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hf_recipe.core.check import Skip
from hf_recipe.core.exhibit import Cell, Exhibit, Table
from hf_recipe.instruments.heads import REGRESSION, Head, read_head
from hf_recipe.instruments.subject import Subject

ROWS = 512
LISTED = 50  # examples in a table
PAIRS = 20
LONGEST = 200  # characters of an example
FEWEST = 8  # rows of a slice

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Verdicts:
    """What a model says of some rows.

    Attributes:
        rows: (n,) data set row numbers.
        losses: (n,) of each row; mean over its positions.
        labels, said: (n,) class of the row and class said; -1 where a row has no single class.
        sure: (n,) chance of what was said; NaN where there is none.
        lengths: (n,) attended tokens, or 0 where rows have no length.
        texts: (n,) the rows as a reader knows them; "" where they cannot be written.
        names: of the classes.
    """

    rows: Integers
    losses: Floats
    labels: Integers
    said: Integers
    sure: Floats
    lengths: Integers
    texts: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def classified(self) -> bool:
        """Whether every row has one class."""
        return bool(len(self.rows)) and bool((self.said >= 0).all())


def judge_rows(subject: Subject, split: str, *, most: int = ROWS) -> Verdicts:
    """Run up to `most` evenly spaced rows of `split`. Call it quietly, on all ranks.

    Raises:
        Skip: rows cannot be read ahead, or the head has no loss of its own for each.
    """
    size = int(getattr(subject.args, "per_device_eval_batch_size", 8))
    subject.model.eval()
    parts: list[dict[str, Any]] = []
    task = ""
    for batch in subject.batches(split, rows=most, size=size):
        with torch.no_grad():
            loss, outputs = subject.compute_loss(batch.inputs, outputs=True)
        head = read_head(subject.model, batch.inputs, outputs, observed=float(loss), prefer=task)
        if head.task in ("contrastive", "span"):
            raise Skip(f"the rows of a {head.task} head have no prediction of their own")
        task = head.task
        parts.append(_read(head, batch, subject.processing_class))
    if not parts:
        raise Skip(f"the {split} data has no rows")
    names = _names(subject, max(int(part["labels"].max(initial=-1)) for part in parts))
    joined = {
        key: np.concatenate([part[key] for part in parts])
        for key in ("rows", "losses", "labels", "said", "sure", "lengths")
    }
    return Verdicts(**joined, texts=tuple(t for part in parts for t in part["texts"]), names=names)


def _read(head: Head, batch: Any, processing_class: Any) -> dict[str, Any]:
    """The verdicts of one batch."""
    count = len(batch)
    groups, each = head.groups.long().cpu(), head.row_losses().double().cpu()
    total = torch.zeros(count, dtype=torch.double).index_add_(0, groups, each)
    seen = torch.zeros(count, dtype=torch.double).index_add_(0, groups, torch.ones_like(each))
    labels, said = np.full(count, -1), np.full(count, -1)
    sure = np.full(count, np.nan)
    if head.task == "classification" and head.problem_type != REGRESSION:
        chances = head.logits.double().softmax(-1).cpu()
        labels[groups] = head.labels.cpu()
        said[groups] = chances.argmax(-1)
        sure[groups] = chances.max(-1).values
    mask = batch.inputs.get("attention_mask")
    is_mask = isinstance(mask, torch.Tensor) and mask.ndim == 2
    return {
        "rows": np.asarray(batch.rows if batch.rows else range(count), dtype=np.int64),
        "losses": torch.where(seen > 0, total / seen.clamp(min=1), torch.nan).numpy(),
        "labels": labels.astype(np.int64),
        "said": said.astype(np.int64),
        "sure": sure,
        "lengths": mask.sum(1).long().cpu().numpy() if is_mask else np.zeros(count, np.int64),
        "texts": _texts(batch, processing_class),
    }


def _texts(batch: Any, processing_class: Any) -> list[str]:
    ids = batch.inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        return [""] * len(batch)
    if len(ids) != len(batch):
        raise Skip("the collator joins rows, so that they cannot be told apart")
    if not hasattr(processing_class, "batch_decode"):
        return [" ".join(map(str, row[:30])) for row in ids.tolist()]
    decoded = processing_class.batch_decode(ids, skip_special_tokens=True)
    return [text[:LONGEST] for text in decoded]


def _names(subject: Subject, highest: int) -> tuple[str, ...]:
    known = getattr(subject.config, "id2label", None) or {}
    return tuple(str(known.get(i, i)) for i in range(max(highest + 1, len(known))))


# ---------------------------------------------------------------- what is drawn


def exhibits(seen: Verdicts, split: str) -> Iterator[Exhibit]:
    """Highest losses, most confident mistakes, confusion pairs, slices."""
    yield worst(seen, split)
    if seen.classified:
        wrong = np.flatnonzero(seen.said != seen.labels)
        if len(wrong):
            surest = wrong[np.argsort(-seen.sure[wrong], kind="stable")][:LISTED]
            yield _listed(seen, surest, f"Most confident mistakes of {split}")
            yield confusions(seen, split)
    yield slices(seen, split)


def worst(seen: Verdicts, split: str) -> Table:
    """The rows with the highest loss; those without a finite one first."""
    keys = np.where(np.isfinite(seen.losses), -seen.losses, -np.inf)
    known = np.flatnonzero(~np.isnan(seen.losses))
    order = known[np.argsort(keys[known], kind="stable")][:LISTED]
    return _listed(seen, order, f"Highest losses of {split}")


def _listed(seen: Verdicts, order: Integers, title: str) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for i in order:
        known = seen.classified
        rows.append((
            int(seen.rows[i]), float(f"{seen.losses[i]:.4g}"),
            *((_name(seen, seen.labels[i]), _name(seen, seen.said[i]),
               float(f"{seen.sure[i]:.4g}")) if known else ()),
            seen.texts[i],
        ))  # fmt: skip
    head = ("row", "loss", *(("label", "said", "chance of it") if seen.classified else ()), "")
    return Table(title, "baselines", head, tuple(rows), f"of {len(seen.rows):,} rows", private=True)


def _name(seen: Verdicts, place: int) -> str:
    return seen.names[place] if 0 <= place < len(seen.names) else str(int(place))


def confusions(seen: Verdicts, split: str) -> Table:
    """Which class is taken for which, the commonest pair first."""
    classes = int(max(seen.labels.max(), seen.said.max())) + 1
    wrong = seen.said != seen.labels
    codes = seen.labels[wrong] * classes + seen.said[wrong]
    pairs, times = np.unique(codes, return_counts=True)
    sizes = np.bincount(seen.labels[seen.labels >= 0], minlength=classes)
    rows = tuple(
        (_name(seen, pairs[i] // classes), _name(seen, pairs[i] % classes), int(times[i]),
         round(float(times[i] / max(sizes[pairs[i] // classes], 1)), 4))
        for i in np.argsort(-times, kind="stable")[:PAIRS]
    )  # fmt: skip
    head = ("label", "said", "times", "share of the label's rows")
    caption = f"{int(wrong.sum()):,} mistakes in {len(seen.rows):,} rows"
    return Table(f"Confusion pairs of {split}", "baselines", head, rows, caption, private=True)


def slices(seen: Verdicts, split: str) -> Table:
    """Loss (and accuracy) by class and by length, the worst slice first."""
    parts: list[tuple[str, npt.NDArray[np.bool_]]] = []
    if seen.classified:
        for k in np.unique(seen.labels):
            parts.append((f"label {_name(seen, k)}", seen.labels == k))
    if len(np.unique(seen.lengths)) > 4:
        edges = np.unique(np.quantile(seen.lengths, (0, 0.25, 0.5, 0.75, 1)))
        for low, high in itertools.pairwise(edges):
            last = high == edges[-1]
            inside = (seen.lengths >= low) & ((seen.lengths <= high) if last else
                                              (seen.lengths < high))  # fmt: skip
            parts.append((f"{low:.0f} to {high:.0f} tokens", inside))
    rows: list[tuple[Cell, ...]] = []
    for name, inside in [("all", np.ones(len(seen.rows), dtype=bool)), *parts]:
        inside = inside & ~np.isnan(seen.losses)
        count = int(inside.sum())
        if count < min(FEWEST, len(seen.rows)):
            continue
        right = float((seen.said == seen.labels)[inside].mean()) if seen.classified else None
        error = float(seen.losses[inside].std() / count**0.5)
        rows.append((name, count, float(f"{seen.losses[inside].mean():.4g}"), float(f"{error:.2g}"),
                     None if right is None else round(right, 4)))  # fmt: skip
    rows[1:] = sorted(rows[1:], key=lambda row: -float(row[2] or 0))
    head = ("slice", "rows", "loss", "standard error", "accuracy")
    return Table(f"Slices of {split}", "baselines", head, tuple(rows), private=True)
