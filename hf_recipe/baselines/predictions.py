"""The recipe's line "visualise prediction dynamics": a fixed batch followed through training.

"The dynamics of how these predictions move will give you incredibly good intuition for how the
training progresses" (Karpathy 2019). Eight fixed rows are run at every evaluation, in evaluation
mode and without a trace; the report shows the chance that each gives its label over time, and the
rows that changed most. Rows are named by their number alone.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import torch

from hf_recipe.core.check import Skip
from hf_recipe.core.exhibit import Cell, Curve, Exhibit, Line, Table
from hf_recipe.instruments.batches import Batch
from hf_recipe.instruments.heads import REGRESSION, SOFTMAX, Head, read_head
from hf_recipe.instruments.subject import Subject

ROWS = 8
MOMENTS = 256  # evaluations that are kept; every second one is dropped beyond


@dataclass
class PredictionsFollowed:
    """The predictions of a few fixed rows over the steps of a run.

    Attributes:
        split: whose rows.
        steps: when they were run.
        chances: for each moment and row, the geometric mean chance of the row's labels; of
            regressions, the prediction.
        said: for each moment and row, the class that was said; -1: no single class.
        task: as the head was read.
    """

    split: str = ""
    steps: list[int] = field(default_factory=list)
    chances: list[list[float]] = field(default_factory=list)
    said: list[list[int]] = field(default_factory=list)
    task: str = ""
    problem_type: str = ""
    rows: tuple[int, ...] = ()
    _batch: Batch | None = None

    def begin(self, subject: Subject) -> None:
        """Choose the rows: of the first evaluation set, or of the training set.

        Call it quietly. Raises Skip where rows cannot be read ahead.
        """
        split = next(iter(subject.evaluation), "train")
        self.__init__(split)  # type: ignore[misc]
        self._batch = subject.batch(split, size=ROWS)
        self.rows = self._batch.rows
        self.look(subject, subject.step)

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
        if len(self.steps) > MOMENTS:
            for kept in (self.steps, self.chances, self.said):
                del kept[1::2]

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
        ]

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
        return Table("Largest changes of predictions", "baselines", columns, tuple(rows))


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
