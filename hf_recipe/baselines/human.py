"""Human baseline: what does a person reach on what the network gets?

The recipe asks to watch "human interpretable" metrics and, where possible, to label some rows
oneself. Rows are drawn by class, shown without their label, and a quarter of them comes again
later in another order: what a person says of the same row twice bounds what the labels can mean.

Every figure comes with its interval; a kappa is undefined where everyone always gives one answer,
and is then said to be so.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import datasets
import numpy as np
import numpy.typing as npt

from hf_recipe.core.check import Check, Measurement, private
from hf_recipe.core.finding import Fault
from hf_recipe.data.review import class_names, question_of
from hf_recipe.data.source import Roles
from hf_recipe.instruments.interview import Interview
from hf_recipe.instruments.journal import Journal, standing

KIND = "hf_recipe human baseline"
APART = 20  # questions at least between a row and its repetition
DRAWS = 1_000

Integers = npt.NDArray[np.int64]


# ---------------------------------------------------------------- asking


def draw_rows(labels: Sequence[Any], count: int, repeats: float, seed: int) -> list[int]:
    """Rows in the order they are asked, some twice, at least `APART` apart where that can be.

    Classes are drawn in proportion, each at least once; the repetitions are taken from rows asked
    early and come last, in another order.
    """
    draw = np.random.default_rng(seed)
    given = np.array([str(v) for v in labels])
    count = min(count, len(given))
    names, sizes = np.unique(given, return_counts=True)
    share = np.maximum(1, np.floor(sizes * count / len(given)).astype(int))
    chosen = [
        draw.permutation(np.flatnonzero(given == n))[:k] for n, k in zip(names, share, strict=True)
    ]
    rows = draw.permutation(np.concatenate(chosen))[: max(count, 1)]
    rest = draw.permutation(np.setdiff1d(np.arange(len(given)), rows))[: count - len(rows)]
    rows = draw.permutation(np.concatenate([rows, rest]))
    early = rows[: max(len(rows) - APART, len(rows) // 2)]
    again = draw.permutation(early)[: round(repeats * len(rows))]
    return [int(row) for row in (*rows, *again)]


def human_interview(
    dataset: datasets.Dataset,
    roles: Roles,
    path: str | os.PathLike[str],
    *,
    count: int = 100,
    repeats: float = 0.25,
    seed: int = 0,
    annotator: str = "",
) -> Interview:
    """The blind interview over `count` rows of `dataset`; `path` is its journal.

    Raises:
        ValueError: no label column, more than 100 classes, or a journal of something else.
    """
    if roles.label is None:
        raise ValueError("the data has no label column; give --label")
    labels = dataset[roles.label][:]
    known = [i for i, v in enumerate(labels) if v is not None]
    classes = sorted({labels[i] for i in known}, key=lambda v: (str(type(v)), v))
    if not 2 <= len(classes) <= 100:
        raise ValueError(
            f"{roles.label} has {len(classes)} classes; a person can choose among 2-100"
        )
    rows = [known[i] for i in draw_rows([labels[i] for i in known], count, repeats, seed)]
    chosen = dataset.select(rows)
    questions = [question_of(chosen[i], row, roles.inputs) for i, row in enumerate(rows)]
    header = {
        "kind": KIND,
        "version": 1,
        "annotator": annotator,
        "label": roles.label,
        "classes": classes,
        "rows": rows,
        "seed": seed,
    }
    return Interview(questions, class_names(dataset, roles.label, classes), Journal(path, header))


@dataclass(frozen=True)
class Answers:
    """One annotator's journal: class numbers by row, first and second time; None: skipped."""

    classes: tuple[Any, ...]
    first: dict[int, int]
    second: dict[int, int]
    seconds: tuple[float, ...]


def read_answers(path: str | os.PathLike[str]) -> Answers:
    """What stands in a journal after all undoing.

    Raises:
        ValueError: `path` is no journal of a human baseline.
    """
    header, lines = standing(path, KIND, "human baseline")
    rows = header["rows"]
    first: dict[int, int] = {}
    second: dict[int, int] = {}
    for item, line in sorted(lines.items()):
        if line["choice"] is not None:
            (second if rows[item] in rows[:item] else first)[line["row"]] = line["choice"]
    seconds = tuple(float(line["seconds"]) for line in lines.values())
    return Answers(tuple(header["classes"]), first, second, seconds)


# ---------------------------------------------------------------- figures


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson interval of a share; (0, 1) for nothing."""
    if total == 0:
        return 0.0, 1.0
    share, spread = right / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def cohen_kappa(one: Sequence[int], other: Sequence[int]) -> float:
    """Agreement beyond chance; NaN where both always give the same single answer, or for none."""
    a, b = np.asarray(one, dtype=int), np.asarray(other, dtype=int)
    if not len(a):
        return math.nan
    values = np.union1d(a, b)
    chance = float(sum((a == v).mean() * (b == v).mean() for v in values))
    return float((a == b).mean() - chance) / (1 - chance) if chance < 1 else math.nan


def bootstrap_kappa(one: Sequence[int], other: Sequence[int], seed: int = 0) -> tuple[float, float]:
    """95 % interval of `cohen_kappa` over resampled rows; NaN where it is undefined."""
    a, b = np.asarray(one, dtype=int), np.asarray(other, dtype=int)
    if not len(a):
        return math.nan, math.nan
    draw = np.random.default_rng(seed)
    picks = draw.integers(0, len(a), (DRAWS, len(a)))
    found = np.array([cohen_kappa(a[p], b[p]) for p in picks])
    if np.isnan(found).all():
        return math.nan, math.nan
    low, high = np.nanquantile(found, [0.025, 0.975])
    return float(low), float(high)


def krippendorff_alpha(answers: Sequence[Mapping[int, int]]) -> float:
    """Nominal alpha over annotators (row -> class each; rows may be missing); NaN if undefined."""
    rows: dict[int, list[int]] = {}
    for one in answers:
        for row, value in one.items():
            rows.setdefault(row, []).append(value)
    units = [values for values in rows.values() if len(values) > 1]
    names = sorted({v for values in units for v in values})
    if len(names) < 2:
        return math.nan
    together = np.zeros((len(names), len(names)))
    for values in units:
        counts = np.array([values.count(n) for n in names], dtype=float)
        together += (np.outer(counts, counts) - np.diag(counts)) / (len(values) - 1)
    totals = together.sum(0)
    whole = totals.sum()
    observed = whole - np.trace(together)
    expected = (whole**2 - (totals**2).sum()) / (whole - 1)
    return float(1 - observed / expected)


@dataclass(frozen=True)
class HumanBaseline(Measurement):
    """What people reached on the rows they were asked about.

    Attributes:
        annotators, rows: people, and different rows answered by any of them.
        right, answered: first answers that agree with the label, and all first answers.
        low, high: Wilson interval of right / answered.
        self_agreement, self_kappa: on repeated rows; NaN where there are none.
        kappa_low, kappa_high: bootstrap interval of `self_kappa`.
        alpha: Krippendorff's, over annotators; NaN for one.
        seconds: median per answer.
        disagreements: rows answered against their label.
        model_right, model_rows: the model on the same rows; rows 0: not asked.
        better, worse: rows that the model alone, or the people alone, got right.
    """

    annotators: int
    rows: int
    right: int
    answered: int
    low: float
    high: float
    self_agreement: float = math.nan
    self_kappa: float = math.nan
    kappa_low: float = math.nan
    kappa_high: float = math.nan
    alpha: float = math.nan
    seconds: float = math.nan
    disagreements: tuple[int, ...] = private(default=())
    model_right: int = 0
    model_rows: int = 0
    better: int = 0
    worse: int = 0


def human_baseline(
    answers: Sequence[Answers], labels: Mapping[int, Any], model: Mapping[int, Any] | None = None
) -> HumanBaseline:
    """The figures of one or several annotators.

    Args:
        labels: row -> the data set's label, as in the classes of `answers`.
        model: row -> the label the model predicts, for the comparison.

    Raises:
        ValueError: nobody answered anything.
    """
    first = [(row, a.classes[c]) for a in answers for row, c in a.first.items()]
    if not first:
        raise ValueError("no row has been answered yet")
    right = sum(labels[row] == given for row, given in first)
    twice = [(a.first[r], c) for a in answers for r, c in a.second.items() if r in a.first]
    one, other = [a for a, _ in twice], [b for _, b in twice]
    low, high = wilson(right, len(first))
    kappa_low, kappa_high = bootstrap_kappa(one, other)
    seconds = [s for a in answers for s in a.seconds]
    shared = [(row, given) for row, given in first if row in (model or {})]
    people = [labels[row] == given for row, given in shared]
    machine = [labels[row] == (model or {})[row] for row, _ in shared]
    return HumanBaseline(
        annotators=len(answers),
        rows=len({row for row, _ in first}),
        right=right,
        answered=len(first),
        low=low,
        high=high,
        self_agreement=float(np.mean([a == b for a, b in twice])) if twice else math.nan,
        self_kappa=cohen_kappa(one, other),
        kappa_low=kappa_low,
        kappa_high=kappa_high,
        alpha=krippendorff_alpha([a.first for a in answers]) if len(answers) > 1 else math.nan,
        seconds=float(np.median(seconds)) if seconds else math.nan,
        disagreements=tuple(dict.fromkeys(row for row, given in first if labels[row] != given)),
        model_right=sum(machine),
        model_rows=len(machine),
        better=sum(m and not p for m, p in zip(machine, people, strict=True)),
        worse=sum(p and not m for m, p in zip(machine, people, strict=True)),
    )


def human_gap(
    seen: HumanBaseline,
    *,
    level: Annotated[float, "of the exact sign test on rows that one side alone got right"] = 0.05,
) -> Iterator[Fault]:
    """A note with the model's accuracy beside the people's, on the same rows."""
    if not seen.model_rows:
        return
    people, machine = seen.right / seen.answered, seen.model_right / seen.model_rows
    low, high = wilson(seen.model_right, seen.model_rows)
    p = sign_test(seen.better, seen.worse)
    if p > level:
        verdict = f"no difference that {seen.model_rows} rows can show (p = {p:.2f})"
    else:
        verdict = f"the {'model' if seen.better > seen.worse else 'person'} is better (p = {p:.2g})"
    again = (
        f"; the same person agrees with themselves on {seen.self_agreement:.0%}"
        if seen.self_agreement == seen.self_agreement
        else ""
    )
    yield Fault(
        f"people reach {people:.1%} [{seen.low:.1%}, {seen.high:.1%}], the model {machine:.1%} "
        f"[{low:.1%}, {high:.1%}] on the same rows: {verdict}{again}",
        evidence={
            "seen": f"model {machine:.1%}",
            "expected": f"people {people:.1%}",
            "p": p,
            "kappa": seen.self_kappa,
            "alpha": seen.alpha,
        },
        examples=seen.disagreements[:50],
    )


def sign_test(better: int, worse: int) -> float:
    """Two-sided exact p of an even split."""
    from scipy.stats import binomtest

    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


HUMAN_GAP = Check(
    name="human-gap",
    stage="baselines",
    severity="note",
    moments=("end",),
    why="What a person reaches on the same inputs says how much is left to gain, or to doubt.",
    fix="hf-recipe human DATASET --label label  # then hf_recipe.compare_with_human(recipe, path)",
    source="Karpathy 2019; Krippendorff 2011; Wilson 1927",
    judges=(human_gap,),
    unsure="A person who is new to the task, or in a hurry, is a low bar; labels that people made "
    "are no proof against people who disagree with them.",
    call="hf_recipe.compare_with_human(recipe, journal)",
)
