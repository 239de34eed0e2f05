"""Baselines: the simplest model, a blind one, one batch, and charted dependencies.

Augmentation, dropout and decay of weights are off: generalisation comes later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from hf_recipe.baselines.augmentation import BASELINE, REDRAW
from hf_recipe.baselines.dependency import row_dependence
from hf_recipe.baselines.one_batch import OneBatch, overfit_one_batch
from hf_recipe.core.check import Skip
from hf_recipe.core.exhibit import Answer, Curve, Line, Mark
from hf_recipe.core.report import Gate
from hf_recipe.data.preview import preview
from hf_recipe.examiner import Examiner
from hf_recipe.instruments.compare import Outcome
from hf_recipe.instruments.distributed import from_rank_0
from hf_recipe.instruments.quiet import quiet
from hf_recipe.instruments.subject import Subject
from hf_recipe.runner.experiment import Lab
from hf_recipe.runner.gates import baselines_gate
from hf_recipe.runner.journey import Journey, validation_loss
from hf_recipe.runner.looks import counted, examiner_of, largest_batch, same_twice
from hf_recipe.runner.pieces import curves
from hf_recipe.trainer.preflight import subject_of_trainer

SIMPLEST_RATE = 1e-2  # a linear model bears, and needs, more than a transformer


def run(journey: Journey) -> Gate:
    """Prove the pipeline on one batch, then train the first models."""
    lab, setup = journey.lab, journey.setup
    args = lab.arguments(setup, setup.variant("one batch", lab.seeds[0]))
    trainer = lab.trainer(setup, args)
    subject = subject_of_trainer(trainer, fresh=not lab.pretrained)
    examiner = examiner_of(lab)
    _look_just_before_the_net(lab, subject)
    _first_loss(lab, subject)
    one_batch, text = _one_batch(lab, subject, examiner)
    subject.cache[BASELINE] = True
    examiner.examine(REDRAW, subject, guard=lambda: quiet(trainer.model, trainer=trainer))
    examiner.examine(row_dependence, subject, guard=lambda: quiet(trainer.model, trainer=trainer))
    lab.show.say(f"       the same twice from one seed? {same_twice(examiner, trainer)}")
    largest_batch(examiner, trainer)
    leaking = any(finding.check == "example-leak" for finding in lab.report.flat)
    simple = _simplest(journey, subject)
    journey.simplest = simple(lab.seeds)
    base = journey.outcomes("base", setup, watch=True)
    blind = [Outcome(lab.data.task.blind_losses(lab.feed)) for _ in lab.seeds]
    lab.report.exhibit(curves(base[0], "The baseline's course", "baselines"))
    blind_row = float(np.mean(blind[0].row_losses))
    journey.rows.insert(0, ["input-blind", f"{blind_row:.4f}", "", "0.0"])
    journey.note("baseline", base)
    versus_simplest = journey.look_twice(
        journey.simplest,
        base,
        lambda seeds: (simple(seeds), journey.outcomes("base", setup, seeds=seeds)),
    )
    return baselines_gate(one_batch, text, journey.gain(blind, base), versus_simplest, leaking)


def _simplest(journey: Journey, subject: Subject) -> Callable[[Sequence[int]], list[Outcome]]:
    """Seeds -> outcomes of the simplest model, or of one that counts where that is better."""
    small = journey.setup.change(model="simplest", learning_rate=SIMPLEST_RATE)
    trained = journey.outcomes("simplest", small)
    journey.note("simplest", trained)
    reference = counted(journey.lab, subject)
    if reference is None or reference.loss >= validation_loss(trained):
        return lambda seeds: journey.outcomes("simplest", small, seeds=seeds)
    losses = reference.losses
    journey.note(reference.name, [Outcome(losses) for _ in journey.lab.seeds])
    return lambda seeds: [Outcome(losses) for _ in seeds]


def _look_just_before_the_net(lab: Lab, subject: Subject) -> None:
    """Show a batch after collation: decoded tokens, un-normalised pictures, ranges."""
    with quiet(subject.model, trainer=subject.trainer):
        for exhibit in preview(subject):
            lab.report.exhibit(replace(exhibit, stage="baselines"))


def _first_loss(lab: Lab, subject: Subject) -> None:
    """-log(1/n) beside the loss that the fresh model has."""
    with quiet(subject.model, trainer=subject.trainer):
        subject.model.eval()
        batches = list(subject.batches("train", rows=256, size=64))
        weights = [len(batch) for batch in batches]
        with torch.no_grad():
            losses = [float(subject.compute_loss(batch.inputs)) for batch in batches]
    loss = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
    answer = f"loss {loss:.4f} before the first step; {lab.data.task.uniform(lab.feed)}"
    if lab.bias:
        answer += f"; {lab.bias}"
    lab.report.answer(Answer("Does the loss begin where it should?", "baselines", answer))
    lab.show.say(f"       {answer}")


def _one_batch(lab: Lab, subject: Subject, examiner: Examiner) -> tuple[bool | None, str]:
    try:
        measured = overfit_one_batch(subject)
    except Skip as reason:
        examiner.skip((OneBatch,), str(reason))
        return None, str(reason)
    measured = from_rank_0(measured)
    examiner.judge(measured, "probe")
    lab.report.exhibit(_course(measured))
    text = (
        f"one batch of {measured.rows} rows: loss {measured.start:.4f} -> {measured.end:.4f} "
        f"in {measured.steps} steps, floor {measured.floor:.4f}"
    )
    lab.show.say(f"       {text}")
    return measured.reached, text


def _course(measured: OneBatch) -> Curve:
    steps: tuple[float, ...] = tuple(range(len(measured.losses)))
    return Curve(
        "One batch",
        "baselines",
        "step",
        "loss",
        (Line("loss", steps, measured.losses),),
        (Mark("floor", measured.floor),),
    )
