"""The recipe's line "visualise prediction dynamics": a fixed batch followed through training.

"The dynamics of how these predictions move will give you incredibly good intuition for how the
training progresses" (Karpathy 2019). Eight fixed rows are run at every evaluation, in evaluation
mode and without a trace; the report shows the chance that each gives its label over time, the rows
that changed most, and what was predicted, decoded, beside the truth. Rows are named by their
number; what is decoded comes out of the data and stays on this machine.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import torch

from hf_recipe.core.check import Skip
from hf_recipe.core.exhibit import Cell, Curve, Exhibit, Line, Table
from hf_recipe.data.preview import decoded
from hf_recipe.instruments.batches import Batch
from hf_recipe.instruments.heads import BINARY, REGRESSION, SOFTMAX, Head, read_head
from hf_recipe.instruments.subject import Subject

ROWS = 8
MOMENTS = 256  # evaluations that are kept; every second one is dropped beyond
SHOWN = 6  # moments whose decoded predictions are shown side by side
TOKENS, LONGEST = 48, 240  # of a decoded prediction
WORDS = ("causal", "masked", "seq2seq")
CHANGES, SAMPLES = "Largest changes of predictions", "Predictions, decoded"


@dataclass
class PredictionsFollowed:
    """The predictions of a few fixed rows over the steps of a run.

    Attributes:
        split: whose rows.
        steps: when they were run.
        chances: for each moment and row, the geometric mean chance of the row's labels; of
            regressions, the prediction.
        said: for each moment and row, the class that was said; -1: no single class.
        texts: for each moment and row, what was predicted, decoded; truths: what was right.
        task: as the head was read.
    """

    split: str = ""
    steps: list[int] = field(default_factory=list)
    chances: list[list[float]] = field(default_factory=list)
    said: list[list[int]] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)
    truths: list[str] = field(default_factory=list)
    task: str = ""
    problem_type: str = ""
    rows: tuple[int, ...] = ()
    _batch: Batch | None = None

    @classmethod
    def begin(cls, subject: Subject) -> PredictionsFollowed:
        """Choose the rows, of the first evaluation set or of the training set, and run them.

        Call it quietly. Raises Skip where rows cannot be read ahead.
        """
        split = next(iter(subject.evaluation), "train")
        batch = subject.batch(split, size=ROWS)
        followed = cls(split=split, rows=batch.rows, _batch=batch)
        followed.look(subject, subject.step)
        return followed

    def look(self, subject: Subject, step: int) -> None:
        """Run the rows once more. Call it quietly, on all ranks."""
        if self._batch is None or (self.steps and self.steps[-1] == step):
            return
        subject.model.eval()
        with torch.no_grad():
            loss, outputs = subject.compute_loss(self._batch.inputs, outputs=True)
        head = read_head(
            subject.model, self._batch.inputs, outputs, observed=float(loss), prefer=self.task
        )
        if head.problem_type == SOFTMAX and head.task in ("contrastive", "span"):
            raise Skip(f"the rows of a {head.task} head have no prediction of their own")
        self.task, self.problem_type = head.task, head.problem_type
        chances, said = read(head, len(self._batch))
        self.steps.append(step)
        self.chances.append(chances)
        self.said.append(said)
        self.texts.append(spoken(head, predicted(head), len(self._batch), subject))
        self.truths = spoken(head, head.labels, len(self._batch), subject)
        if len(self.steps) > MOMENTS:
            for kept in (self.steps, self.chances, self.said, self.texts):
                del kept[1::2]

    def numbers(self) -> dict[str, float]:
        """The last moment as numbers by name, and the largest change since the one before."""
        if not self.steps:
            return {}
        names = self.rows or range(len(self.chances[-1]))
        found = {f"row {n}": v for n, v in zip(names, self.chances[-1], strict=True)}
        if len(self.steps) > 1:
            pairs = zip(self.chances[-2], self.chances[-1], strict=True)
            jumps = [abs(b - a) for a, b in pairs if math.isfinite(a) and math.isfinite(b)]
            found |= {"largest change": max(jumps)} if jumps else {}
        return found

    def exhibits(self) -> list[Exhibit]:
        """What to draw once there are two moments."""
        if len(self.steps) < 2:
            return []
        names = [f"row {row}" for row in (self.rows or range(len(self.chances[0])))]
        label = "prediction" if self.problem_type == REGRESSION else "chance of the label"
        steps = tuple(float(step) for step in self.steps)
        lines = tuple(
            Line(name, steps, tuple(moment[i] for moment in self.chances))
            for i, name in enumerate(names)
        )
        title = f"Predictions of {len(names)} fixed rows of {self.split}"
        caption = "The same rows at every evaluation; a line that jumps is a rate too high."
        return [
            Curve(title, "baselines", "step", label, lines, caption=caption),
            self._changes(names),
            *([self._samples()] if any(map(any, self.texts)) else []),
        ]

    def _samples(self) -> Table:
        last = len(self.steps) - 1
        count = min(SHOWN, len(self.steps))
        shown = sorted({round(i * last / (count - 1)) for i in range(count)})
        rows: tuple[tuple[Cell, ...], ...] = tuple(
            (row, self.truths[i], *(self.texts[moment][i] for moment in shown))
            for i, row in enumerate(self.rows or range(len(self.truths)))
        )
        heads = ("row", "truth", *(f"step {self.steps[moment]}" for moment in shown))
        caption = "Each token is predicted after the true ones before it." * (self.task in WORDS)
        return Table(SAMPLES, "baselines", heads, rows, caption, private=True)

    def _changes(self, names: list[str]) -> Table:
        rows: list[tuple[Cell, ...]] = []
        for index, name in enumerate(names):
            course = [moment[index] for moment in self.chances]
            jumps = [abs(b - a) for a, b in itertools.pairwise(course)]
            largest = max(range(len(jumps)), key=lambda i: (math.isfinite(jumps[i]), jumps[i]))
            classes = [moment[index] for moment in self.said]
            turns = sum(a != b for a, b in itertools.pairwise(classes))
            when = f"{self.steps[largest]} to {self.steps[largest + 1]}"
            rows.append((name, course[0], course[-1], jumps[largest], when, turns))
        rows.sort(key=lambda row: -float(row[3] or 0))
        columns = ("row", "first", "last", "largest change", "in steps", "turns of the class")
        return Table(CHANGES, "baselines", columns, tuple(rows))


def predicted(head: Head) -> torch.Tensor:
    """What each supervised row of the head says: a class, 0 or 1 for each output, or a number."""
    if head.problem_type == SOFTMAX:
        return head.logits.argmax(-1)
    return (head.logits > 0).float() if head.problem_type == BINARY else head.logits


def spoken(head: Head, values: torch.Tensor, rows: int, subject: Subject) -> list[str]:
    """`values` of the head's rows as text, one for each example; empty for pictures of classes."""
    if head.task == "segmentation":
        return [""] * rows
    parts: list[list[torch.Tensor]] = [[] for _ in range(rows)]
    for group, value in zip(head.groups.tolist(), values.detach().cpu(), strict=True):
        if len(parts[group]) < TOKENS:
            parts[group].append(value)
    return [_text(head, part, subject)[:LONGEST] for part in parts]


def _text(head: Head, values: list[torch.Tensor], subject: Subject) -> str:
    if head.problem_type == REGRESSION:
        return ", ".join(f"{v:.4g}" for value in values for v in value.reshape(-1).tolist())
    names = getattr(subject.config, "id2label", None) or {}
    if head.problem_type == BINARY:
        on = [k for value in values for k, v in enumerate(value.tolist()) if v > 0.5]
        return ", ".join(str(names.get(k, k)) for k in on) or "none"
    classes = [int(value) for value in values]
    if head.task in WORDS:
        return decoded(subject.processing_class, classes)
    if head.task == "choice":
        return " ".join(map(str, classes))
    return " ".join(str(names.get(k, k)) for k in classes)


def read(head: Head, rows: int) -> tuple[list[float], list[int]]:
    """(chance of its labels, class said) for each example; -1: no single class."""
    groups = head.groups.long().cpu()
    if head.problem_type == REGRESSION:
        each = head.logits.double().mean(-1).cpu()
    else:
        each = -head.row_losses().double().cpu()
    total = torch.zeros(rows, dtype=torch.double).index_add_(0, groups, each)
    count = torch.zeros(rows, dtype=torch.double).index_add_(0, groups, torch.ones_like(each))
    mean = torch.where(count > 0, total / count.clamp(min=1), torch.nan)
    values = mean if head.problem_type == REGRESSION else mean.exp()
    said = [-1] * rows
    if head.task == "classification":
        for group, value in zip(groups.tolist(), head.logits.argmax(-1).tolist(), strict=True):
            said[group] = int(value)
    return values.tolist(), said
