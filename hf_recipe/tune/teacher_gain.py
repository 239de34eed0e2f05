"""Does the teacher know more than its student? And how much of it has the student learnt?

A teacher that is no better than its student has nothing to teach. Before step 1 both are asked
the same held-out rows; after training, `fidelity` says how much of the teacher arrived: agreement
of the top answers, divergence, calibration, accuracy kept, and what was saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from hf_recipe.baselines.start import is_loaded
from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.exhibit import Table
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.subject import Subject
from hf_recipe.tune.teacher_answers import ROWS, Answers, ask
from hf_recipe.tune.teachers import teachers_of


@dataclass(frozen=True)
class TeacherGain(Measurement):
    """Errors of teacher and student on the same rows, before training.

    Attributes:
        teacher_error, student_error: mean over rows of the share of wrong top answers (squared
            error for numbers).
        gain: mean paired difference, student less teacher: positive is a better teacher.
        standard_error: of the gain, over rows.
        rows: labelled rows.
        split: where they came from.
        blind_error: that of always answering the commonest label; None: the labels are no classes.
        loaded: whether the student came out of a checkpoint, and may know something itself.
    """

    teacher_error: float
    student_error: float
    gain: float
    standard_error: float
    rows: int
    split: str
    blind_error: float | None = None
    loaded: bool = False

    @property
    def blind(self) -> bool:
        """Whether the teacher is within two standard errors of what one answer for all gives."""
        if self.blind_error is None:
            return False
        noise: float = (self.blind_error * (1 - self.blind_error) / max(self.rows, 1)) ** 0.5
        return self.teacher_error > self.blind_error - 2 * noise


@dataclass(frozen=True)
class Fidelity(Measurement):
    """What arrived of the teacher in its student, over labelled and unlabelled rows.

    Attributes:
        agreement: share of items with the same top answer (None for numbers).
        divergence: mean KL(teacher || student) in nats (squared difference for numbers).
        teacher_error, student_error, gain, standard_error, labelled: as in `TeacherGain`; NaN
            and 0 where no row is labelled.
        teacher_calibration, student_calibration: expected calibration error, 15 bins.
        parameters_ratio, speed_ratio: teacher's over student's parameters and seconds.
        rows: rows asked.
        class_losses: {class: (teacher's mean loss in nats, student's, labelled items)}, of heads
            with `CLASSES` classes or fewer.
    """

    agreement: float | None
    divergence: float
    teacher_error: float
    student_error: float
    gain: float
    standard_error: float
    teacher_calibration: float | None
    student_calibration: float | None
    parameters_ratio: float
    speed_ratio: float
    labelled: int
    rows: int
    class_losses: dict[str, tuple[float, float, int]] = field(default_factory=dict)


def _paired(student: Answers, teacher: Answers) -> tuple[float, float, float, float, int]:
    """(teacher's error, student's error, gain, its standard error, rows)."""
    if not student.errors:
        return float("nan"), float("nan"), float("nan"), float("nan"), 0
    ours, theirs = torch.cat(student.errors).double(), torch.cat(teacher.errors).double()
    kept = ours.isfinite() & theirs.isfinite()
    ours, theirs = ours[kept], theirs[kept]
    gain, rows = ours - theirs, int(kept.sum())
    if rows < 2:
        return float("nan"), float("nan"), float("nan"), float("nan"), rows
    error = float(gain.std() / rows**0.5)
    return float(theirs.mean()), float(ours.mean()), float(gain.mean()), error, rows


def calibration_error(confidences: Tensor, hits: Tensor, bins: int = 15) -> float:
    """Expected calibration error: mean gap of confidence and accuracy over equal bins.

    Args:
        confidences: (items,) in [0, 1].
        hits: (items,), 1 where the top answer was right.

    NaN where a confidence is none. Source: Guo et al. 2017.
    """
    if not bool(confidences.isfinite().all()):
        return float("nan")
    index = (confidences * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64)
    gaps.index_add_(0, index.cpu(), (hits - confidences).double().cpu())
    return float(gaps.abs().sum() / max(len(hits), 1))


def measure_gain(subject: Subject) -> Iterator[TeacherGain]:
    """Ask teacher and student the same held-out rows (training rows where there are no others)."""
    teachers = teachers_of(subject)
    split = next(iter(subject.evaluation), "train")
    asked = ask(subject, teachers, split, ROWS)
    theirs, ours, gain, error, rows = _paired(asked.student, asked.teacher)
    if rows < 2:
        raise Skip(f"the {split} rows carry no labels to compare teacher and student by")
    blind = blind_error_of(asked.teacher)
    yield TeacherGain(theirs, ours, gain, error, rows, split, blind, is_loaded(subject))


def blind_error_of(answers: Answers) -> float | None:
    """The share of labelled items that have another label than the commonest."""
    if not answers.labels:
        return None
    counts = torch.bincount(torch.cat(answers.labels).flatten())
    return 1 - float(counts.max()) / max(int(counts.sum()), 1)


def fidelity(trainer: Any, split: str = "validation", rows: int = 2048) -> tuple[Fidelity, Table]:
    """What arrived of the teacher in `trainer`'s student: the numbers, and a table to show.

    Args:
        trainer: a `DistillationTrainer`, after training.
        split: "train" or the name of an evaluation set.
        rows: evenly spaced rows that are asked at most.
    """
    from hf_recipe.instruments.batches import rows_of_trainer
    from hf_recipe.instruments.quiet import quiet

    sets = trainer.eval_dataset
    named = sets if isinstance(sets, dict) else {"validation": sets}
    evaluation = {n: r for n, d in named.items() if (r := rows_of_trainer(trainer, d, n))}
    train = rows_of_trainer(trainer, trainer.train_dataset, "train")
    subject = Subject(trainer.student, trainer.args, train, evaluation, trainer=trainer)
    with quiet(trainer.model, trainer=trainer):
        asked = ask(subject, list(trainer.teachers), split, rows)
    student, teacher = asked.student, asked.teacher
    theirs, ours, gain, error, labelled = _paired(student, teacher)
    same = torch.cat(student.tops) == torch.cat(teacher.tops)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (trainer.student, *trainer.teachers)]
    calibrations = [
        calibration_error(torch.cat(a.confidences), torch.cat(a.hits)) if a.hits else None
        for a in (teacher, student)
    ]
    found = Fidelity(
        agreement=None if same.numel() == 0 else float(same.float().mean()),
        divergence=asked.divergence,
        teacher_error=theirs,
        student_error=ours,
        gain=gain,
        standard_error=error,
        teacher_calibration=calibrations[0],
        student_calibration=calibrations[1],
        parameters_ratio=sum(sizes[1:]) / sizes[0],
        speed_ratio=teacher.seconds / student.seconds if student.seconds else float("nan"),
        labelled=labelled,
        rows=asked.rows,
        class_losses=_class_losses(trainer.student, teacher, student),
    )
    return found, fidelity_table(found)


def _class_losses(
    model: nn.Module, teacher: Answers, student: Answers
) -> dict[str, tuple[float, float, int]]:
    """Mean loss of both on each class, by its name where the config has one."""
    if not student.losses:
        return {}
    classes = torch.cat(student.labels)
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    found = {}
    for index in sorted(set(classes.tolist())):
        mine = classes == index
        means = [float(torch.cat(a.losses)[mine].double().mean()) for a in (teacher, student)]
        found[str(names.get(index, index))] = (means[0], means[1], int(mine.sum()))
    return found


def class_table(found: Fidelity) -> Table:
    """The classes, where the student lost most first."""
    lost = sorted(found.class_losses.items(), key=lambda item: item[1][0] - item[1][1])
    rows = tuple((name, n, theirs, ours, ours - theirs) for name, (theirs, ours, n) in lost)
    return Table(
        title="Loss per class, teacher and student",
        stage="tune",
        columns=("class", "items", "teacher, nats", "student, nats", "lost, nats"),
        rows=rows,
    )


def fidelity_table(found: Fidelity) -> Table:
    """The fidelity as a table: teacher, student, and what became of it."""
    kept = (1 - found.student_error) / max(1 - found.teacher_error, 1e-9)
    return Table(
        title="Fidelity of the student",
        stage="tune",
        columns=("measure", "teacher", "student", "ratio"),
        rows=(
            ("error", found.teacher_error, found.student_error, None),
            ("accuracy kept", None, None, kept),
            ("calibration error", found.teacher_calibration, found.student_calibration, None),
            ("agreement of top answers", None, found.agreement, None),
            ("KL(teacher || student), nats", None, found.divergence, None),
            ("parameters, teacher / student", None, None, found.parameters_ratio),
            ("seconds, teacher / student", None, None, found.speed_ratio),
        ),
        caption=f"{found.rows} rows, {found.labelled} of them labelled",
    )


def judge_gain(
    gain: TeacherGain,
    *,
    sigmas: Annotated[float, "judgement: a teacher within one standard error knows no more"] = 1.0,
    least_rows: Annotated[int, "judgement: fewer rows resolve nothing"] = 16,
    worth: Annotated[float, "judgement: a tenth of the student's errors is worth a teacher"] = 0.1,
    even: Annotated[float, "the commonest label's error, from which it is a mark; judgement"] = 0.3,
) -> Iterator[Fault]:
    """A teacher that is not better than the untrained student, or than one answer for all.

    Where one label is nearly all, accuracy is no mark. Against a student out of a checkpoint, a
    teacher that may be better by what `worth` says, within two standard errors, is undecided on so
    few rows.
    """
    blind = gain.blind and gain.blind_error is not None and gain.blind_error >= even
    better = gain.gain > sigmas * gain.standard_error
    open_ = gain.loaded and gain.gain + 2 * gain.standard_error > worth * gain.student_error
    if gain.rows < least_rows or (not blind and (better or open_)):
        return
    yield Fault(
        f"before training the student errs by {gain.student_error:.3f} and its teacher by "
        f"{gain.teacher_error:.3f} on {gain.rows} {gain.split} rows: a gain of {gain.gain:.3f} "
        f"+- {gain.standard_error:.3f}"
        + (f"; always the commonest label errs by {gain.blind_error:.3f}" if blind else ""),
        subject="before training",
        evidence={
            "seen": f"teacher's error {gain.teacher_error:.3f}",
            "expected": f"well below the student's {gain.student_error:.3f}",
            "gain": gain.gain,
            "standard_error": gain.standard_error,
        },
    )


def judge_fidelity(
    found: Fidelity,
    *,
    sigmas: Annotated[float, "judgement: three standard errors, paired, over rows"] = 3.0,
) -> Iterator[Fault]:
    """A student that has left its teacher behind."""
    if found.labelled < 2 or not found.gain < -sigmas * found.standard_error:
        return
    yield Fault(
        f"after training the student errs by {found.student_error:.3f}, its teacher by "
        f"{found.teacher_error:.3f} on {found.labelled} rows: the teacher holds it back",
        subject="after training",
        severity="note",
        evidence={
            "seen": f"teacher's error {found.teacher_error:.3f}",
            "expected": f"at most the student's {found.student_error:.3f}",
            "gain": found.gain,
            "standard_error": found.standard_error,
        },
    )


GAIN = Probe("ask teacher and student", "probe", (TeacherGain,), measure_gain, ("fresh",))

TEACHER_NO_BETTER = Check(
    name="teacher-no-better",
    stage="tune",
    severity="warning",
    moments=("probe", "eval"),
    why="A teacher that knows no more than its student on this data has nothing to teach.",
    fix="Trainer(teacher, args, train_dataset=dataset).train()  # fine-tune the teacher first",
    source="Hinton et al. 2015; Cho and Hariharan 2019 on teachers and students",
    unsure="A teacher of another domain may still regularise; a student that passes a good "
    "teacher at the end is a success, so that is a note.",
    judges=(judge_gain, judge_fidelity),
    explains=("distillation-idle",),
    call="hf_recipe.tune.teacher_gain.fidelity(trainer)",
)
