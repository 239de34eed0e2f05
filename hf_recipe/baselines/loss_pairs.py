"""Does the loss compare each output with its own label, and none that stands on padding?

A cross-entropy over positions asks for classes on the second axis, and a ``view`` in the place of
a ``transpose`` gives it the right shape and other numbers: the loss falls a little, and the model
learns nothing. The loss's gradient shows it. Where targets are single classes, exactly one class
of each supervised output is pulled up; where the axes are mixed, as many are pulled up in all, and
they fall on the outputs as chance has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch

from hf_recipe.core.check import Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.heads import bare
from hf_recipe.instruments.overrides import replaces
from hf_recipe.instruments.padding import pad_positions
from hf_recipe.instruments.reach import is_own
from hf_recipe.instruments.subject import Subject
from hf_recipe.instruments.trace import few_rows, trace

TINY = 1e-6  # of the largest gradient: what rounding leaves


@dataclass(frozen=True)
class PulledClasses(Measurement):
    """Where the loss's gradient asks for more of a class.

    Attributes:
        supervised: outputs with a label that counts.
        pulled: classes that are pulled up, over all outputs.
        single: supervised outputs of which exactly one class is.
        rows, padded: of the batch, and outputs that stand on padding.
        on_padding: of these, those that the loss has a gradient on.
    """

    supervised: int
    pulled: int
    single: int
    rows: int = 0
    padded: int = 0
    on_padding: int = 0


def measure_pulled(subject: Subject) -> Iterator[PulledClasses]:
    """One pass, and its loss's gradient on the logits; of losses that the user wrote."""
    trainer = subject.trainer
    given = trainer is not None and (
        trainer.compute_loss_func is not None or replaces(trainer, "compute_loss")
    )
    if not given and not is_own(bare(subject.model)):
        raise Skip("the loss is a library's own")
    batch = few_rows(subject)
    labels = batch.labels
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.ndim < 2:
        raise Skip("there is not a class for each of several outputs of a row")
    made = trace(subject, batch)
    logits = made.logits
    if logits is None or logits.shape[:-1] != labels.shape or not made.loss.requires_grad:
        raise Skip("the outputs do not run along the labels")
    (gradient,) = torch.autograd.grad(made.loss, [logits], allow_unused=True)
    if gradient is None or not bool(gradient.isfinite().all()):
        raise Skip("the loss is not computed from the outputs that the model returns")
    up = gradient < -TINY * gradient.abs().max()
    counted = labels.to(up.device) != -100
    pads = pad_positions(subject, batch.inputs, batch.inputs.get("attention_mask"))
    if pads is None or pads.shape != counted.shape:
        pads = torch.zeros_like(counted)
    yield PulledClasses(
        supervised=int(counted.sum()),
        pulled=int(up.sum()),
        single=int((counted & (up.sum(-1) == 1)).sum()),
        rows=len(counted),
        padded=int(pads.sum()),
        on_padding=int((pads.to(up.device) & (gradient != 0).any(-1)).sum()),
    )


def pairs_mixed(
    seen: PulledClasses,
    *,
    share: Annotated[float, "of the supervised outputs; a loss that keeps pairs gives 1.0"] = 0.8,
    equal: Annotated[
        float, "relative: single targets pull up one class each, a shift one a row less"
    ] = 0.1,
    enough: Annotated[int, "outputs, from which chance is out of the question"] = 16,
) -> Iterator[Fault]:
    """As many classes are pulled up as there are labels, on other outputs than the labels'."""
    if seen.supervised < enough or abs(seen.pulled / seen.supervised - 1) > equal:
        return
    if seen.single >= share * seen.supervised:
        return
    yield Fault(
        f"the loss pulls up {seen.pulled} classes for {seen.supervised} labels, and only "
        f"{seen.single} of the labelled outputs get exactly one: outputs are compared with other "
        "outputs' labels",
        subject="pairs",
        evidence={
            "seen": f"{seen.single} of {seen.supervised} outputs with one target",
            "expected": "all",
        },
        fix="F.cross_entropy(logits.transpose(1, 2), labels)  # view() and reshape() mix the axes",
    )


def padding_counts(
    seen: PulledClasses,
    *,
    share: Annotated[
        float, "of the outputs on padding; a masked loss has a gradient on none"
    ] = 0.5,
) -> Iterator[Fault]:
    """A term of the loss runs over padding, whatever the labels say."""
    # One a row is the place before the first token, where padding stands on the left.
    if seen.on_padding <= seen.rows or seen.on_padding <= share * seen.padded:
        return
    yield Fault(
        f"the loss has a gradient on {seen.on_padding} of {seen.padded} outputs that stand on "
        "padding: a term of it counts them",
        subject="padding",
        evidence={"seen": f"{seen.on_padding} of {seen.padded}", "expected": "0"},
        fix="loss = (each * mask).sum() / mask.sum()  # mask = labels != -100, in every term",
    )


PAIR_TARGETS = Probe(
    "pair outputs with labels", "probe", (PulledClasses,), measure_pulled, needs=("unsharded",)
)
