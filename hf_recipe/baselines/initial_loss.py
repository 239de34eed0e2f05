"""Verify the loss at the start: a model that knows nothing must say so.

The recipe: "Verify that your loss starts at the correct loss value. E.g. if you initialize your
final layer correctly you should measure -log(1/n_classes) on a softmax at initialization."

-log(1/n) is only the simplest case. Three numbers are put beside each other here:

* the loss as the Trainer computes it, against the mean loss of the same logits and labels: a sum,
  a flipped sign, a softmax too many show up without any statistical error;
* that mean loss, against what the output layer gives when it is drawn anew (some families start
  far above log V by design), or against labels that are independent of the inputs;
* -log(1/n), for the reader.

A head that is already trained may start lower; never higher.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch

from hf_recipe.baselines.expectation import expected_initial_loss
from hf_recipe.baselines.start import BENT, Start, applied_twice, observe_start, uninformed
from hf_recipe.core.check import Check, Measurement, Probe
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.heads import BINARY, REGRESSION, SOFTMAX, Head
from hf_recipe.instruments.overrides import samples_its_own_way
from hf_recipe.instruments.subject import Subject

__all__ = ["InitialLoss", "expected_initial_loss", "initial_loss_unexpected"]


@dataclass(frozen=True)
class InitialLoss(Measurement):
    """Loss before step 1, in evaluation mode; nats (regression: squared units of the target).

    Attributes:
        observed: as the Trainer computes it.
        recomputed: the mean loss of the same logits and labels.
        expected: what these logits give if labels are independent of the inputs.
        standard_error: of the recomputed loss around `expected`, for a fresh head.
        uniform: every class the same chance: -log(1/n); regression: the variance of the target.
        prior: what the best input-blind head reaches: entropy of the labels, or their variance.
        task, problem_type: how the head was read.
        outputs, rows, groups: of the head; supervised rows and the examples they come from.
        relation: how `observed` follows from the logits: "mean", "sum", "negative", "zero",
            "not finite", "scaled", "applied twice", "no logarithm", "no softmax",
            "sum over outputs", "weighted" or "custom".
        ratio: observed / recomputed.
        redrawn: the loss under output layers drawn anew, one number per draw.
        remade: the loss of the first batch under whole models drawn anew.
        drawn_otherwise: whether a sampler of the user's own may draw some labels more often.
    """

    observed: float
    recomputed: float
    expected: float
    standard_error: float
    uniform: float
    prior: float
    task: str
    problem_type: str
    outputs: int
    rows: int
    groups: int
    relation: str = "mean"
    ratio: float = 1.0
    redrawn: tuple[float, ...] = ()
    remade: tuple[float, ...] = ()
    drawn_otherwise: bool = False


def measure_initial_loss(subject: Subject) -> Iterator[InitialLoss]:
    """Measure the loss of a few batches before step 1."""
    start = observe_start(subject)
    head = start.pooled
    expected, standard_error = expectation_of(subject, head)
    recomputed = start.recomputed
    subject.cache["initial_loss"] = True
    yield InitialLoss(
        observed=start.loss,
        recomputed=recomputed,
        expected=expected + recomputed - head.loss(),
        standard_error=standard_error,
        uniform=uninformed(head),
        prior=prior_loss(head),
        task=head.task,
        problem_type=head.problem_type,
        outputs=int(head.logits.shape[-1]),
        rows=len(head.labels),
        groups=len(torch.unique(head.groups)),
        relation=relation_of(start),
        ratio=start.loss / recomputed if recomputed else math.nan,
        redrawn=start.redrawn,
        remade=start.remade,
        drawn_otherwise=subject.trainer is not None and samples_its_own_way(subject.trainer),
    )


def expectation_of(subject: Subject, head: Head) -> tuple[float, float]:
    """`expected_initial_loss` of the start's pooled head, computed once for all who ask."""
    if "expectation" not in subject.cache:
        subject.cache["expectation"] = expected_initial_loss(
            head.logits,
            head.labels,
            problem_type=head.problem_type,
            groups=head.groups,
            label_smoothing=head.smoothing,
        )
    expected, standard_error = subject.cache["expectation"]
    return expected, standard_error


def remember_initial_loss(subject: Subject) -> Iterator[InitialLoss]:
    """The measurement, unless it was taken: for what needs it as evidence, whatever is selected."""
    if not subject.cache.get("initial_loss"):
        yield from measure_initial_loss(subject)


def prior_loss(head: Head) -> float:
    """The loss of the best constant prediction on these rows."""
    y = head.labels
    if head.problem_type == SOFTMAX:
        p = y.bincount(minlength=head.logits.shape[-1]).double() / len(y)
        smooth = (1 - head.smoothing) * p + head.smoothing / len(p)
        return float(-(smooth * smooth.clamp_min(1e-300).log()).sum())
    if head.problem_type == BINARY:
        p = y.double().mean(0).clamp(1e-12, 1 - 1e-12)
        return float(-(p * p.log() + (1 - p) * (1 - p).log()).mean())
    return float(y.double().var(0, unbiased=False).mean())


def relation_of(start: Start) -> str:
    """How the observed losses follow from the batches' logits; "mean" is what they should be."""
    pairs = [
        (seen, head.loss() + head.auxiliary, head)
        for seen, head in zip(start.observed, start.heads, strict=True)
    ]

    def all_near(scale: list[float], tolerance: float) -> bool:
        return all(
            abs(seen - s) <= tolerance * max(abs(s), 1e-12)
            for (seen, _, _), s in zip(pairs, scale, strict=True)
        )

    means = [own for _, own, _ in pairs]
    if not all(math.isfinite(seen) for seen, _, _ in pairs):
        return "not finite"
    if all_near(means, 1e-5):
        return "mean"
    squared = start.pooled.problem_type == REGRESSION
    if not squared and all_near([applied_twice(h) + h.auxiliary for *_, h in pairs], 1e-5):
        return "applied twice"
    if all_near(means, start.rounding):
        return "mean"
    if start.pooled.problem_type == SOFTMAX:
        for name, scores in (
            ("no logarithm", [h.logits.softmax(-1) for *_, h in pairs]),
            ("no softmax", [h.logits for *_, h in pairs]),
        ):
            own = [-_of_labels(s, h) for s, (*_, h) in zip(scores, pairs, strict=True)]
            if all_near(own, 1e-4):
                return name
    if all(seen == 0 for seen, _, _ in pairs):
        return "zero"
    if any(seen < 0 for seen, _, _ in pairs) and all(own > 0 for own in means):
        return "negative"
    outputs = start.pooled.logits.shape[-1]
    if start.pooled.problem_type != SOFTMAX and all_near([m * outputs for m in means], 5e-3):
        return "sum over outputs"
    if all_near([m * len(h.labels) for _, m, h in pairs], 5e-3) or start.adds_up:
        return "sum"
    if all(_is_between(seen, h) for seen, _, h in pairs):
        return "weighted"
    ratios = [seen / own if own else math.inf for seen, own, _ in pairs]
    constant = len(ratios) > 1 and max(ratios) - min(ratios) <= 1e-3 * abs(ratios[0])
    if constant and not start.bends and abs(ratios[0] - 1) > BENT:  # nearer than can be told apart
        return "scaled"
    return "custom"


def _of_labels(scores: torch.Tensor, head: Head) -> float:
    """The mean score of the right class."""
    return float(scores.gather(-1, head.labels[:, None]).double().mean())


def _is_between(seen: float, head: Head) -> bool:
    """Whether the loss can be a mean with class weights: between the classes' own means."""
    if head.problem_type != SOFTMAX:
        return False
    losses = head.row_losses().double()
    means = [float(losses[head.labels == k].mean()) for k in torch.unique(head.labels)]
    return min(means) <= seen - head.auxiliary <= max(means)


PROBE = Probe(
    name="measure the loss before training",
    moment="probe",
    measures=(InitialLoss,),
    take=remember_initial_loss,
    needs=("fresh",),
)

_RELATIONS = {
    "not finite": "is not finite",
    "zero": "is exactly 0",
    "negative": "is negative: its sign is flipped, so training would maximise it",
    "sum": "adds up over the batch instead of averaging, so it grows with the batch size",
    "scaled": "is the mean loss times a constant",
    "applied twice": "turns the logits into probabilities twice",
    "no logarithm": "is minus the mean probability of the right class: the logarithm is missing",
    "no softmax": "is minus the mean logit of the right class: log_softmax is missing, and it has "
    "no lower end",
}


def initial_loss_unexpected(
    start: InitialLoss,
    *,
    errors: Annotated[
        float, "4 standard errors: no alarm on 300 fresh models on digits, n = 256 and 1,797"
    ] = 4.0,
    floor: Annotated[float, "0.5 % of the expected loss: rounding and half precision"] = 0.005,
    logit_variance: Annotated[
        float, "unit logits, the usual scale of a healthy head, cost 0.5 nats (0.125 in BCE)"
    ] = 1.0,
) -> Iterator[Fault]:
    """Compare the loss at the start with its own logits, and these with an uninformed head."""
    evidence = {
        "seen": f"{start.observed:.4g} over {start.rows} rows ({start.task})",
        "expected": _expected(start),
        "observed": start.observed,
        "recomputed": start.recomputed,
        "expected_loss": start.expected,
        "standard_error": start.standard_error,
        "uniform": start.uniform,
        "relation": start.relation,
    }
    if start.relation in _RELATIONS:
        evidence["expected"] = f"{start.recomputed:.4g}, the mean loss of the same logits"
        yield Fault(
            f"the initial loss, {start.observed:.4g}, {_RELATIONS[start.relation]}; the mean loss "
            f"of the same logits is {start.recomputed:.4g} and {_naive(start)}",
            evidence=evidence,
            fix=_FIXES.get(start.relation),
        )
        return
    limit = highest_healthy(start, errors, floor, logit_variance)
    if not start.recomputed <= limit:
        yield Fault(
            f"the initial loss is {start.recomputed:.4g}; a head that knows nothing gives "
            f"{_expected(start)}, at most {limit:.4g}",
            evidence=evidence | {"limit": limit},
        )


def highest_healthy(
    start: InitialLoss, errors: float, floor: float, logit_variance: float
) -> float:
    """The highest initial loss that a fresh head may give."""
    if not start.redrawn:
        return start.expected * (1 + floor) + errors * start.standard_error
    mean = math.fsum(start.redrawn) / len(start.redrawn)
    limit = mean * (1 + floor) + _wide(errors, len(start.redrawn)) * _spread(start.redrawn)
    if start.remade:  # the hidden states may be what is blown up: whole models say what is normal
        limit = min(limit, 2 * max(start.remade))
    if start.problem_type == SOFTMAX:
        excess = logit_variance / 2 * (1 - 1 / max(start.outputs, 2))
    elif start.problem_type == BINARY:
        excess = logit_variance / 8
    else:
        excess = 0.0
    return max(limit, start.uniform + excess if excess else limit)


def _spread(values: tuple[float, ...]) -> float:
    """Standard deviation of one more value around the mean of `values`."""
    n = len(values)
    mean = math.fsum(values) / n
    variance = math.fsum((v - mean) ** 2 for v in values) / max(n - 1, 1)
    return math.sqrt(variance * (1 + 1 / n))


def _wide(errors: float, n: int) -> float:
    """As rare under Student's t with n - 1 degrees of freedom as `errors` under the normal."""
    from scipy.special import ndtr, stdtrit

    return -float(stdtrit(max(n - 1, 1), ndtr(-errors)))


def _naive(start: InitialLoss) -> str:
    if start.problem_type == SOFTMAX:
        return f"-log(1/{start.outputs}) = {start.uniform:.4g}"
    if start.problem_type == BINARY:
        return f"-log(1/2) = {start.uniform:.4g}"
    return f"the variance of the targets is {start.uniform:.4g}"


def _expected(start: InitialLoss) -> str:
    if start.redrawn:
        mean = math.fsum(start.redrawn) / len(start.redrawn)
        spread, how = _spread(start.redrawn), f"{len(start.redrawn)} re-drawn heads"
    else:
        mean, spread, how = start.expected, start.standard_error, "labels independent of inputs"
    return f"{mean:.4g} +- {spread:.2g} ({how}; {_naive(start)})"


_FIXES = {
    "sum": 'use reduction="mean" in the loss',
    "negative": "return loss, not -loss, from compute_loss",
    "zero": "check that compute_loss returns the loss of the labels, not a constant",
    "scaled": "return the mean loss unscaled; the Trainer divides by accumulation itself",
    "applied twice": "pass the logits to the loss; it applies softmax or sigmoid itself",
    "no logarithm": "loss = F.cross_entropy(logits, labels)",
    "no softmax": "loss = F.cross_entropy(logits, labels)",
    "not finite": "check labels, inputs and the output layer's weights for NaN and infinity",
}

CHECK = Check(
    name="initial-loss-unexpected",
    stage="baselines",
    severity="warning",
    moments=("probe",),
    why="A model that has learnt nothing must start at the loss of knowing nothing; another value "
    "is a wrong loss, wrong labels or a wrong head.",
    fix="Check the reduction and sign of the loss, the order of the labels, and the output layer.",
    source="Karpathy, A Recipe for Training Neural Networks (2019): verify loss @ init",
    unsure="A trained head that meets labels it has never seen may start above a fresh one. A loss "
    "that is multiplied by a constant on purpose is reported. Custom losses that are no weighted "
    "mean of the cross-entropy are judged by the logits alone.",
    judges=(initial_loss_unexpected,),
    explains=("output-bias-unset", "hockey-stick", "padded-loss-differs"),
)
