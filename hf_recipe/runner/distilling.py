"""The recipe's last step: an ensemble of the best runs, then one small model that stands for it.

Nothing is trained for the ensemble: the weights of the best runs were kept on the way
(`runner.kept`). The student is trained with and without its teacher, on the same rows and seeds,
and what arrived of the teacher is measured on validation rows, which neither has learned from.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import IntervalStrategy

from hf_recipe.core.exhibit import Answer
from hf_recipe.instruments.compare import Gain, Outcome, paired_gain
from hf_recipe.runner.cards import ARRIVED, HELPED
from hf_recipe.runner.distil import load_together, together
from hf_recipe.runner.experiment import Lab
from hf_recipe.runner.journey import Journey
from hf_recipe.runner.looks import examiner_of
from hf_recipe.runner.setup import Setup
from hf_recipe.tune.teacher_gain import Fidelity, class_table, fidelity_table

WORDS = {True: "yes", False: "no", None: "undecided"}


def distil(journey: Journey) -> None:
    """Ensemble, then student; leaves the teachers' folders in `journey.teachers`."""
    lab = journey.lab
    journey.teachers = _teachers(journey)
    alone = student_of(journey)
    taught = alone.change(teacher=together(journey.teachers))
    both = {"student alone": alone, "student, distilled": taught}
    lab.ahead([s.variant(name, seed) for name, s in both.items() for seed in lab.seeds])
    plain = journey.outcomes("student alone", alone)
    distilled = journey.outcomes("student, distilled", taught)
    gain = journey.gain(plain, distilled)
    journey.note("student alone", plain)
    journey.note("student, distilled", distilled)
    answer = f"{WORDS[gain.verdict]}: {gain}"
    lab.report.answer(Answer(HELPED, "tune", answer))
    _report_fidelity(lab, distilled[0])


def student_of(journey: Journey) -> Setup:
    """A network of half the width: it bears twice the rate, and learns twice as long.

    Adam's rate goes with one over the width (Yang et al. 2022, arXiv:2203.03466), from the one that
    the job began with; and each of its steps costs a fraction of the teacher's.
    """
    rate, epochs = 2 * journey.lab.start.learning_rate, 2 * journey.setup.epochs
    return journey.setup.change(model="student", learning_rate=rate, epochs=epochs, dropout=0.0)


# ------------------------------------------------------------------ the teacher


def _teachers(journey: Journey) -> list[Path]:
    """The best runs, whose predictions are averaged; the best alone where that is worse."""
    lab = journey.lab
    folders = lab.kept.best(journey.setup.share)
    if not folders:  # somebody has deleted the weights
        kept = journey.setup.change(keep=True).variant("teacher", lab.seeds[0])
        lab.train(kept)
        return [lab.model_path(kept)]
    if len(folders) == 1 or lab.data.task.condense is not None:
        return folders[:1]  # an ensemble averages one answer per row
    single, averaged = (
        predict(lab, journey.setup, load_together(together(some)), "validation")
        for some in (folders[:1], folders)
    )
    gain = paired_gain([single["row_losses"]], [averaged["row_losses"]])
    _note_ensemble(journey, averaged, gain, len(folders))
    return folders if gain.verdict is not False else folders[:1]


def _note_ensemble(journey: Journey, seen: dict[str, Any], gain: Gain, members: int) -> None:
    lab = journey.lab
    text = f"{WORDS[gain.verdict]}: {members} averaged, {gain} per row over the best of them"
    lab.report.answer(Answer("Do the best runs together beat the best one?", "tune", text))
    outcome = Outcome(seen["row_losses"], metric=seen["metrics"].get(lab.metric_name))
    journey.note(f"ensemble of {members}", [outcome])


def predict(lab: Lab, setup: Setup, model: nn.Module, part: str) -> dict[str, Any]:
    """``row_losses`` and ``metrics`` of a model on the rows of `part`, as `setup` sees them."""
    feed = lab.feed_for(setup)
    args = lab.arguments(setup, setup.variant(f"read {part}", lab.seeds[0]))
    args.report_to, args.dataloader_drop_last = [], False
    args.eval_strategy = IntervalStrategy.NO
    trainer = Trainer(model=model, args=args, **lab.measured(feed))
    seen = trainer.predict(feed.rows(part))
    shutil.rmtree(args.output_dir, ignore_errors=True)
    metrics = {k.removeprefix("test_"): float(v) for k, v in seen.metrics.items()}
    return {
        "row_losses": lab.data.task.row_losses(seen.predictions, seen.label_ids),
        "metrics": {k: v for k, v in metrics.items() if not k.endswith(("runtime", "_second"))},
    }


# ------------------------------------------------------------------ what arrived of it


def _report_fidelity(lab: Lab, outcome: Outcome) -> None:
    """Agreement, divergence, calibration, ratios, and losses per class, of the first seed."""
    found = Fidelity.from_values(outcome.facts["fidelity"])
    lab.report.exhibit(fidelity_table(found))
    if found.class_losses:
        lab.report.exhibit(class_table(found))
    examiner_of(lab).judge(found, "end", split="validation")
    lab.report.answer(Answer(ARRIVED, "tune", _in_words(found), found.values()))


def _in_words(found: Fidelity) -> str:
    parts = [f"KL {found.divergence:.3f} nats"]
    if found.agreement is not None:
        parts.insert(0, f"the top answers agree on {found.agreement:.1%} of {found.rows} rows")
    if found.labelled:
        parts.append(f"error {found.teacher_error:.3f} -> {found.student_error:.3f}")
    if found.teacher_calibration is not None and found.student_calibration is not None:
        errors = f"{found.teacher_calibration:.3f} -> {found.student_calibration:.3f}"
        parts.append(f"calibration error {errors}")
    ratios = f"{found.parameters_ratio:.1f} x smaller"
    if np.isfinite(found.speed_ratio):
        ratios += f", {found.speed_ratio:.1f} x faster"
    rows: Sequence[Any] = class_table(found).rows
    if rows:
        ratios += f"; it lost most on {rows[0][0]} ({rows[0][4]:+.3f} nats)"
    return ", ".join(parts) + f"; {ratios}"
