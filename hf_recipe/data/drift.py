"""Are the splits drawn alike?

A classifier that can tell evaluation rows from training rows has found a difference between the
two: another source, other preprocessing, a class that is missing. It learns on one half of the
rows and is judged on the other, since an AUC pooled over folds alarms twice as often as it says.
Three looks are taken (the best single feature, all features, all words), and their p-values
corrected for that; the smallest effect that the sample could have shown stands beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import pyarrow as pa

from hf_recipe.core.check import Check, Located, Measurement, Skip, private
from hf_recipe.core.exhibit import Answer, Table
from hf_recipe.core.finding import Fault
from hf_recipe.data.asked import CALL, asking, chance_cell, chance_text
from hf_recipe.data.cheap import auc, auc_error, binned, linear, looked_up, trees
from hf_recipe.data.hashing import flat_array, row_bits, table_hashes
from hf_recipe.data.metadata import metadata
from hf_recipe.data.pictures import FEATURES, area, read_pictures
from hf_recipe.data.sample import (
    IMAGES,
    Flags,
    Floats,
    Integers,
    contents_of,
    gather,
    halves,
)
from hf_recipe.data.shortcuts import CHANCE, smallest_visible
from hf_recipe.data.source import Source, roles_of, source_of
from hf_recipe.data.words import TokenRows, bag, tokenise
from hf_recipe.instruments.subject import Subject

ROWS, GLANCE = 3_000, 400  # of each split
LENGTHS = ("tokens", "words", "characters")  # of a row: whole texts beside parts of them are meant
FEWEST = 100  # rows of a split, half of which judge
MOST_COLUMNS = 256  # of a vector, evenly spaced


@dataclass(frozen=True)
class Gives:
    """A feature that tells the splits apart: its AUC on the held-out half, and its chance."""

    name: str
    auc: float
    p: float


@dataclass(frozen=True)
class SplitDrift(Measurement):
    """How well an evaluation set is told from the training set.

    Attributes:
        auc, p: of the look that tells most; p corrected for three looks.
        look: "one feature", "all features" or "words".
        features: single features, most telling first, at most ten.
        rows, train_rows: held-out rows of the evaluation and of the training set.
        visible: the smallest AUC that would have been seen four times in five.
        unread: columns of kinds that were not looked at.
        words: those that weigh most, where words tell the splits apart.
        note: how much was read.
        glance: whether few rows were read, and their lengths left out (`data/drift_glance.py`).
    """

    auc: float
    p: float
    look: str
    features: tuple[Gives, ...]
    rows: int
    train_rows: int
    visible: float
    unread: tuple[str, ...] = ()
    words: tuple[str, ...] = private(default=())
    note: str = ""
    glance: bool = False


def take_drift(subject: Subject) -> Iterator[Located | Answer | Table]:
    """Compare every evaluation set with the training set."""
    seen, reasons = every_drift(subject)
    for split, measured in seen.items():
        yield Located(measured, split)
        yield drift_table(measured, split)
    said = [f"{split}: {sentence(measured)}" for split, measured in seen.items()]
    yield Answer("Are the splits drawn alike?", "data", "; ".join(said + reasons))


def every_drift(
    subject: Subject, *, glance: bool = False
) -> tuple[dict[str, SplitDrift], list[str]]:
    """`drift` by evaluation set, and why others could not be compared; Skip where none could."""
    if not subject.evaluation:
        raise Skip("there is no evaluation set to compare with the training set")
    train = source_of(subject, "train")
    seen, reasons = {}, []
    for split in subject.evaluation:
        try:
            seen[split] = drift(subject, train, source_of(subject, split), glance=glance)
        except Skip as reason:
            reasons.append(f"{split}: {reason}")
    if not seen:
        raise Skip("; ".join(reasons))
    return seen, reasons


def drift(
    subject: Subject, train: Source, evaluation: Source, *, glance: bool = False
) -> SplitDrift:
    """Tell rows of `evaluation` from rows of `train`; raises Skip where they cannot be compared."""
    rows = both(subject, train, evaluation, GLANCE if glance else ROWS)
    if glance:
        rows = replace(rows, columns={n: v for n, v in rows.columns.items() if n not in LENGTHS})
    labels = rows.foreign.astype(np.int64)
    judged = rows.foreign[rows.held]
    here, there = int(judged.sum()), int((~judged).sum())
    if min(here, there) < FEWEST // 4:
        raise Skip("too few different rows to tell the splits apart")
    singles = [
        _single(name, values, labels, rows.held, category=name in rows.categories)
        for name, values in rows.columns.items()
    ]
    best = max(singles, key=lambda one: one[0], default=None)
    looks = {} if best is None else {"one feature": best[1].auc}
    if len(rows.columns) > 1:
        table = np.stack(list(rows.columns.values()), axis=1)
        looks["all features"] = auc(trees("", table, labels, rows.held).scores[:, 1], judged)
    words: tuple[str, ...] = ()
    if rows.tokens is not None:
        trial = linear("", bag(rows.tokens), labels, rows.held)
        looks["words"] = auc(trial.scores[:, 1], judged)
        words = telling_words(rows.tokens, rows.foreign)
    if not looks:
        raise Skip("no input column could be read: " + ", ".join(rows.unread))
    look = max(looks, key=lambda name: looks[name])
    return SplitDrift(
        auc=looks[look],
        p=min(1.0, len(looks) * p_of(looks[look], here, there)),
        look=look,
        features=tuple(sorted((one for _, one in singles), key=lambda g: -g.auc)[:10]),
        rows=here,
        train_rows=there,
        visible=smallest_visible(here, there, CHANCE / len(looks)),
        unread=rows.unread,
        words=words if look == "words" else (),
        note="; ".join(f"{s.name}: {s.note}" for s in (train, evaluation) if s.note),
        glance=glance,
    )


def p_of(area_under: float, rows: int, rest: int) -> float:
    """Chance of such an AUC where nothing can be told (Mann and Whitney 1947)."""
    from scipy.special import ndtr

    return float(ndtr((0.5 - area_under) / auc_error(rows, rest)))


def _single(
    name: str, values: Floats, labels: Integers, held: Flags, *, category: bool
) -> tuple[float, Gives]:
    """One feature: how far it leads on the teaching half, and what it gives on the other."""
    codes = binned(values, held, bins=64 if category else 16)
    foreign = labels == 1
    # the judging half must not choose: learn on every second teaching row, look at the others
    taught = np.flatnonzero(~held)
    second = np.arange(len(taught)) % 2 == 1
    tried = looked_up("", codes[taught], labels[taught], second)
    lead = auc(tried.scores[:, 1], tried.truth == 1)
    area_under = auc(looked_up("", codes, labels, held).scores[:, 1], foreign[held])
    rows = int(foreign[held].sum())
    return lead, Gives(name, area_under, p_of(area_under, rows, int(held.sum()) - rows))


def telling_words(tokens: TokenRows, foreign: Flags, most: int = 10) -> tuple[str, ...]:
    """The words whose share of rows differs most between the splits, in standard errors."""
    if not tokens.vocabulary:
        return ()
    size = len(tokens.vocabulary)
    cells = np.unique(tokens.owner * size + tokens.ids)
    rows, words = cells // size, cells % size
    counts = [np.bincount(words[foreign[rows] == side], minlength=size) for side in (False, True)]
    totals = [int((~foreign).sum()), int(foreign.sum())]
    share = (counts[0] + counts[1] + 1) / (sum(totals) + 2)
    error = np.sqrt(share * (1 - share) * sum(1 / total for total in totals))
    apart = np.abs(counts[1] / totals[1] - counts[0] / totals[0]) / np.maximum(error, 1e-9)
    return tuple(tokens.vocabulary[i] for i in np.argsort(-apart)[:most])


# ---------------------------------------------------------------- rows of both splits


@dataclass(frozen=True)
class BothSplits:
    """Rows of two splits, read alike: numbers by column, tokens, which rows judge."""

    columns: dict[str, Floats]
    categories: frozenset[str]
    tokens: TokenRows | None
    held: Flags
    foreign: Flags
    unread: tuple[str, ...]


def both(subject: Subject, train: Source, evaluation: Source, most: int = ROWS) -> BothSplits:
    """At most so many rows of each split; raises Skip where they cannot be compared."""
    roles = roles_of(subject, train)
    names = [n for n in roles.inputs if n in train.columns and n in evaluation.columns]
    if not names:
        raise Skip("it shares no input column with the training set")
    if train.varies or evaluation.varies:
        raise Skip("a row comes out differently each time it is read")
    if subject.rows("train").dataset is subject.rows(evaluation.name).dataset:
        raise Skip("it is the training set itself")
    if min(len(train), len(evaluation)) < FEWEST:
        raise Skip(f"{min(len(train), len(evaluation))} rows; {FEWEST} of each are the least")
    if roles.label and roles.label in train.columns and roles.label in evaluation.columns:
        names.append(roles.label)
    parts = [_rows(source, names, roles.label, most) for source in (train, evaluation)]
    pictured = [images(subject, source, *part) for source, part in
                zip((train, evaluation), parts, strict=True)]  # fmt: skip
    shown = {name for name, _, _ in pictured if name}
    tables = [
        part.filter(pa.array(good)).select([n for n in names if n not in shown])
        for (part, _), (_, _, good) in zip(parts, pictured, strict=True)
    ]
    foreign = np.repeat([False, True], [int(good.sum()) for _, _, good in pictured])
    hashes = np.concatenate([
        table_hashes(part, [n for n in names if n != roles.label])[good]
        for (part, _), (_, _, good) in zip(parts, pictured, strict=True)
    ])  # fmt: skip
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise Skip(f"the columns differ in type: {str(error).splitlines()[0]}") from None
    contents, _ = contents_of(subject, train, table, None)
    columns = dict(contents.columns)
    tokens = contents.tokens
    if tokens is None and contents.texts is not None:
        tokens = tokenise(contents.texts)
    columns |= metadata(contents, tokens)
    for key in pictured[0][1].keys() & pictured[1][1].keys():
        columns[key] = np.concatenate([pictured[0][1][key], pictured[1][1][key]])
    varied = {n: v for n, v in columns.items() if np.isfinite(v).any() and not _constant(v)}
    return BothSplits(
        {n: varied[n] for n in _some(list(varied))}, contents.categories, tokens,
        halves(hashes), foreign, contents.unread,
    )  # fmt: skip


def _constant(values: Floats) -> bool:
    return len(np.unique(values)) < 2


def _some(names: list[str]) -> list[str]:
    """At most `MOST_COLUMNS` of the names, evenly spaced."""
    if len(names) <= MOST_COLUMNS:
        return names
    return [names[i * len(names) // MOST_COLUMNS] for i in range(MOST_COLUMNS)]


def _rows(
    source: Source, names: list[str], label: str | None, most: int
) -> tuple[pa.Table, Integers]:
    """A seeded sample of a split; rich rows once, since copies of them are no evidence."""
    first: pa.Table = next(source.chunks(names))
    pictured = any(pa.types.is_struct(column.type) for column in first.schema)
    limit = min(IMAGES // 2, most) if pictured else most
    places = np.sort(np.random.default_rng(0).permutation(len(source))[:limit])
    table = gather(source, places, names)
    inputs = [n for n in names if n != label]
    rich = row_bits(table, inputs) > 2 * np.log2(max(len(places), 2)) + 10
    firsts = np.zeros(len(places), dtype=bool)
    firsts[np.unique(table_hashes(table, inputs), return_index=True)[1]] = True
    kept = np.flatnonzero(firsts | ~rich)
    return table.take(pa.array(kept)), places[kept]


def images(
    subject: Subject, source: Source, table: pa.Table, places: Integers
) -> tuple[str, dict[str, Floats], Flags]:
    """The column that holds images, its rows as facts and 8 x 8 thumbnails, and which are good."""
    for name in table.column_names:
        pictures, good = read_pictures(
            subject, source, name, flat_array(table.column(name)), places
        )
        if pictures is None:
            continue
        small = area(pictures.pixels, 8, 8).mean(axis=3).reshape(len(pictures.pixels), 64)
        columns = dict(zip(FEATURES, pictures.facts.T, strict=True))
        columns |= {
            f"brightness at ({i // 8}, {i % 8}) of 8 x 8": small[:, i].astype(np.float64)
            for i in range(64)
        }
        return name, columns, good
    return "", {}, np.ones(table.num_rows, dtype=bool)


# ---------------------------------------------------------------- verdicts


def sentence(seen: SplitDrift) -> str:
    """The comparison in one sentence."""
    rows = f"{seen.rows:,} and {seen.train_rows:,} held-out rows"
    how = f"AUC {seen.auc:.3f}, {chance_text(seen.p)}, {rows}"
    if seen.p < CHANCE:
        return f"can be told from train by {seen.look} ({how})"
    return f"no difference seen ({how}; an AUC of {seen.visible:.2f} would have been)"


def drift_table(seen: SplitDrift, split: str) -> Table:
    """The features that tell most as a table."""
    rows = [(seen.look + " (the best look)", round(seen.auc, 4), chance_cell(seen.p))]
    rows += [(g.name, round(g.auc, 4), chance_cell(g.p)) for g in seen.features]
    caption = f"AUC on held-out rows; {seen.visible:.2f} would have been seen. {seen.note}"
    if seen.unread:
        caption += f"; not read: {', '.join(seen.unread)}"
    return Table(
        f"Can {split} be told from train?", "data", ("by", "AUC", "p"), tuple(rows), caption
    )


def split_drift(
    seen: SplitDrift,
    *,
    chance: Annotated[
        float, "of an alarm under the null, all looks together; a run has few evaluation sets"
    ] = CHANCE,
    least: Annotated[
        float, "AUC: a shift by 0.36 deviations of one feature; under it a note; judged"
    ] = 0.6,
    plain: Annotated[
        float, "AUC at a glance: other preprocessing, not another month; judged"
    ] = 0.9,
) -> Iterator[Fault]:
    """Splits that a held-out classifier tells apart."""
    if not seen.p < chance or (seen.glance and seen.auc < plain):
        return
    telling = [g for g in seen.features if g.p * max(len(seen.features), 1) < chance][:3]
    by = ", ".join(f"{g.name} (AUC {g.auc:.2f})" for g in telling) or seen.look
    yield Fault(
        message=f"a classifier tells these rows from training rows: AUC {seen.auc:.2f}, "
        f"{chance_text(seen.p)}, on {seen.rows:,} and {seen.train_rows:,} held-out rows; by {by}; "
        f"an AUC of {seen.visible:.2f} could have been seen",
        subject=telling[0].name if telling else seen.look,
        severity="warning" if seen.auc >= least else "note",
        evidence={
            "seen": f"AUC {seen.auc:.3f}",
            "expected": f"0.5; {seen.visible:.2f} would have been seen",
            "p": seen.p,
            "features": {g.name: round(g.auc, 4) for g in seen.features},
        },
        quotes=seen.words,
    )


DRIFT = asking("tell the splits apart", SplitDrift, take_drift)

SPLIT_DRIFT = Check(
    name="split-drift",
    stage="data",
    severity="warning",
    moments=("dataset",),
    why="An evaluation set that is drawn otherwise measures the difference along with the model.",
    fix="parts = dataset.shuffle(seed=42).train_test_split(0.2)  # the same steps for both",
    source="Lopez-Paz and Oquab 2017 (arXiv:1610.06545); Mann and Whitney 1947",
    judges=(split_drift,),
    unsure="Splits that differ on purpose (later dates, new speakers, another domain).",
    explains=("input-ignored",),
    call=CALL,
)
