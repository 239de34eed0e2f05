"""The same rows, asked of a student and of its teachers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_recipe.core.check import Skip
from hf_recipe.instruments.subject import Subject
from hf_recipe.tune import distillation_heads as heads
from hf_recipe.tune import distillation_models as models

ROWS = 128  # asked before training
CLASSES = 100  # a table of more tells nothing


@dataclass
class Answers:
    """One model's answers, batch by batch.

    Attributes:
        errors: per row: share of wrong top answers, squared error for numbers; NaN: not labelled.
        tops: top answer to every supervised item, labelled or not.
        said, hits, confidences: per labelled item: top answer, whether it is right (0 or 1), and
            its probability.
        labels: what was right, per labelled item.
        losses: in nats, per labelled item, of heads with `CLASSES` classes or fewer.
        seconds: spent on forward passes.
    """

    errors: list[Tensor] = field(default_factory=list)
    tops: list[Tensor] = field(default_factory=list)
    said: list[Tensor] = field(default_factory=list)
    hits: list[Tensor] = field(default_factory=list)
    confidences: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Asked:
    """What student and teachers (as one) said about the same rows.

    Attributes:
        divergence: mean over supervised items of KL(teacher || student), in nats.
        rows: how many were asked.
    """

    student: Answers
    teacher: Answers
    divergence: float
    rows: int


def ask(subject: Subject, teachers: list[nn.Module], split: str, rows: int) -> Asked:
    """Ask student and teachers about evenly spaced rows; two checks that ask the same share it.

    Raises:
        Skip: outputs that cannot be compared.
    """
    key = f"teacher's answers, {split}, {rows}, {subject.step}"
    if key not in subject.cache:
        try:
            subject.cache[key] = _ask(subject, teachers, split, rows)
        except ValueError as error:  # no logits, or logits that do not fit each other
            raise Skip(f"teacher and student cannot be compared: {error}") from None
    found: Asked = subject.cache[key]
    return found


def _ask(subject: Subject, teachers: list[nn.Module], split: str, rows: int) -> Asked:
    student, teacher = Answers(), Answers()
    subject.model.eval()
    total, items, asked = 0.0, 0, 0
    for batch in subject.batches(split, rows=rows):
        task = heads.task_of(subject.model, batch.inputs)
        inputs = models.with_decoder(subject.model, batch.inputs)
        started = time.perf_counter()
        ours = _logits(subject.model, task, inputs)
        between = time.perf_counter()
        each = [_logits(t.eval(), task, inputs) for t in teachers]
        weights = getattr(subject.trainer, "teacher_weights", None)
        theirs = heads.merged(task.kind, each, weights)
        student.seconds += between - started
        teacher.seconds += time.perf_counter() - between
        _answer(task, ours, inputs, student)
        _answer(task, theirs, inputs, teacher)
        count = int(task.items(inputs))
        apart = heads.soft_loss(task, ours, theirs, inputs, vocabulary="cut")
        total, items, asked = total + float(apart) * count, items + count, asked + len(batch)
    return Asked(student, teacher, total / max(items, 1), asked)


def _logits(model: nn.Module, task: heads.Task, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    home = next(iter(inputs.values())).device
    named = models.moved(model, inputs)
    with torch.no_grad():  # a bare network takes its one input by position
        outputs = model(**named) if named else model(next(iter(models.questions(inputs).values())))
    if not isinstance(outputs, Mapping):
        raise ValueError(f"{type(model).__name__} returns no named outputs")
    return {k: v.to(home) for k, v in heads.logits_of(outputs, task.kind).items()}


def _answer(
    task: heads.Task, logits: Mapping[str, Tensor], inputs: Mapping[str, Any], into: Answers
) -> None:
    """Append the errors of a batch's labelled rows and the answers to all supervised items."""
    labels = task.labels(inputs)
    if task.kind == "spans":
        starts, ends = inputs.get("start_positions"), inputs.get("end_positions")
        tops = [logits[n].argmax(-1) for n in ("start_logits", "end_logits")]
        into.tops.append(torch.stack(tops, -1).flatten())
        if starts is not None and ends is not None:
            wrong = (tops[0] != starts).float() + (tops[1] != ends).float()
            into.errors.append(wrong / 2)
        return
    z = logits["logits"].float()
    if task.kind != "classes":
        said = z if task.kind == "values" else (z > 0).float()
        into.tops.append(said.flatten())
        if labels is not None:
            gap = (said.reshape(len(z), -1) - labels.float().reshape(len(z), -1)).square().mean(-1)
            into.errors.append(torch.where(gap.isfinite(), gap, torch.nan))
        return
    z, mask = task.align(z, inputs), task.mask(inputs)
    confidence, top = z.softmax(-1).max(-1)
    if labels is None:
        kept = torch.ones_like(top, dtype=torch.bool) if mask is None else mask
        into.tops.append(top[kept])
        return
    labelled = labels != task.ignored
    seen = torch.ones_like(labelled) if mask is None else mask
    right = (top == labels) & labelled
    into.tops.append(top[seen])
    into.said.append(top[labelled])
    into.hits.append(right[labelled].float())
    into.confidences.append(confidence[labelled])
    into.labels.append(labels[labelled])
    if z.shape[-1] <= CLASSES:
        into.losses.append(F.cross_entropy(z[labelled], labels[labelled], reduction="none"))
    counts = labelled.reshape(len(labels), -1).sum(-1)
    wrong = counts - right.reshape(len(labels), -1).sum(-1)
    into.errors.append(wrong / counts)  # NaN for rows without a label
