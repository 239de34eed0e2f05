"""Reference lines: what the simplest models reach on the user's own rows.

The recipe starts from "the simplest possible model" and compares everything with it. Here it is
bundled, trained in seconds on the same collated rows: a linear model and a small MLP over pooled
inputs (counts of tokens, pictures made small, numbers as they are), a counting tagger for tokens,
and an n-gram model for text. They know no order, no place and no context beyond two tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from hf_recipe.baselines.ngrams import NGram, Tagger
from hf_recipe.core.check import Measurement, Skip, private
from hf_recipe.instruments.batches import Batch, Rows, stream_reason
from hf_recipe.instruments.heads import BINARY, REGRESSION, SOFTMAX, Head, read_head
from hf_recipe.instruments.subject import Subject
from hf_recipe.instruments.trace import NO_SOURCE

TRAIN_ROWS, EVALUATION_ROWS = 4096, 2048
WIDEST = 4096  # features
PICTURE = 16  # side that pictures are pooled to
HIDDEN = 64
HELD_OUT = 0.15  # of the training rows, to stop by
EPOCHS, PATIENCE, ROWS_A_STEP, RATE = 100, 8, 128, 1e-2
COUNTED = ("tokens", "causal")  # tasks whose references count tokens


@dataclass(frozen=True)
class Reference(Measurement):
    """One simple model on the first rows of an evaluation set.

    Attributes:
        name: "linear", "small MLP", "tagger", "bigram" or "trigram".
        held_out: its mean loss on training rows that it did not learn from.
        losses: of each evaluation row, in the set's order (nats or squared units).
        right: whether each row was classified rightly (1.0 or 0.0); empty for other tasks.
    """

    name: str
    held_out: float
    losses: tuple[float, ...] = private()
    right: tuple[float, ...] = private(default=())

    @property
    def loss(self) -> float:
        """Mean over rows that have one."""
        known = [x for x in self.losses if math.isfinite(x)]
        return math.fsum(known) / len(known) if known else math.nan


@dataclass(frozen=True)
class ReferenceLines(Measurement):
    """Simple models trained on the training rows; `best` by rows they did not learn from.

    Attributes:
        split: the evaluation set.
        rows: training rows they learned from.
        lines: one for each model.
    """

    split: str
    rows: int
    lines: tuple[Reference, ...]

    @property
    def best(self) -> Reference:
        """Chosen without a look at the evaluation rows."""
        return min(self.lines, key=lambda line: line.held_out)


def reference_lines(subject: Subject, split: str | None = None) -> ReferenceLines:
    """Train the simple models that fit the task, and take them to the evaluation rows.

    Call it quietly.

    Args:
        split: an evaluation set; default: the first.

    Raises:
        Skip: rows cannot be read ahead, or no simple model is known for the task.
    """
    known = [name for name in subject.evaluation if split in (None, name)]
    if not known:
        raise Skip(f"there is no {split or 'evaluation'} set to compare on")
    train, held = subject.rows("train"), subject.evaluation[known[0]]
    for rows in (train, held):
        reason = stream_reason(rows) or subject.overridden(rows.name)
        if reason or len(rows) < 2:
            raise Skip(reason or f"the {rows.name} set has fewer than two rows")
    head = head_of(subject, subject.batch("train"))
    chosen = _shuffled(train.evenly_spaced(TRAIN_ROWS))
    asked = range(min(len(held), EVALUATION_ROWS))
    if head.task in COUNTED:
        lines = _counted(head.task, _batches(train, chosen), _batches(held, asked))
    elif head.task in ("classification", "multi-label", "regression"):
        lines = _pooled(head, _batches(train, chosen), _batches(held, asked))
    else:
        raise Skip(f"no simple model is bundled for a {head.task} head")
    return ReferenceLines(known[0], len(chosen), lines)


def head_of(subject: Subject, batch: Batch) -> Head:
    """The head as it is read from one batch, in evaluation mode, without gradients."""
    subject.model.eval()
    with torch.no_grad():
        loss, outputs = subject.compute_loss(batch.inputs, outputs=True)
    return read_head(subject.model, batch.inputs, outputs, observed=float(loss))


def _shuffled(indices: Sequence[int]) -> list[int]:
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))
    return [indices[i] for i in order.tolist()]


def _batches(rows: Rows, indices: Sequence[int]) -> list[Batch]:
    return [batch.to(torch.device("cpu")) for batch in rows.batches(indices, 64)]


# ---------------------------------------------------------------- counting models


def _counted(task: str, train: Sequence[Batch], held: Sequence[Batch]) -> tuple[Reference, ...]:
    part = max(1, round(HELD_OUT * len(train))) if len(train) > 1 else 0
    learn, check = train[part:], train[:part] or train
    models: list[NGram | Tagger] = [NGram(2), NGram(3)] if task == "causal" else [Tagger()]
    lines = []
    for model in models:
        for batch in learn:
            model.learn(*_tokens(batch))
        own = [loss for batch in check for loss in model.losses(*_tokens(batch))]
        losses = [loss for batch in held for loss in model.losses(*_tokens(batch))]
        known = [x for x in own if math.isfinite(x)]
        held_out = math.fsum(known) / max(len(known), 1)
        lines.append(Reference(model.name, held_out, tuple(losses)))
    return tuple(lines)


def _tokens(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    ids, labels = batch.inputs.get("input_ids"), batch.labels
    if not isinstance(ids, torch.Tensor) or not isinstance(labels, torch.Tensor):
        raise Skip("the batch has no tokens to count")
    if ids.shape != labels.shape:
        raise Skip("tokens and labels do not run side by side")
    return ids, labels


# ---------------------------------------------------------------- models over pooled inputs


def _pooled(head: Head, train: Sequence[Batch], held: Sequence[Batch]) -> tuple[Reference, ...]:
    pooling = Pooling.of(train)
    x, y = pooling.features(train), _targets(train, head)
    new, truth = pooling.features(held), _targets(held, head)
    if not len(x) == len(y) or not len(new) == len(truth):
        raise Skip("inputs and labels are not one per row")
    outputs = head.logits.shape[-1]
    if head.problem_type == SOFTMAX:
        outputs = max(outputs, int(max(y.max(), truth.max())) + 1)
    centre, spread = y.new_zeros(()), y.new_ones(())
    if head.problem_type == REGRESSION:
        centre, spread = y.mean(0), y.std(0).clamp(min=1e-12)
    lines = []
    for name, width in (("linear", 0), ("small MLP", HIDDEN)):
        model, held_out = fit(
            x, (y - centre) / spread if head.problem_type == REGRESSION else y,
            outputs, head.problem_type, width,
        )  # fmt: skip
        with torch.no_grad():
            made = model(new)
            if head.problem_type == REGRESSION:
                made = made * spread + centre
                held_out *= float(spread.square().mean())
            losses = losses_of(made, truth, head.problem_type)
        right: tuple[float, ...] = ()
        if head.problem_type == SOFTMAX:
            right = tuple((made.argmax(-1) == truth).float().tolist())
        lines.append(Reference(name, held_out, tuple(losses.tolist()), right))
    return tuple(lines)


def _targets(batches: Iterable[Batch], head: Head) -> torch.Tensor:
    labels = [batch.labels for batch in batches]
    if not all(isinstance(y, torch.Tensor) for y in labels):
        raise Skip("the batches have no labels")
    whole = torch.cat([y.reshape(len(y), -1) for y in labels])
    return whole[:, 0].long() if head.problem_type == SOFTMAX else whole.float()


def losses_of(outputs: torch.Tensor, targets: torch.Tensor, problem_type: str) -> torch.Tensor:
    """Loss of each row, (rows,): nats, or squared error, mean over a row's outputs."""
    if problem_type == SOFTMAX:
        return functional.cross_entropy(outputs, targets, reduction="none")
    if problem_type == BINARY:
        each = functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
        return each.mean(-1)
    return (outputs - targets).square().mean(-1)


def fit(
    x: torch.Tensor, y: torch.Tensor, outputs: int, problem_type: str, width: int
) -> tuple[nn.Module, float]:
    """A linear model (width 0) or an MLP, stopped by rows held out of `x`.

    Args:
        x: (rows, features), standardised.
        y: (rows,) classes, or (rows, outputs) numbers.

    Returns:
        The model, and its mean loss on the rows held out.
    """
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(x.shape[1], outputs)]
    if width:
        layers = [nn.Linear(x.shape[1], width), nn.ReLU(), nn.Linear(width, outputs)]
    model = nn.Sequential(*layers)
    nn.init.zeros_(layers[-1].weight)  # type: ignore[arg-type]
    nn.init.zeros_(layers[-1].bias)  # type: ignore[arg-type]
    part = max(1, round(HELD_OUT * len(x)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-2)
    draw = torch.Generator().manual_seed(0)
    best, kept, since = math.inf, model.state_dict(), 0
    for _ in range(EPOCHS):
        with torch.no_grad():
            loss = float(losses_of(model(x[:part]), y[:part], problem_type).mean())
        if loss < best - 1e-4 * abs(best) or not math.isfinite(best):
            best, since = loss, 0
            kept = {k: v.clone() for k, v in model.state_dict().items()}
        elif since >= PATIENCE:
            break
        since += 1
        order = part + torch.randperm(len(x) - part, generator=draw)
        for chosen in torch.split(order, ROWS_A_STEP):
            optimizer.zero_grad()
            loss_here = losses_of(model(x[chosen]), y[chosen], problem_type).mean()
            torch.autograd.backward(loss_here)
            optimizer.step()
    model.load_state_dict(kept)
    return model, best


@dataclass(frozen=True)
class Pooling:
    """How a batch's inputs become one line of numbers per row; learned from training rows.

    Attributes:
        tokens: the commonest token ids, whose counts are features; empty: no tokens.
        names: floating-point inputs.
        mean, spread: of each feature.
    """

    tokens: torch.Tensor
    names: tuple[str, ...]
    mean: torch.Tensor
    spread: torch.Tensor

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> Pooling:
        """Learn it; raises Skip where there is nothing to pool."""
        first = batches[0].inputs
        tokens = torch.zeros(0, dtype=torch.long)
        if _is_tokens(first):
            seen = torch.cat([_attended(b.inputs).reshape(-1) for b in batches])
            counts = seen[seen >= 0].bincount()
            tokens = counts.topk(min(WIDEST, int((counts > 0).sum()))).indices
        names = tuple(
            name
            for name, value in first.items()
            if isinstance(value, torch.Tensor)
            and value.is_floating_point()
            and value.ndim >= 2
            and value is not batches[0].labels
            and not any(word in name for word in NO_SOURCE)
        )
        if not len(tokens) and not names:
            raise Skip("no tokens and no numbers among the inputs that could be pooled")
        raw = cls(tokens, names, torch.zeros(()), torch.ones(())).features(batches)
        spread = raw.std(0)
        return cls(tokens, names, raw.mean(0), torch.where(spread > 1e-8, spread, 1.0))

    def features(self, batches: Sequence[Batch]) -> torch.Tensor:
        """(rows, features), standardised by the training rows."""
        return torch.cat([self._of(batch.inputs) for batch in batches])

    def _of(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        parts = []
        if len(self.tokens):
            ids = _attended(inputs)
            flat = ids.reshape(len(ids), -1)
            place = torch.full((max(int(flat.max()), int(self.tokens.max())) + 2,), -1)
            place[self.tokens] = torch.arange(len(self.tokens))
            found = torch.where(flat >= 0, place[flat.clamp(min=0)], -1)
            found = found.where(found >= 0, len(self.tokens))  # what is not counted
            counts = torch.zeros(len(flat), len(self.tokens) + 1)
            counts.scatter_add_(1, found, torch.ones(found.shape))
            parts.append(counts[:, :-1].log1p())
        parts += [_small(inputs[name].float()) for name in self.names]
        return (torch.cat(parts, 1).nan_to_num() - self.mean) / self.spread


def _is_tokens(inputs: Mapping[str, Any]) -> bool:
    ids = inputs.get("input_ids")
    return isinstance(ids, torch.Tensor) and not ids.is_floating_point() and ids.ndim >= 2


def _attended(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Token ids, -1 where nothing is attended to."""
    ids: torch.Tensor = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.shape == ids.shape:
        return ids.masked_fill(mask == 0, -1)
    return ids


def _small(value: torch.Tensor) -> torch.Tensor:
    """Pictures pooled to a small side, long series to their means; (rows, features)."""
    if value.ndim >= 4:
        shape = (min(PICTURE, value.shape[-2]), min(PICTURE, value.shape[-1]))
        value = value.reshape(len(value), -1, *value.shape[-2:])
        return functional.adaptive_avg_pool2d(value, shape).flatten(1)
    if value.ndim == 3:
        return torch.cat([value.mean(1), value.std(1, correction=0)], 1)
    if value.shape[1] > WIDEST:
        return functional.adaptive_avg_pool1d(value[:, None], WIDEST // 4).flatten(1)
    return value
