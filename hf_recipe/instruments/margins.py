"""The margin of every training row's label, as the run's own forward passes show it.

The first passes over the data are heard, and of the later ones every second: a row's margin then
changes little from one to the next. A margin is taken before the step that learns from the row, so
that in the first pass it is out of sample. What the run says while it is wrong about most rows is
not taken: it does not know yet, and at a high rate it leans, surely, to one class now and to
another soon. One forward hook keeps references to the logits; they are turned into margins at a
flush, all steps together, so that a step pays for little more than the hook.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from hf_recipe.instruments.distributed import from_all_ranks
from hf_recipe.instruments.row_losses import logits_of

MOST_ROWS = 500_000  # of a data set that are followed; beyond, every second, third, ...
MOST_KEPT = 1 << 20  # logits that may wait for a flush
EPOCHS = 3  # passes that are all heard, and are at any rate: few rows are learnt by heart so soon
KNOWS = 0.5  # share of the rows contradicted, up to which the run is a witness at all
RECENT, CHUNK = 128, 16  # rows of which that is the share, and after how many it is told anew
STRANGE = 0.05  # share of the rows whose label changes, from which row numbers are not believed
UNNUMBERED = "which rows a batch holds is not known"

MicroBatch = tuple[Sequence[torch.Tensor], Any, Sequence[int]]  # logits heard, labels, rows


class MarginWatch:
    """Mean margins by row of the data set over the first half, or first epochs, of a run.

    Args:
        rows: length of the training set.
        last_step: the step after which nothing is taken any more.
        epoch: optimizer steps of a pass over the data; 0: not known, and all are heard.
        heard: the logits of the model's forward passes since it was last emptied, two at most; to
            be emptied as a micro-batch begins: what was heard outside of one is not the run's.

    Attributes:
        reason: why there are none, once that is known.
        listening: whether forward passes are heard.
    """

    def __init__(
        self,
        rows: int,
        last_step: int,
        heard: list[torch.Tensor] | None = None,
        epoch: int = 0,
    ) -> None:
        self.stride = -(-rows // MOST_ROWS) or 1
        size = -(-rows // self.stride)
        self.last_step = last_step
        self.epoch = epoch
        self.heard = heard if heard is not None else []
        self.reason = ""
        self.sums = np.zeros(size, dtype=np.float32)
        self.counts = np.zeros(size, dtype=np.int32)
        self.labels = np.full(size, -1, dtype=np.int32)
        self.others = np.zeros(size, dtype=np.int32)
        self._strange = self._seen = self._computed = 0
        self._room = 1  # rows that may wait for a flush
        self._contradicted = 1.0  # running share of the recent rows
        self._waiting: list[MicroBatch] = []
        self._done: list[tuple[Any, Any, Any, Any]] = []
        self._hook: Any = None
        self.listening = False

    def arm(self, model: nn.Module) -> None:
        """Hook the model's forward pass; again is the same as once."""
        self.disarm()
        self._hook = model.register_forward_hook(self._hear)
        self.listening = True

    def disarm(self) -> None:
        """Take the hook off."""
        if self._hook is not None:
            self._hook.remove()
        self._hook, self.listening = None, False
        self.heard.clear()

    def _hear(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        if module.training and len(self.heard) < 2:
            logits = outputs.get("logits") if isinstance(outputs, dict) else logits_of(outputs)
            if isinstance(logits, torch.Tensor) and logits.requires_grad:
                self.heard.append(logits.detach())

    # ---------------------------------------------------------------- a run, in its order

    def hears(self, step: int) -> bool:
        """Whether the forward passes of step `step` are heard."""
        nth = (step - 1) // self.epoch if self.epoch else 0
        return step <= self.last_step and not self.reason and (nth < EPOCHS or nth % 2 == 0)

    def changes_after(self, step: int) -> int | None:
        """The next step from which `hears` may say otherwise; None: it never will."""
        if step > self.last_step or self.reason:
            return None
        if not self.epoch:
            return self.last_step + 1
        passes = max(EPOCHS, (step - 1) // self.epoch + 1)
        return min(passes * self.epoch, self.last_step) + 1

    def step_begins(self, step: int, model: nn.Module) -> None:
        """Step `step` is next, from which `model` may be heard, or not any more."""
        if self.hears(step) != self.listening:
            self.disarm() if self.listening else self.arm(model)

    def add(self, labels: Any, rows: Sequence[int]) -> None:
        """One micro-batch has run: `labels` of its `rows`, in order."""
        logits = tuple(self.heard)
        self.heard.clear()
        if not self._seen:
            self.reason = _unsuited(logits, labels, rows)
            if self.reason:
                self.disarm()
                return
            self._room = max(1, MOST_KEPT // logits[0].shape[1])
        self._seen += len(rows)
        self._waiting.append((logits, labels, rows))
        if self._seen >= self._computed + self._room:
            self._compute()

    def flush(self) -> None:
        """Take in what waits, of all ranks. A collective: all ranks call it."""
        self._compute()
        done, self._done = self._done, []
        for part in from_all_ranks(done):
            for rows, margins, labels, others in part:
                self._take(rows, margins, labels, others)

    def scores(self) -> npt.NDArray[np.float64]:
        """(followed rows,) mean margins; NaN where a row was not seen."""
        counts = np.maximum(self.counts, 1)
        return np.where(self.counts > 0, self.sums / counts, np.nan).astype(np.float64)

    def row_numbers(self) -> npt.NDArray[np.int64]:
        """(followed rows,) their numbers in the data set."""
        return np.arange(len(self.sums), dtype=np.int64) * self.stride

    # ---------------------------------------------------------------- resume

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON: no label, no input."""
        return {
            "stride": self.stride,
            "rows": len(self.sums),
            "sums": base64.b64encode(self.sums.astype(np.float16).tobytes()).decode(),
            "counts": base64.b64encode(self.counts.astype(np.uint16).tobytes()).decode(),
            "contradicted": self._contradicted,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; one of another data set is ignored."""
        if not state or state["rows"] != len(self.sums) or state["stride"] != self.stride:
            return
        sums = np.frombuffer(base64.b64decode(state["sums"]), dtype=np.float16)
        counts = np.frombuffer(base64.b64decode(state["counts"]), dtype=np.uint16)
        self.sums, self.counts = sums.astype(np.float32), counts.astype(np.int32)
        self._contradicted = float(state.get("contradicted", 1.0))

    # ---------------------------------------------------------------- inside

    @torch.no_grad()
    def _compute(self) -> None:
        waiting, self._waiting, self._computed = self._waiting, [], self._seen
        if not all(rows for _, _, rows in waiting):
            self.reason = UNNUMBERED
            self.disarm()
        waiting = [item for item in waiting if not _unsuited(*item)]  # one cut short is skipped
        if not waiting:
            return
        width = waiting[0][0][0].shape[1]
        waiting = [item for item in waiting if item[0][0].shape[1] == width]
        logits = torch.cat([z[0] for z, _, _ in waiting]).float()
        labels = torch.cat([y if y.ndim == 1 else y.reshape(-1) for _, y, _ in waiting])
        labels = labels.to(logits.device).long()
        inside = (labels >= 0) & (labels < width)
        places = torch.where(inside, labels, 0)[:, None]
        own = logits.gather(1, places)[:, 0]
        best = logits.scatter(1, places, -torch.inf).max(dim=1)
        found = torch.stack([own - best.values, best.indices.float(), labels.float()]).cpu().numpy()
        rows = np.array([row for _, _, r in waiting for row in r], dtype=np.int64)
        good = inside.cpu().numpy() & np.isfinite(found[0]) & (rows % self.stride == 0)
        self._done.append((rows[good], found[0][good], found[2][good], found[1][good]))

    def _take(self, rows: Any, margins: Any, labels: Any, others: Any) -> None:
        places = rows // self.stride
        inside = places < len(self.sums)
        known = self.labels[places[inside]]
        same = (known < 0) | (known == labels[inside])
        self._strange += int((~same).sum())
        if self._strange > STRANGE * max(self._seen, 20):
            self.reason = "labels of the same rows change, so their row numbers are not known"
            self.disarm()
        kept = np.flatnonzero(inside)[same]
        self.labels[places[kept]] = labels[kept].astype(np.int32)
        kept = kept[self._knows(margins)[kept]]
        where = places[kept]
        np.add.at(self.sums, where, margins[kept].astype(np.float32))
        np.add.at(self.counts, where, 1)
        self.others[where] = others[kept].astype(np.int32)

    def _knows(self, margins: Any) -> npt.NDArray[np.bool_]:
        """Which margins, in their order, were taken while most recent labels were confirmed."""
        starts = np.arange(0, len(margins), CHUNK)
        sizes = np.minimum(CHUNK, len(margins) - starts)
        wrong = np.add.reduceat((margins < 0).astype(int), starts) / sizes
        knows = []
        for share, size in zip(wrong.tolist(), sizes.tolist(), strict=True):
            knows.append(self._contradicted <= KNOWS)
            self._contradicted += (share - self._contradicted) * min(1.0, size / RECENT)
        return np.repeat(np.array(knows, dtype=bool), sizes)


def _unsuited(logits: Sequence[torch.Tensor], labels: Any, rows: Sequence[int]) -> str:
    """Why a micro-batch has no margins by row, or ""."""
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        return "the labels are no class numbers"
    if len(logits) != 1:
        return f"a step runs the model {len(logits)} times, or its logits are not seen"
    shape = logits[0].shape
    if len(shape) != 2 or shape[1] < 2 or labels.numel() != shape[0]:
        return "there is not one label for each row, of two classes or more"
    if len(rows) != shape[0]:
        return UNNUMBERED
    return ""
