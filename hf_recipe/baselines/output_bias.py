"""Init well: give the output layer the bias that the label frequencies ask for.

The recipe: "If you have an imbalanced dataset of a ratio 1:10 of positives:negatives, set the bias
on your logits such that your network predicts probability of 0.1 at initialization. Setting these
correctly will speed up convergence and eliminate 'hockey stick' loss curves where in the first few
iterations your network is basically just learning the bias."

Here: how many nats lie between the labels' frequencies and the mean prediction before training,
the steps it will take to learn them, and `set_output_bias`, which saves them. Whether the curve
then had the shape of a hockey stick is `baselines/hockey_stick.py`'s.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import nn

from hf_recipe.baselines.initial_loss import expectation_of, relation_of
from hf_recipe.baselines.start import Start, observe_start, pool, uninformed
from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.heads import (
    BINARY,
    REGRESSION,
    SOFTMAX,
    UNEVEN_TASKS,
    Head,
    read_head,
)
from hf_recipe.instruments.overrides import samples_its_own_way
from hf_recipe.instruments.quiet import quiet
from hf_recipe.instruments.redraw import OutputLayer, Watch
from hf_recipe.instruments.subject import Subject

UNEVEN = (
    "of the uninformed loss: the recipe's example, one in ten, has 0.53; four to one, 0.28, is how "
    "labels are, and a matter of a few steps"
)
FEWEST = 32  # labels; one batch of a stream or of a loader of the user's own is often fewer
PRIORLESS = ("choice", "span", "contrastive")  # outputs that mean something else in each row


@dataclass(frozen=True)
class PriorGap(Measurement):
    """How far the mean prediction is from the label frequencies before step 1.

    Attributes:
        gap: KL(prior || mean prediction) in nats, mean over outputs in BCE, less what sampling
            alone adds; regression: (mean target - mean prediction)^2 in squared units.
        standard_error: of `gap`, if the mean prediction were the labels' true frequencies.
        uniform: the loss of an uninformed head, in the unit of `gap`.
        has_bias: whether the output layer has a bias to set; None: the layer was not found.
        fresh: whether the head knows no more than one that was just drawn.
        steps: optimizer steps that learning the gap takes, at most; None: not known.
        total_steps: of the planned run; None: not known.
        skew: nats between the label frequencies and even ones; None outside softmax heads.
    """

    gap: float
    standard_error: float
    uniform: float
    problem_type: str
    task: str
    outputs: int
    rows: int
    has_bias: bool | None
    fresh: bool
    relation: str = "mean"
    steps: float | None = None
    total_steps: int | None = None
    skew: float | None = None


def measure_prior_gap(subject: Subject) -> Iterator[PriorGap]:
    """Measure the mean prediction of a few batches against their labels' frequencies."""
    if subject.trainer is not None and samples_its_own_way(subject.trainer):
        raise Skip("a sampler of the user's own may draw some labels more often than others")
    start = observe_start(subject)
    head = start.pooled
    if head.task in PRIORLESS:
        raise Skip(f"the outputs of a {head.task} head have no frequencies of their own")
    classes = _classes(head)
    least = 4 * classes if head.problem_type == REGRESSION else max(4 * classes, FEWEST)
    if len(head.labels) < least:
        raise Skip(f"{len(head.labels)} labels say too little of the frequencies of {classes:.0f} "
                   "classes")  # fmt: skip
    expected, error = expectation_of(subject, head)
    gap, standard_error = prior_gap(head)
    yield PriorGap(
        gap=gap,
        standard_error=standard_error,
        uniform=uninformed(head),
        problem_type=head.problem_type,
        task=head.task,
        outputs=int(head.logits.shape[-1]),
        rows=len(head.labels),
        has_bias=None if start.layer is None else start.layer.bias is not None,
        fresh=bool(head.loss() >= expected * 0.995 - 4 * error),
        relation=relation_of(start),
        steps=_steps_to_learn(subject, start),
        total_steps=subject.plan.total_steps if subject.plan else None,
        skew=skew_of(head),
    )


def _classes(head: Head) -> float:
    """Classes among the labels, or, if more, to expect from the mean prediction in as many."""
    if head.problem_type != SOFTMAX:
        return 1
    guessed = mean_prediction(head, head.logits).clamp(0, 1)
    likely = float((1 - (1 - guessed) ** len(head.labels)).sum())
    return max(len(torch.unique(head.labels)), likely)


def frequencies(head: Head) -> torch.Tensor:
    """Label frequencies (outputs,) with half a count more each; regression: mean target."""
    y = head.labels
    if head.problem_type == SOFTMAX:
        counts = y.bincount(minlength=head.logits.shape[-1]).double() + 0.5
        return counts / counts.sum()
    if head.problem_type == BINARY:
        return (y.double().sum(0) + 0.5) / (len(y) + 1)
    return y.double().mean(0)


def skew_of(head: Head) -> float | None:
    """`PriorGap.skew`: the gap that an even mean prediction would leave."""
    if head.problem_type != SOFTMAX:
        return None
    return prior_gap(head, torch.zeros_like(head.logits))[0]


def mean_prediction(head: Head, logits: torch.Tensor) -> torch.Tensor:
    """Mean probability (outputs,) that `logits` (rows, outputs) give; regression: mean value."""
    if head.problem_type == SOFTMAX:
        return logits.softmax(-1).mean(0, dtype=torch.double)
    if head.problem_type == BINARY:
        return logits.sigmoid().double().mean(0)
    return logits.double().mean(0)


def prior_gap(head: Head, logits: torch.Tensor | None = None) -> tuple[float, float]:
    """`PriorGap.gap`, and its standard error where there is none; examples are the units."""
    z = head.logits if logits is None else logits
    q, y, rows = mean_prediction(head, z), head.labels, len(head.labels)
    if head.problem_type == REGRESSION:
        offset = y.double().mean(0) - q
        noise = y.double().var(0, unbiased=False) / rows
        gap = float((offset.square() - noise).clamp_min(0).mean())
        return gap, 2 * math.sqrt(float((offset.square() * noise).mean()) + 1e-300)
    if head.problem_type == SOFTMAX:
        p = y.bincount(minlength=len(q)).double() / rows
        seen = p > 0
        ratio = torch.where(seen, (p.clamp_min(1e-300) / q.clamp_min(1e-300)).log(), p)
        gap = float((p * ratio).sum())
        values = ratio[y]
        sampling = (int(seen.sum()) - 1) / (2 * rows)
    else:
        p = (y.double().mean(0)).clamp(1e-9, 1 - 1e-9)
        q = q.clamp(1e-9, 1 - 1e-9)
        on, off = (p / q).log(), ((1 - p) / (1 - q)).log()
        gap = float((p * on + (1 - p) * off).mean())
        values = torch.where(y > 0.5, on, off).mean(-1)
        sampling = 1 / (2 * rows)
    centred = values.double() - values.double().mean()
    sums = centred.new_zeros(int(head.groups.max()) + 1).index_add_(0, head.groups, centred)
    alone = float(centred.square().sum())
    together = float(sums.square().sum()) / alone if alone > 0 else 1.0  # design effect
    # Chi-squared: with no gap at all, sampling makes one with a standard deviation of sqrt(2 df).
    return max(gap - sampling, 0.0), math.sqrt(2 * sampling / rows) * max(together, 1.0)


def _steps_to_learn(subject: Subject, start: Start) -> float | None:
    """Steps in which Adam can shift the mean logits this far: every weight moves by the rate."""
    name, rate = str(getattr(subject.args, "optim", "")), getattr(subject.args, "learning_rate", 0)
    head = start.pooled
    if "adam" not in name.lower() or not rate or not start.hidden or head.logits.ndim != 2:
        return None
    if not isinstance(start.layer and start.layer.module, nn.Linear):
        return None
    p, q = frequencies(head), mean_prediction(head, head.logits).clamp(1e-9)
    if head.problem_type == SOFTMAX:
        wanted = p.log() - q.log()
        distance = float(wanted.max() - wanted.min()) / 2
    elif head.problem_type == BINARY:
        distance = float((p.logit() - q.clamp(max=1 - 1e-9).logit()).abs().max())
    else:
        distance = float((p - mean_prediction(head, head.logits)).abs().max())
    hidden = torch.cat([h.reshape(-1, h.shape[-1]).float() for h in start.hidden]).mean(0)
    return distance / (float(rate) * (1 + float(hidden.abs().sum())))


PROBE = Probe(
    name="measure the gap between label frequencies and mean prediction",
    moment="probe",
    measures=(PriorGap,),
    take=measure_prior_gap,
    needs=("fresh",),
)


def output_bias_unset(
    gap: PriorGap,
    *,
    errors: Annotated[float, "4 standard errors, as for the initial loss"] = 4.0,
    least: Annotated[float, "2 % of the uninformed loss: less is not worth a line of code"] = 0.02,
    negligible: Annotated[float, "2 % of the planned steps, as the catalogue sets it"] = 0.02,
    ordinary: Annotated[float, UNEVEN] = 0.4,
) -> Iterator[Fault]:
    """Say how many nats of the first drop only learn the label frequencies."""
    if not gap.fresh or gap.relation not in ("mean", "sum over outputs", "applied twice"):
        return  # a trained head; or a loss (class weights) whose best bias is not the prior's
    smallest = errors * gap.standard_error + least * gap.uniform
    if gap.gap <= smallest:
        return
    share = gap.steps / gap.total_steps if gap.steps and gap.total_steps else None
    mild = not gap.has_bias or (share is not None and share < negligible)
    # The scale of a target is unscaled-target's; sparse labels are what multi-label data is.
    mild = mild or gap.problem_type != SOFTMAX
    # Every language model begins with the frequencies of its words, every tagger with those of
    # its tags, every map of pixels with its background; between even labels the gap is what
    # freshly drawn weights lean to, which no prior explains.
    mild = mild or gap.task in UNEVEN_TASKS
    mild = mild or (gap.skew is not None and gap.skew <= max(smallest, ordinary * gap.uniform))
    unit = "squared units" if gap.problem_type == REGRESSION else "nats"
    took = ""
    if gap.steps is not None and gap.steps < (gap.total_steps or math.inf):
        took = f", at most {max(gap.steps, 1):.0f} steps"
    if gap.has_bias is False:
        took += "; the head has no bias to set"
    learnt = "mean target" if gap.problem_type == REGRESSION else "label frequencies"
    yield Fault(
        f"the first {gap.gap:.3g} {unit} of the loss only teach the {learnt}{took}",
        evidence={
            "seen": f"{gap.gap:.3g} +- {gap.standard_error:.2g} {unit} between the {learnt} "
            f"and the mean prediction ({gap.rows} rows)",
            "expected": f"under {smallest:.2g} {unit}",
            "gap": gap.gap,
            "standard_error": gap.standard_error,
            "steps": gap.steps,
            "share_of_steps": share,
        },
        severity="note" if mild else None,
        fix="nothing to set: this head has no bias" if gap.has_bias is False else None,
    )


OUTPUT_BIAS = Check(
    name="output-bias-unset",
    stage="baselines",
    severity="warning",
    moments=("probe",),
    why="Steps spent on learning how frequent each label is are lost: the bias of the output "
    "layer can say it from the start.",
    fix="hf_recipe.set_output_bias(model, train_dataset)",
    source="Karpathy, A Recipe for Training Neural Networks (2019): init well",
    unsure="Where the loss is weighted against the class frequencies on purpose outside the "
    "Trainer's loss. The steps are an upper estimate for Adam-like optimizers.",
    judges=(output_bias_unset,),
    explains=("hockey-stick",),
)


# ------------------------------------------------------------------ the remedy


@dataclass(frozen=True)
class BiasChange:
    """What `set_output_bias` did: the layer, and the gap in nats (squared units) around it."""

    layer: str
    before: float
    after: float


def set_output_bias(
    model: nn.Module,
    dataset: Any,
    *,
    data_collator: Any = None,
    rows: int = 1024,
    batch_size: int = 32,
    median: bool = False,
) -> BiasChange:
    """Set the output layer's bias so that the mean prediction is the labels' frequencies.

    Softmax heads get the log of the frequencies, BCE heads their logit, regression the mean
    target (each less what the weights already give on average); a class never seen counts half.

    Args:
        model: freshly drawn; left in the mode it is in, only the bias is changed.
        dataset: rows with labels, as the model gets them (already tokenised).
        data_collator: as given to the Trainer; default: transformers' default collator.
        rows: how many, evenly spaced.
        median: regression under an L1 loss: the median instead of the mean.

    Raises:
        ValueError: the head has no bias, or the output layer or the labels cannot be found.
    """
    with quiet(model):
        model.eval()
        try:
            head, layer = _run(model, dataset, data_collator, rows, batch_size)
        except Skip as reason:
            raise ValueError(f"no output bias can be set: {reason}") from None
        bias = layer.bias
        if bias is None:
            raise ValueError(
                f"no bias to set: the output layer {layer.name!r} was built without one"
            )
        shift = _shift(head, median)
        if shift.numel() != bias.numel():
            raise ValueError(f"the bias of {layer.name!r} has {bias.numel()} values, the labels "
                             f"ask for {shift.numel()}")  # fmt: skip
        before, after = prior_gap(head)[0], prior_gap(head, head.logits + shift)[0]
    with torch.no_grad():
        bias.add_(shift.reshape(bias.shape).to(bias))
    return BiasChange(layer.name, before, after)


def _run(
    model: nn.Module, dataset: Any, collator: Any, rows: int, size: int
) -> tuple[Head, OutputLayer]:
    from transformers import default_data_collator

    collate = collator or default_data_collator
    device = next(model.parameters()).device
    accepted = inspect.signature(model.forward).parameters
    total = len(dataset)
    chosen = [(i * total) // min(rows, total) for i in range(min(rows, total))]
    heads: list[Head] = []
    layer: OutputLayer | None = None
    watch = Watch(model)
    for begin in range(0, len(chosen), size):
        features = [dataset[i] for i in chosen[begin : begin + size]]
        inputs = {
            k: v.to(device) if isinstance(v, torch.Tensor) else v
            for k, v in collate([dict(f) for f in features]).items()
            if k in accepted
        }
        with torch.no_grad(), watch.watching(layers=layer is None):
            model(**inputs)
        head = read_head(model, inputs, watch.outputs)
        if head.task in PRIORLESS:
            raise Skip(f"the outputs of a {head.task} head have no frequencies of their own")
        if layer is None:
            found = watch.output_layer(head.raw)
            if found is None:
                raise Skip("the layer that makes the logits was not found")
            layer = found[0]
        heads.append(head)
    if layer is None:
        raise Skip("the data set is empty")
    return pool(heads), layer


def _shift(head: Head, median: bool) -> torch.Tensor:
    """What to add to the bias, (outputs,), so that the mean prediction is the prior."""
    target, z = frequencies(head), head.logits.double()
    if head.problem_type == REGRESSION:
        if median:
            return (head.labels.double() - z).median(0).values
        return target - z.mean(0)
    shift = torch.zeros_like(target)
    for _ in range(20):
        made = mean_prediction(head, z + shift).clamp(1e-12, 1 - 1e-12)
        if head.problem_type == SOFTMAX:
            shift += target.log() - made.log()
        else:
            shift += target.logit() - made.logit()
    return shift
