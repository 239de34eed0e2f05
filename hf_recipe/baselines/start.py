"""The model before step 1, on a few batches: what several checks of this stage look at.

One pass in evaluation mode, without gradients, shared by the checks of the initial loss and of
the output bias: the loss as the Trainer computes it, the same loss computed from the logits, and
what the output layer gives when it is drawn anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional

from hf_recipe.core.check import Skip
from hf_recipe.instruments.batches import Batch
from hf_recipe.instruments.heads import BINARY, REGRESSION, SOFTMAX, Head, read_head
from hf_recipe.instruments.held_modules import held_teachers
from hf_recipe.instruments.redraw import OutputLayer, Watch, redrawn_layers, redrawn_model
from hf_recipe.instruments.subject import Subject

BATCHES = 8  # forwards without gradients: about three forward + backward passes
ROWS = 512
ENOUGH = 4096  # supervised positions: more batches of a sequence model would tell little
ELEMENTS = 1 << 25  # logits kept: 128 MB in single precision
FEW_ELEMENTS = 1 << 20  # of which nobody is short
DRAWS = 16  # fewer where one costs more than a forward
TIED_DRAWS, TIED_ROWS = 6, 4  # each draw a forward of these rows
LARGE_LOGITS = 3.0  # their deviation, at which a loss of another form shows
BENT = 0.02  # by so much: what a loss has besides (a decay, an auxiliary term) is less
DRAW_COST = 2e10  # multiplications spent on all draws together


@dataclass(frozen=True)
class Start:
    """What a few batches gave before step 1.

    Attributes:
        observed: each batch's loss, as the Trainer computes it.
        heads: each batch's supervised rows; pooled: all of them as one, which holds the logits.
        hidden: each batch's input of the output layer; empty where it was not found.
        layer: the output layer, where it was found.
        redrawn: the mean loss under output layers drawn anew, one number per draw.
        remade: the loss of the first batch under whole models drawn anew; looked at only where
            re-drawn output layers start far above an uninformed head.
        adds_up: whether the observed loss of a batch is the sum over its two halves.
        bends: whether the observed loss is another multiple of the mean loss at larger logits: a
            loss of another form (focal, distilled), not the mean loss times a constant.
        rounding: relative error that the observed loss may have from its number format alone.
    """

    observed: tuple[float, ...]
    heads: tuple[Head, ...]
    pooled: Head
    hidden: tuple[torch.Tensor, ...]
    layer: OutputLayer | None
    redrawn: tuple[float, ...] = ()
    remade: tuple[float, ...] = ()
    adds_up: bool = False
    bends: bool = False
    rounding: float = 1e-4

    @property
    def loss(self) -> float:
        """The observed loss over all supervised rows."""
        counts = [len(head.labels) for head in self.heads]
        total = math.fsum(n * loss for n, loss in zip(counts, self.observed, strict=True))
        return total / sum(counts)

    @property
    def recomputed(self) -> float:
        """The mean loss that the logits give, auxiliary terms included."""
        counts = [len(head.labels) for head in self.heads]
        extra = math.fsum(n * h.auxiliary for n, h in zip(counts, self.heads, strict=True))
        return self.pooled.loss() + extra / sum(counts)


def uninformed(head: Head) -> float:
    """The loss of a head that gives every class, or either answer, the same chance."""
    if head.problem_type == SOFTMAX:
        return math.log(max(head.logits.shape[-1], 2))
    if head.problem_type == BINARY:
        return math.log(2)
    return float(head.labels.double().var(0, unbiased=False).mean())


def observe_start(subject: Subject) -> Start:
    """Run up to eight batches; the result is kept in ``subject.cache``.

    Raises:
        Skip: training has begun, or logits and labels cannot be told.
    """
    known = subject.cache.get("start")
    if isinstance(known, Start):
        return known
    if subject.resumed or subject.step > 0:
        raise Skip("the run is resumed: its start lies in an earlier run")
    subject.model.eval()
    with torch.no_grad():
        start = _observe(subject)
        redrawn = _redraw(subject, start)
        start = replace(start, redrawn=redrawn)
        start = replace(start, remade=_remake(subject, start), adds_up=_adds_up(subject, start))
        start = replace(start, bends=_bends(subject, start))
    subject.cache["start"] = start
    return start


def _observe(subject: Subject) -> Start:
    smoothing = float(getattr(subject.args, "label_smoothing_factor", 0.0) or 0.0)
    watch = Watch(subject.model)
    observed: list[float] = []
    heads: list[Head] = []
    hidden: list[torch.Tensor] = []
    layer: OutputLayer | None = None
    half = False
    for batch in _batches(subject):
        with watch.watching():
            value = subject.compute_loss(batch.inputs)
        loss = float(value)
        if not heads:
            half = value.dtype in (torch.bfloat16, torch.float16)
            subject.cache["start.batch"] = batch
        head = read_head(
            subject.model, batch.inputs, watch.outputs, smoothing=smoothing, observed=loss
        )
        if heads and (head.task, head.logits.shape[1]) != (heads[0].task, heads[0].logits.shape[1]):
            break  # outputs that mean something else in each batch: positions, partners
        found = watch.output_layer(head.raw)
        if found is not None and (layer is None or layer.module is found[0].module):
            layer = found[0]
            # half precision inside autocast, single in the layer: it is drawn anew outside of it
            hidden.append(found[1].to(layer.weight.dtype))
        observed.append(loss)
        heads.append(replace(head, raw=head.logits))  # what the model made is let go
        if sum(h.logits.numel() for h in heads) + head.logits.numel() > _most(subject, heads[0]):
            break
        if len(heads) > 1 and sum(len(h.labels) for h in heads) >= ENOUGH:
            break
    if len(hidden) != len(heads):
        layer, hidden = None, []
    pooled = pool(heads)
    parts = torch.split(pooled.logits, [len(head.labels) for head in heads])
    shared = tuple(replace(h, logits=z, raw=z) for h, z in zip(heads, parts, strict=True))
    start = Start(tuple(observed), shared, pooled, tuple(hidden), layer)
    return replace(start, rounding=2**-7) if half else start


def _most(subject: Subject, first: Head) -> int:
    """Logits to keep: no more than the run's own first step can hold.

    That takes the weights' gradients and, mostly, two moments; and some copies of its own logits.
    """
    weights = sum(p.numel() for p in subject.model.parameters())
    return min(ELEMENTS, max(FEW_ELEMENTS, weights // 2, 2 * first.logits.numel()))


def _batches(subject: Subject) -> Iterator[Batch]:
    """Batches of evenly spaced rows, with few rows where the vocabulary is large."""
    size = max(int(getattr(subject.args, "per_device_train_batch_size", 8)), 2)
    first = subject.batch("train", size=size)
    labels = first.labels
    width = int(getattr(subject.config, "vocab_size", 0) or 0)
    if labels is not None and labels.ndim == 2 and width * labels.numel() > ELEMENTS:
        fitting = max(1, ELEMENTS // (width * labels.shape[1]))
        return iter([first.take(range(min(fitting, len(first))))])
    return subject.batches("train", rows=min(BATCHES * size, max(ROWS, size)), size=size)


def _redraw(subject: Subject, start: Start) -> tuple[float, ...]:
    """The mean loss under the output layer drawn anew."""
    if start.layer is None:
        return ()
    if start.layer.tied:
        return _redraw_tied(subject, start, start.layer)
    cost = sum(h.numel() for h in start.hidden) * start.pooled.logits.shape[1]
    draws = int(min(DRAWS, max(DRAW_COST // max(cost, 1), 4)))
    values = []
    counts = [len(head.labels) for head in start.heads]
    for module in redrawn_layers(subject.model, start.layer, draws):
        losses = [
            head.loss(head.rebuild(module(hidden))) * len(head.labels)
            for head, hidden in zip(start.heads, start.hidden, strict=True)
        ]
        values.append(math.fsum(losses) / sum(counts))
    return tuple(values)


def _redraw_tied(subject: Subject, start: Start, layer: OutputLayer) -> tuple[float, ...]:
    """As `_redraw` where the weight is the input embedding too: the whole forward changes.

    A few rows of the first batch stand for all, shifted by what they differ from them.
    """
    first, batch = start.heads[0], subject.cache["start.batch"]
    few = batch.take(range(min(len(batch), TIED_ROWS)))
    kept = first.groups < len(few)
    own = first.row_losses()[kept].double().mean()
    if not bool(kept.any()):
        few, own = batch, torch.tensor(first.loss())
    shift = start.pooled.loss() - float(own)
    return tuple(
        _loss_of(subject, subject.model, first, few) + shift
        for _ in redrawn_layers(subject.model, layer, TIED_DRAWS)
    )


def _loss_of(subject: Subject, model: nn.Module, like: Head, batch: Batch) -> float:
    """The mean loss of `model` on `batch`, read as `like` was."""
    watch = Watch(model)
    with watch.watching(layers=False):
        if subject.loss_function is None:
            model(**batch.inputs)
        else:
            subject.loss_function(model, dict(batch.inputs), return_outputs=False)
    head = read_head(model, batch.inputs, watch.outputs, smoothing=like.smoothing, prefer=like.task)
    return head.loss()


def _remake(subject: Subject, start: Start) -> tuple[float, ...]:
    """The loss under whole models drawn anew, where the hidden states themselves look blown up."""
    head = start.heads[0]
    mean = math.fsum(start.redrawn) / max(len(start.redrawn), 1)
    sane = mean <= 1.2 * uninformed(head) + 0.5
    if head.problem_type == REGRESSION or not start.redrawn or sane or is_loaded(subject):
        return ()
    values = []
    for _ in range(3):
        fresh = redrawn_model(subject.model)
        if fresh is None:
            return ()
        values.append(_loss_of(subject, fresh.eval(), head, subject.cache["start.batch"]))
    return tuple(values)


def _adds_up(subject: Subject, start: Start) -> bool:
    """Whether the loss grows with the batch; looked at where it is not the mean it should be."""
    seen, own = start.observed[0], start.heads[0].loss() + start.heads[0].auxiliary
    batch: Batch = subject.cache["start.batch"]
    if len(batch) < 2 or abs(seen - own) <= 0.05 * abs(own) or not math.isfinite(seen):
        return False
    middle = len(batch) // 2
    halves = [batch.take(range(middle)), batch.take(range(middle, len(batch)))]
    total = math.fsum(float(subject.compute_loss(half.inputs)) for half in halves)
    return abs(total - seen) <= 0.02 * abs(seen) and seen != 0.0


def _bends(subject: Subject, start: Start) -> bool:
    """Scale the logits of one batch up, and compare; looked at where the loss is not the mean."""
    head, layer = start.heads[0], start.layer
    own, spread = head.loss() + head.auxiliary, float(head.logits.std())
    ratio = start.observed[0] / own if own else math.nan
    if layer is None or abs(ratio - 1) <= start.rounding or not math.isfinite(ratio * spread):
        return False
    if held_teachers(subject.trainer, subject.model):
        return True  # one that knows the labels adds a term like the mean loss, at any logits
    factor = LARGE_LOGITS / max(spread, 1e-6)
    watch = Watch(subject.model)
    hook = layer.module.register_forward_hook(lambda module, inputs, output: output * factor)
    try:
        with watch.watching(layers=False):
            seen = float(subject.compute_loss(subject.cache["start.batch"].inputs))
        inputs = subject.cache["start.batch"].inputs
        large = read_head(subject.model, inputs, watch.outputs, smoothing=head.smoothing)
    finally:
        hook.remove()
    return not abs(seen - ratio * (large.loss() + large.auxiliary)) <= 0.02 * abs(seen)


def is_loaded(subject: Subject) -> bool:
    """Whether the model came out of a checkpoint (its head may be fresh all the same)."""
    return bool(getattr(subject.config, "_name_or_path", ""))


def pool(heads: Sequence[Head]) -> Head:
    """All rows as one head; groups of different batches stay apart."""
    if len(heads) == 1:
        return heads[0]
    groups, offset = [], 0
    for head in heads:
        groups.append(head.groups + offset)
        offset += int(head.groups.max()) + 1
    return replace(
        heads[0],
        logits=torch.cat([h.logits for h in heads]),
        labels=torch.cat([h.labels for h in heads]),
        groups=torch.cat(groups),
    )


def applied_twice(head: Head) -> float:
    """The loss if the logits were turned into probabilities first: softmax or sigmoid twice."""
    if head.problem_type == SOFTMAX:
        return head.loss(functional.softmax(head.logits, -1))
    return head.loss(torch.sigmoid(head.logits))
