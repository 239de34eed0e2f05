"""Labels that the data, or the run's own margins, contradict.

The recipe asks how noisy the labels are. Two witnesses answer: a cheap probe, cross-validated, so
that no row speaks for its own label; and the training run itself, whose margins are
taken in its first half, or first epochs, before wrong labels are learnt by heart.

Every data set has rows that are hard, and hard rows are contradicted too, but with little
confidence. Wrong labels are contradicted as confidently as right ones are confirmed. So the
verdict looks at the fifth of the rows where the witness is surest, whichever way, and compares
the contradictions there with what two overlapping bells with the same share of mistakes overall
would give: clean, and as hard as this data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from hf_recipe.core.check import Check, Measurement, private
from hf_recipe.core.finding import Fault
from hf_recipe.data.source import LABELS
from hf_recipe.data.suspects import by_confusion, margin_scores

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

SURE = 0.2  # share of the rows, those with the largest margins either way
LISTED = 4_096  # suspects kept in a report
PAIRS = 64  # of confused classes whose counts are kept
RARER = 3.0  # a class so much commoner than the label's contradicts it by its prior alone


@dataclass(frozen=True)
class LabelSuspects(Measurement):
    """What one witness says of the labels of one split.

    Attributes:
        column: where the labels stand.
        witness: "cross-validated probe" or "training run".
        rows: rows with a margin; classes: different labels among them.
        unlearnt: classes most of whose rows are contradicted; left out of the sure part.
        contradicted: share of all rows whose label the witness does not choose.
        sure: rows in the sure part; sure_contradicted: of these, how many are contradicted (by a
            class that is not much commoner than their own).
        sure_pairs: of those, how many fall on each pair of label and chosen class, most first:
            what a witness gets wrong as a whole falls on few pairs, wrong labels on many.
        sure_expected: as many as clean data, as hard as this, would have there.
        rate: estimated share of wrong labels.
        suspects: contradicted rows in all.
        worst: their row numbers, worst first, at most 4,096.
        note: how much was read, where not all was.
    """

    column: str
    witness: str
    rows: int
    classes: int
    unlearnt: int
    contradicted: float
    sure: int
    sure_contradicted: int
    sure_expected: float
    rate: float
    suspects: int
    sure_pairs: tuple[int, ...] = ()
    worst: tuple[int, ...] = private(default=())
    note: str = ""


def weigh(
    margins: Floats,
    labels: Integers,
    others: Integers,
    rows: Integers,
    *,
    column: str,
    witness: str,
    ranked: Integers | None = None,
    note: str = "",
) -> LabelSuspects:
    """What a witness's margins say of the labels.

    Args:
        margins: (rows,) for the label minus the best other class; NaN: not seen.
        labels, others: (rows,) class numbers: the row's own, and the best other one.
        rows: (rows,) data set row numbers.
        ranked: positions of the suspects, worst first; default: by `rank`.
    """
    seen = np.isfinite(margins)
    values, given, rivals = margins[seen], labels[seen], others[seen]
    wrong = values < 0
    if ranked is None:
        ranked = np.flatnonzero(seen)[rank(values, given, rivals)[: int(wrong.sum())]]
    classes, places, counts = np.unique(given, return_inverse=True, return_counts=True)
    failed = np.bincount(places, weights=wrong) > 0.5 * counts
    frequency = dict(zip(classes.tolist(), counts.tolist(), strict=True))
    by_prior = np.array([frequency.get(int(r), 0) for r in rivals]) > RARER * counts[places]
    # Of all rows: a witness that has not learnt a whole class yet is no better than that elsewhere.
    share = float(wrong.mean()) if len(wrong) else 0.0
    kept = ~failed[places] if len(values) else np.zeros(0, dtype=bool)
    pairs = given * (int(rivals.max(initial=0)) + 1) + rivals
    values, wrong, by_prior, pairs = values[kept], wrong[kept], by_prior[kept], pairs[kept]
    sure = np.argsort(-np.abs(values), kind="stable")[: int(SURE * len(values))]
    against = pairs[sure][(wrong & ~by_prior)[sure]]
    return LabelSuspects(
        column=column,
        witness=witness,
        rows=int(seen.sum()),
        classes=len(classes),
        unlearnt=int(failed.sum()),
        contradicted=share,
        sure=len(sure),
        sure_contradicted=len(against),
        sure_pairs=tuple(sorted(np.unique(against, return_counts=True)[1].tolist())[::-1][:PAIRS]),
        sure_expected=len(sure) * overlap_mistakes(share),
        rate=estimated_rate(values),
        suspects=len(ranked),
        worst=tuple(int(rows[i]) for i in ranked[:LISTED]),
        note=note,
    )


def rank(margins: Floats, labels: Integers, others: Integers) -> Integers:
    """Positions of rows, the most suspect first.

    Margins are compared within a class where classes are uneven, since a rare class is hard as a
    whole; classes that are alike are compared as they are.
    """
    counts = np.unique(labels, return_counts=True)[1]
    uneven = len(counts) > 0 and counts.max() > RARER * counts.min()
    scores = margin_scores(margins[None], labels if uneven else None)
    return np.argsort(-by_confusion(scores, labels, others, margins < 0), kind="stable")


def estimated_rate(margins: Floats) -> float:
    """The share of wrong labels: clearly contradicted rows among the clearly decided ones.

    Clearly: by half the median margin of the rows whose label is confirmed.
    """
    if not (margins > 0).any():
        return 0.0
    clear = 0.5 * float(np.median(margins[margins > 0]))
    against, for_it = int((margins < -clear).sum()), int((margins > clear).sum())
    return against / max(against + for_it, 1)


def overlap_mistakes(share: float) -> float:
    """Mistakes in the surest fifth of two overlapping bells with `share` of mistakes overall."""
    distance = -2 * ndtri(min(max(share, 1e-4), 0.499))
    x = np.linspace(0, 12, 6001)
    mistakes = np.exp(-((x + distance / 2) ** 2) / 2)
    density = mistakes + np.exp(-((x - distance / 2) ** 2) / 2)
    beyond = np.cumsum(density[::-1])[::-1]
    sure = beyond <= SURE * beyond[0]
    return float(mistakes[sure].sum() / density[sure].sum())


def margins_of(probabilities: Any, labels: Integers) -> tuple[Floats, Integers]:
    """Log odds of the label against the best other class, and that class.

    Args:
        probabilities: (rows, classes), out of sample.
        labels: (rows,) column numbers of `probabilities`.
    """
    logs = np.log(np.asarray(probabilities, dtype=np.float64) + 1e-3)
    places = np.arange(len(logs))
    own = logs[places, labels]
    logs[places, labels] = -np.inf
    others = logs.argmax(axis=1)
    return own - logs[places, others], others.astype(np.int64)


def suspect_label(
    seen: LabelSuspects,
    *,
    fewest: Annotated[int, "rows under which the sure part is too small to judge"] = 150,
    hardest: Annotated[
        float, "share contradicted beyond which the witness knows too little; judged"
    ] = 0.4,
    excess: Annotated[
        float, "times the clean expectation; clean digits, tables, text measured up to 1.7"
    ] = 1.5,
    deviations: Annotated[float, "Poisson deviations beyond it; 4 is 3 in 100,000"] = 4.0,
    floor: Annotated[
        float, "of the sure rows; clean imbalanced tables measured up to 1.3 %"
    ] = 0.02,
    fewest_wrong: Annotated[
        float, "rows; of 215 sure ones of clean digits up to 7, of 3 % wrong ones 8 to 24"
    ] = 10.0,
    several: Annotated[
        int, "classes from which pairs of them tell mistakes from wrong labels, and such pairs"
    ] = 4,
    narrow: Annotated[
        float, "times the bound where few pairs hold them all; clean digits measured up to 1.1"
    ] = 3.0,
    nature: Annotated[
        float, "estimated rate beyond which noise is the labels' nature, not single mistakes"
    ] = 0.35,
) -> Iterator[Fault]:
    """More sure contradictions than clean data as hard as this would give."""
    if seen.rows < fewest or not seen.contradicted <= hardest:
        return
    expected = seen.sure_expected
    bound = excess * expected + deviations * expected**0.5 + max(5.0, floor * seen.sure)
    bound = max(fewest_wrong, bound)
    spread = seen.sure_contradicted
    if seen.classes >= several and seen.sure_pairs:
        spread = sum(min(count, max(2.0, bound / several)) for count in seen.sure_pairs)
    if not spread > bound and not seen.sure_contradicted > narrow * bound:
        return
    where = "out of sample" if seen.witness != "training run" else "before rows are learnt by heart"
    parts = [
        f"about {seen.rate:.0%} of the labels in {seen.column} look wrong: the {seen.witness} "
        f"({where}) contradicts {seen.sure_contradicted:,} of the {seen.sure:,} rows it is surest "
        f"of, clean data as hard as this would have {expected:.0f}",
        f"{seen.suspects:,} suspects of {seen.rows:,} rows, worst first",
    ]
    if seen.note:
        parts.append(seen.note)
    yield Fault(
        "; ".join(parts),
        subject="labels" if seen.column in LABELS else seen.column,  # of a file, or of the Trainer
        fix='dataset.to_parquet("rows.parquet")  # then: hf-recipe review rows.parquet '
        f"--label {seen.column}",
        severity="note" if seen.rate > nature else None,
        evidence={
            "seen": f"{seen.sure_contradicted:,} of {seen.sure:,} sure rows contradicted",
            "expected": f"{expected:.0f}",
            "bound": bound,
            "rate": seen.rate,
            "suspects": seen.suspects,
            "contradicted": seen.contradicted,
        },
        examples=seen.worst[:50],
    )


SUSPECT_LABEL = Check(
    name="suspect-label",
    stage="data",
    severity="warning",
    moments=("dataset", "run"),
    why="Wrong labels bound what can be measured and are learnt by heart late in training.",
    fix='dataset.to_parquet("rows.parquet")  # then: hf-recipe review rows.parquet --label label',
    source="Northcutt et al. 2021 (arXiv:1911.00068); Pleiss et al. 2020 (arXiv:2001.10528)",
    judges=(suspect_label,),
    unsure="A group of rows that the witness gets wrong as a whole, and surely, looks like wrong "
    "labels; single rows on the list may be right. Look before changing any. A class most of "
    "whose rows are contradicted is left out, so heavy noise in a rare class is not seen.",
)

__all__ = ["SUSPECT_LABEL", "LabelSuspects", "margins_of", "suspect_label", "weigh"]
