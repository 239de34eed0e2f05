"""What an evaluation answered, row by row: enough to count its metrics again.

Taken where `prediction_step` hands back logits and labels, before anything of the user's touches
them. Of a row only its answer and its label are kept (or, of a sequence, how many of its tokens
were right), so that memory does not grow with the number of classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

import numpy as np
import torch

from hf_recipe.instruments.distributed import from_all_ranks

Array = np.ndarray[Any, np.dtype[np.float64]]
Kind = Literal["class", "token", "number", "flags"]

MOST_ROWS = 65_536
MOST_FLAGS = 32  # yes-or-no outputs of a row that are kept
IGNORED = -100

# Columns of a sequence's row.
SUPERVISED, RIGHT, SUPERVISED_AHEAD, RIGHT_AHEAD, POSITIONS, ACROSS = range(6)


@dataclass(frozen=True)
class Answers:
    """One evaluation's answers on all ranks, in the set's order.

    Attributes:
        kind: "class": columns answer, label, tied (0 or 1); "number": answer, target; "flags":
            K outputs, then K labels; "token": supervised positions, those right, the same with
            the answer at each position against the next one's label, positions, and those right
            when the highest logit is sought across positions (-1: shapes forbid it).
        rows: (rows, columns); rows that were dealt out twice to fill a batch are cut off.
        repeated: the same, with them; None where there are none.
        rounds: rows of each round of batches (one batch of every rank), before the cut.
        ranks: the rows of each rank alone; empty on one process.
        outputs: classes, or yes-or-no outputs, of a row.
    """

    kind: Kind
    rows: Array
    repeated: Array | None
    rounds: tuple[int, ...]
    ranks: tuple[Array, ...]
    outputs: int


class AnswerSheet:
    """Collects one evaluation's answers; `why` says why there are none."""

    def __init__(self) -> None:
        self.wanted = False
        self.clear()

    def clear(self) -> None:
        """Forget the evaluation so far."""
        self.kind: Kind | None = None
        self.outputs = 0
        self.why = ""
        self._batches: list[torch.Tensor] = []
        self._rows = 0

    def add(self, logits: Any, labels: Any) -> None:
        """Take in one batch as `prediction_step` returned it; nothing is read to the host."""
        if not self.wanted or self.why:
            return
        made = counted(logits, labels)
        if made is None:
            self._refuse("the answers' form is not one that can be counted again")
            return
        kind, outputs, rows = made
        if self.kind not in (None, kind) or (self.outputs not in (0, outputs)):
            self._refuse("the answers' form changes from batch to batch")
            return
        self.kind, self.outputs = kind, outputs
        self._rows += len(rows)
        if self._rows > MOST_ROWS:
            self._refuse(f"more than {MOST_ROWS:,} rows")
            return
        self._batches.append(rows)

    def _refuse(self, why: str) -> None:
        self.why, self._batches = why, []

    def take(self, size: int | None) -> Answers | None:
        """The answers of all ranks, then forget. A collective: all ranks call it.

        Args:
            size: rows of the evaluation set; None where it has no length.
        """
        own = [batch.double().cpu().numpy() for batch in self._batches]
        everyone = from_all_ranks((self.kind, self.outputs, own))
        self.clear()
        kind, outputs, first = everyone[0]
        if kind is None or not first or any(e[:2] != (kind, outputs) for e in everyone):
            return None
        if size is None and len(everyone) > 1:
            return None  # a stream: rows that were dealt out twice cannot be told
        parts = [e[2] for e in everyone]
        dealt = [[b for b in same if b is not None] for same in zip_longest(*parts)]
        flat = np.concatenate([b for same in dealt for b in same])
        cut = size is not None and size < len(flat)
        several = len(everyone) > 1
        return Answers(
            kind=kind,
            rows=flat[:size] if cut else flat,
            repeated=flat if cut else None,
            rounds=tuple(sum(len(b) for b in same) for same in dealt),
            ranks=tuple(np.concatenate(each) for each in parts if each) if several else (),
            outputs=outputs,
        )


@torch.no_grad()
def counted(logits: Any, labels: Any) -> tuple[Kind, int, torch.Tensor] | None:
    """(kind, outputs of a row, (rows, columns)) of a batch, or None where its form is unknown."""
    if isinstance(logits, (tuple, list)):
        logits = next((x for x in logits if isinstance(x, torch.Tensor) and x.ndim), None)
    if not isinstance(logits, torch.Tensor) or not isinstance(labels, torch.Tensor):
        return None
    if not logits.is_floating_point() or not logits.ndim or not labels.ndim:
        return None
    if len(logits) != len(labels):
        return None
    whole = not labels.is_floating_point() and labels.dtype != torch.bool
    if logits.numel() == labels.numel() == len(labels):
        return "number", 1, _columns(logits.reshape(-1), labels.reshape(-1))
    if logits.shape == labels.shape and logits.ndim == 2 and labels.shape[1] <= MOST_FLAGS:
        return "flags", labels.shape[1], torch.cat([logits.float(), labels.float()], 1)
    if whole and logits.ndim == 2 and labels.numel() == len(labels) and logits.shape[1] > 1:
        top, answer = logits.max(1)
        tied = (logits == top[:, None]).sum(1) > 1
        return "class", logits.shape[1], _columns(answer, labels.reshape(-1), tied)
    if whole and logits.ndim == 3 and logits.shape[:2] == labels.shape:
        return "token", logits.shape[2], _tokens(logits, labels)
    return None


def _tokens(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    answer, counts = logits.argmax(-1), labels != IGNORED
    right = answer == labels
    ahead = (answer[:, :-1] == labels[:, 1:]) & counts[:, 1:]
    positions = torch.full_like(counts.sum(1), labels.shape[1])
    across = torch.full_like(positions, -1)
    if logits.shape[1] == logits.shape[2]:
        across = ((logits.argmax(1) == labels) & counts).sum(1)
    columns = [counts.sum(1), (right & counts).sum(1), counts[:, 1:].sum(1), ahead.sum(1)]
    return _columns(*columns, positions, across)


def _columns(*columns: torch.Tensor) -> torch.Tensor:
    return torch.stack([column.double() for column in columns], 1)
