"""Does one feature or token give the label away?

A column that is a copy of the label, a cell that is filled only after the outcome, a label token
at a fixed place of every text: the training loss falls to nothing, and so does the use of the
model. A feature is suspected when, by itself, it tells held-out labels nearly perfectly while all
the others together do not. It is a warning where it looks made from the label (a copy with gaps
between the classes, all classes but one a single value, tokens that are the classes' names or
numbers), else a note: a keyword or a threshold may lawfully be the task.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hf_recipe.core.check import Check, Located, Measurement, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.data.asked import CALL, asking
from hf_recipe.data.cheap import (
    ALPHA,
    Trial,
    average_ranks,
    binned,
    kernel,
    looked_up,
    paired,
    trees,
)
from hf_recipe.data.context import tokens_of, words_trial
from hf_recipe.data.giveaway_tokens import NEARLY, Giveaway, balanced, from_tokens
from hf_recipe.data.hashing import flat_array
from hf_recipe.data.labels import seen_counts
from hf_recipe.data.sample import Sample, floats_of, gather, sample_of
from hf_recipe.data.source import roles_of
from hf_recipe.data.words import TokenRows
from hf_recipe.instruments.subject import Subject

Floats = npt.NDArray[np.float64]

PIXELS = 1_024  # images with more are not looked at pixel by pixel
COPIED = 0.9999  # R squared of a quantity from which it is the label up to rounding; judged
COPY_GAP = 4.5  # deviations between neighbouring classes: a normal overlap under 2 %


@dataclass(frozen=True)
class Giveaways(Measurement):
    """Features that tell the label nearly by themselves.

    Attributes:
        label: the label's column.
        features: how many were looked at; words and places of text count as one.
        found: the best first, at most ten.
        rows: held-out rows.
        unread: columns of kinds that were not looked at.
        note: how the rows were drawn.
    """

    label: str
    features: int
    found: tuple[Giveaway, ...]
    rows: int
    unread: tuple[str, ...] = ()
    note: str = ""


def take_giveaways(subject: Subject) -> Iterator[Located]:
    """Look for giveaways in the training set's sample."""
    sample = sample_of(subject)
    label = str(roles_of(subject, sample.source).label)
    counts = seen_counts(subject, sample.source, roles_of(subject, sample.source))
    tokens, columns = tokens_of(subject, sample), dict(sample.inputs.columns)
    unread = list(sample.inputs.unread)
    pictures = sample.inputs.pictures
    if pictures is not None:
        height, width = pictures.pixels.shape[1:3]
        if height * width <= PIXELS and pictures.shape == (height, width):
            flat = pictures.gray.reshape(len(sample.labels), -1).astype(np.float64)
            columns |= {
                f"pixel ({i // width}, {i % width})": flat[:, i] for i in range(flat.shape[1])
            }
        else:
            unread.append(f"pixels ({height} x {width}: too many to be looked at one by one)")
    if counts.form == "number":
        found = lines(targets_of(sample, label), sample, columns)
    else:
        found = from_columns(subject, sample, columns, tokens)
    if tokens is not None and counts.form != "number":
        found += from_tokens(sample, tokens)
    if not columns and tokens is None:
        raise Skip("no input column could be read: " + ", ".join(unread))
    measured = Giveaways(
        label=label,
        features=len(columns) + (tokens is not None),
        found=tuple(sorted(found, key=lambda g: -g.accuracy)[:10]),
        rows=int(sample.held.sum()),
        unread=tuple(unread),
        note=sample.note,
    )
    yield Located(measured, "train")


# ---------------------------------------------------------------- columns


def from_columns(
    subject: Subject, sample: Sample, columns: dict[str, Floats], tokens: TokenRows | None
) -> list[Giveaway]:
    """Columns, elements and pixels that tell the class."""
    labels, held = sample.labels, sample.held
    trials = {
        name: looked_up(name, binned(values, held, bins=64), labels, held)
        for name, values in columns.items()
    }
    near = {name: trial for name, trial in trials.items() if balanced(trial) >= NEARLY}
    rest = {name: values for name, values in columns.items() if name not in near}
    if not near or not (rest or tokens is not None):
        return []
    others = _rest(subject, sample, rest, tokens)
    found = []
    for name, trial in near.items():
        pair = paired(trial, others)
        category = name in sample.inputs.categories
        form = form_of(columns[name], labels, sample.classes, category=category)
        found.append(Giveaway(name, form, balanced(trial), balanced(others), pair.p_loss))
    return found


def _rest(
    subject: Subject, sample: Sample, rest: dict[str, Floats], tokens: TokenRows | None
) -> Trial:
    """The best probe of everything else, as it is judged by accuracy."""
    trials = []
    if rest:
        table = np.stack(list(rest.values()), axis=1)
        if sample.inputs.pictures is not None:
            trials.append(kernel("the rest", table, sample.labels, sample.held))
        else:
            trials.append(trees("the rest", table, sample.labels, sample.held))
    if tokens is not None:
        trials.append(words_trial(subject, sample, tokens))
    return max(trials, key=lambda trial: trial.accuracy)


def form_of(values: Floats, labels: npt.NDArray[Any], classes: int, *, category: bool) -> str:
    """What a telling column looks like: "copy", "single value" or "threshold"."""
    filled = np.where(np.isfinite(values), values, np.nan)
    if category or np.isnan(filled).any():
        codes = np.unique(np.nan_to_num(filled, nan=-1.0))
        if len(codes) <= 2 * classes:
            return "copy"
    parts = [filled[labels == k] for k in range(classes)]
    single = [part for part in parts if one_value(part)]
    if len(single) == classes:
        return "copy"
    if category:
        return "threshold"
    known = [part[np.isfinite(part)] for part in parts]
    if len(single) == classes - 1 and single:
        return "single value"
    if min(len(part) for part in known) < 2:
        return "threshold"
    order = sorted(known, key=lambda part: float(np.mean(part)))
    gaps = [
        (b.mean() - a.mean()) / max(np.sqrt((a.var() + b.var()) / 2), 1e-12)
        for a, b in itertools.pairwise(order)
    ]
    return "copy" if min(gaps) >= COPY_GAP else "threshold"


def one_value(part: Floats) -> bool:
    """Whether 99 % of the values are one and the same, or missing."""
    _, counts = np.unique(part, return_counts=True)
    return len(part) > 1 and counts.max() >= NEARLY * len(part)


def targets_of(sample: Sample, label: str) -> Floats:
    """The quantities behind the sample's classes."""
    table: pa.Table = gather(sample.source, sample.places, [label])
    return floats_of(flat_array(table.column(label)))


def lines(targets: Floats, sample: Sample, columns: dict[str, Floats]) -> list[Giveaway]:
    """Columns that a quantity is a straight line, or a rising or falling function, of."""
    if len(columns) < 2:
        return []
    held = sample.held
    fits = {name: fit(values, targets, held) for name, values in columns.items()}
    near = [name for name, r2 in fits.items() if r2 >= NEARLY]
    rest = max([r2 for name, r2 in fits.items() if name not in near], default=1.0)
    return [Giveaway(name, "line", fits[name], rest, 0.0) for name in near]


def fit(values: Floats, targets: Floats, held: npt.NDArray[np.bool_]) -> float:
    """R squared on held-out rows of a line, or of the ranks where that is more."""
    good = np.isfinite(values) & np.isfinite(targets)
    taught, judged = good & ~held, good & held
    if min(taught.sum(), judged.sum()) < 20 or np.ptp(values[taught]) == 0:
        return 0.0
    slope, start = np.polyfit(values[taught], targets[taught], 1)
    error = targets[judged] - slope * values[judged] - start
    straight = 1 - float((error**2).mean()) / max(float(targets[judged].var()), 1e-300)
    ranks = np.corrcoef(average_ranks(values[judged]), average_ranks(targets[judged]))[0, 1]
    return max(straight, float(ranks**2) if np.isfinite(ranks) else 0.0)


# ---------------------------------------------------------------- verdicts

ELEMENT = re.compile(r"(\w+)\[(\d+)\]$")


def _without(name: str) -> str | None:
    """The line that takes an element or a column out; None: words are to be stripped."""
    if element := ELEMENT.match(name):
        column, place = element.groups()
        return f"{column} = np.delete({column}, {place}, axis=-1)  # in every row, and train again"
    if name.isidentifier():
        return f"dataset = dataset.remove_columns({name!r})  # then train again"
    return None


SAID = {
    "exact": "it has one value in each class: the label itself, in other numbers",
    "copy": "looks like a copy of the label: gaps lie between the classes",
    "single value": "is one single value in every class but one",
    "threshold": "is cut by the label at a threshold, as a lawful feature may be",
    "place": "it holds one of a few tokens that go with the label, as a keyword may",
    "name": "the words are the classes' names, or one pattern with a number",
    "added": "the words are the classes' names, or one pattern with a number, at this place alone",
    "word": "a keyword may lawfully be the task",
    "line": "the label is a function of it",
}


def target_in_input(
    seen: Giveaways,
    *,
    nearly: Annotated[
        float, "balanced accuracy, or R squared, of one feature; natural ones stay below; judged"
    ] = NEARLY,
    copied: Annotated[
        float, "R squared of a quantity from which it is the label up to rounding; judged"
    ] = COPIED,
    alpha: Annotated[float, "chance that the others' shortfall is an accident"] = ALPHA,
) -> Iterator[Fault]:
    """A warning for what looks made from the label, a note for what merely tells it all."""
    for giveaway in seen.found:
        lead = giveaway.p < alpha and giveaway.rest < nearly
        if giveaway.accuracy < nearly or not (lead or giveaway.form == "added"):
            continue
        made = giveaway.form in ("exact", "copy", "single value", "name", "added") or (
            giveaway.form == "line" and giveaway.accuracy >= copied
        )
        measure = "R squared" if giveaway.form == "line" else "balanced accuracy"
        digits = 5 if giveaway.form == "line" else 3
        others = "" if giveaway.form == "exact" else f", everything else {giveaway.rest:.3f}"
        yield Fault(
            message=f"{giveaway.name} alone tells {seen.label}: {measure} "
            f"{giveaway.accuracy:.{digits}f} on {seen.rows:,} held-out rows{others}; "
            f"{SAID[giveaway.form]}",
            subject=giveaway.name,
            severity="warning" if made else "note",
            fix=_without(giveaway.name),
            evidence={
                "seen": f"{giveaway.accuracy:.{digits}f} by it alone",
                "expected": "no element that is the label"
                if giveaway.form == "exact"
                else f"{giveaway.rest:.3f} by everything else",
                "form": giveaway.form,
                "p": giveaway.p,
            },
            quotes=giveaway.words,
        )


GIVEAWAYS = asking("look for the label in the input", Giveaways, take_giveaways)

TARGET_IN_INPUT = Check(
    name="target-in-input",
    stage="data",
    severity="warning",
    moments=("dataset",),
    why="A feature made from the label is not there when the model is used; every metric until "
    "then is a promise it cannot keep.",
    fix="dataset = dataset.remove_columns(column)  # or strip the token; then train again",
    source="Kaufman et al. 2012, Leakage in Data Mining; Humbatova et al. 2020",
    judges=(target_in_input,),
    unsure="Tasks that one feature lawfully decides (is it a question: the last mark). Several "
    "features that give the label away only together are not seen.",
    explains=("label-shortcut",),
    call=CALL,
)
