"""What the main job looks at besides its experiments, with the user's selection of checks."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_recipe.baselines.batch_search import find_batch_size
from hf_recipe.baselines.batch_size import BatchSize
from hf_recipe.baselines.determinism import answer as answer_of_runs
from hf_recipe.baselines.determinism import check_determinism
from hf_recipe.baselines.reference_models import Reference, reference_lines
from hf_recipe.complexify.checkpoint_reload import CheckpointReload, check_checkpoint
from hf_recipe.core.check import Probe, Skip
from hf_recipe.core.exhibit import Answer, Table
from hf_recipe.core.report import Report
from hf_recipe.examiner import Examiner
from hf_recipe.instruments.compare import Gain
from hf_recipe.instruments.distributed import from_rank_0, rank
from hf_recipe.instruments.quiet import quiet
from hf_recipe.instruments.subject import Subject
from hf_recipe.regularize.simple_model import AgainstSimple, answer
from hf_recipe.trainer.preflight import subject_of_trainer

if TYPE_CHECKING:
    from hf_recipe.runner.experiment import Lab

BATCH_SECONDS = 4.0
STEPS_TWICE = 2


def examiner_of(lab: Lab) -> Examiner:
    """An examiner that writes into the job's report."""
    return Examiner(
        lab.settings(), lab.report, hear=lab.show.finding, agree=from_rank_0, leads=rank() == 0
    )


def check_saved(lab: Lab, trainer: Any, path: Path) -> None:
    """Load what was just saved again, and compare it with the model in memory."""
    subject = subject_of_trainer(trainer, fresh=False)
    probe = Probe(
        "load the saved model again",
        "end",
        (CheckpointReload,),
        lambda subject: check_checkpoint(subject, path),
    )
    guard = functools.partial(quiet, trainer.model, trainer=trainer)
    examiner_of(lab).examine(probe, subject, guard)


def counted(lab: Lab, subject: Subject) -> Reference | None:
    """The best model that counts tokens, on the validation rows; None: the task has none.

    It is chosen by training rows that it did not learn from.
    """
    if not lab.data.task.counted:
        return None
    with quiet(subject.model, trainer=subject.trainer):
        lines = reference_lines(subject)
    rows = tuple((line.name, line.held_out, line.loss) for line in lines.lines)
    columns = ("model", "loss on held-out training rows", "validation loss")
    lab.report.exhibit(Table("Models that count", "baselines", columns, rows))
    best = lines.best
    lab.show.say(f"       {best.name}, counted on the training rows: loss {best.loss:.4f}")
    whole = len(best.losses) == lab.feed.count("validation")
    return best if whole and all(map(math.isfinite, best.losses)) else None


def largest_batch(examiner: Examiner, trainer: Any) -> None:
    """The largest micro-batch that fits, and the knee of the speed."""
    trainer.create_optimizer()
    subject = subject_of_trainer(trainer, fresh=True)
    take = functools.partial(find_batch_size, seconds=BATCH_SECONDS, noise=False)
    guard = functools.partial(quiet, trainer.model, trainer=trainer)
    examiner.examine(Probe("find the largest batch", "probe", (BatchSize,), take), subject, guard)
    found = examiner.latest.get(BatchSize.kind())
    if isinstance(found, BatchSize):
        fits = f"all {found.largest} rows" if found.bounded else f"{found.largest} rows"
        text = f"{fits} fit on a device; speed levels off at {found.knee}"
        examiner.report.answer(Answer("How large can a batch be?", "baselines", text))


def same_twice(examiner: Examiner, trainer: Any) -> str:
    """Whether two short runs from one seed agree, as an answer in the report; its text."""
    trainer.create_optimizer()
    subject = subject_of_trainer(trainer, fresh=True)
    with quiet(trainer.model, trainer=trainer):
        try:
            outcome: Any = check_determinism(subject, steps=STEPS_TWICE)
        except Skip as reason:
            outcome = str(reason)
    told = answer_of_runs(from_rank_0(outcome))
    examiner.report.answer(told)
    return told.answer


def against_simplest(
    lab: Lab, simplest: float, model: float, gain: Gain, rows: int, steps: int
) -> None:
    """The regularized model against the simplest one, over the same seeds and rows."""
    measured = AgainstSimple(
        name="simplest",
        simple=simplest,
        model=model,
        gain=gain.mean,
        standard_error=(gain.high - gain.mean) / 2,
        rows=rows,
        steps=steps,
        split="validation",
    )
    examiner_of(lab).judge(measured, "eval", split="validation")
    lab.report.answer(answer(measured))


def absorb(report: Report, seen: Report, chosen: Collection[str]) -> None:
    """Take into `report` what another one ran, skipped and crashed on, of the chosen checks."""
    for name in [name for name in seen.ran if name in chosen]:
        known = report.ran.setdefault(name, [])
        known += [moment for moment in seen.ran[name] if moment not in known]
        report.skipped.pop(name, None)
    for name, reason in seen.skipped.items():
        if name not in report.ran and name in chosen:
            report.skipped.setdefault(name, reason)
    report.crashed |= seen.crashed
    report.explains |= seen.explains
    report.environment |= seen.environment
    report.measurements += [m for m in seen.measurements if m.moment == "dataset"]
