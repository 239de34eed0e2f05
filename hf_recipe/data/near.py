"""Near copies: rows that are almost, not exactly, the same, inside a split and across splits.

A text with a word changed, an image saved again: a hash of the row does not see them, a model
does. They weigh double in training; and an evaluation row whose near twin was trained on measures
memory. Rows are compared by the overlap of their word pairs (`minhash`), or by how alike small
grey pictures of them are (`pictures`).

What counts as near is far beyond what random pairs of the same data show, so that rows of a small
world (few words, one template) are not taken for copies; and where rows hang together in large
groups, that is the data's nature and no leak. The search is costly: `inspect_dataset` and the
runner make it, and what they found is remembered; `attach` reports what is remembered.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hf_recipe.core.check import Check, Located, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.data.cache import dataset_fingerprint, recalled_measurement, remembered_measurement
from hf_recipe.data.hashing import Hashes, table_hashes
from hf_recipe.data.minhash import candidate_pairs
from hf_recipe.data.near_prints import Prints, comparable, prints_of
from hf_recipe.data.source import Source, roles_of, source_of, splits_of
from hf_recipe.instruments.subject import Subject

RANDOM_PAIRS = 2_000


@dataclass(frozen=True)
class NearCopies(Measurement):
    """Rows of a split that are near, not exact, copies of other rows.

    Attributes:
        columns: what was compared; how: by which likeness.
        rows, compared: rows read; of these, rows long enough to tell a copy from chance.
        threshold: likeness (0 to 1) from which two rows count as near copies.
        by_chance: likeness that one random pair in ten exceeds.
        copies: rows that are near an earlier row of the split; examples: some of them.
        groups: how many groups they form; mean_group: rows in the group of the average copy.
        in_train: rows near a training row, exact copies left out; None for the training set.
        relabelled: of these, rows whose twins all have another label; None without labels.
        leaked: some of them, the likest first.
        below: rows whose likest training row lies under the threshold: by no more than that lies
            under 1, and by up to three times as much; counted for pictures alone.
        note: how much was read, where not all was.
    """

    columns: tuple[str, ...]
    how: str
    rows: int
    compared: int
    threshold: float
    by_chance: float = 0.0
    copies: int = 0
    groups: int = 0
    mean_group: float = 0.0
    examples: tuple[int, ...] = ()
    in_train: int | None = None
    relabelled: int | None = None
    leaked: tuple[int, ...] = ()
    below: tuple[int, int] = (0, 0)
    note: str = ""


def take_near(subject: Subject) -> Iterator[Located]:
    """Search every split, or recall what an earlier search on the same data found."""
    searched: dict[str, Side] = {}
    reasons = []
    for split in splits_of(subject):
        try:
            yield Located(_found(subject, split, searched), split)
        except Skip as reason:
            reasons.append(str(reason))
    if len(reasons) == len(splits_of(subject)):
        raise Skip("; ".join(dict.fromkeys(reasons)) or "there is no data set")


def _found(subject: Subject, split: str, searched: dict[str, Side]) -> NearCopies:
    names = ["train", split] if split != "train" and subject.train is not None else [split]
    sources = [source_of(subject, name) for name in names]
    if any(source.varies for source in sources):
        raise Skip("a row comes out differently each time it is read, so copies cannot be seen")
    roles = roles_of(subject, sources[-1])
    columns = tuple(c for c in roles.inputs if all(c in s.columns for s in sources))
    fingerprint = dataset_fingerprint(
        *(subject.rows(name).dataset for name in names), about=["near", columns, roles.label]
    )

    def search() -> NearCopies:
        sides = []
        for name, source in zip(names, sources, strict=True):
            if name not in searched:
                searched[name] = Side.of(source, columns, roles.label)
            sides.append(searched[name])
        return near_copies(sides[-1], sides[0] if len(sides) > 1 else None)

    if subject.cache.get("raw"):
        return remembered_measurement(fingerprint, NearCopies, search)
    known = recalled_measurement(fingerprint, NearCopies)
    if known is None:
        raise Skip("near copies are searched by hf_recipe.inspect_dataset(...), which remembers")
    return known


@dataclass
class Side:
    """A split as the search sees it: a key per band, exact hashes and label hashes per row."""

    source: Source
    prints: Prints
    exact: Hashes
    labels: Hashes | None

    @classmethod
    def of(cls, source: Source, columns: tuple[str, ...], label: str | None) -> Side:
        compared = comparable(source, columns)
        prints = prints_of(source, compared)
        exact, labels = [], []
        known = label if label in source.columns else None
        for chunk in source.chunks([*compared, *([known] if known else [])]):
            exact.append(table_hashes(chunk, compared))
            if known is not None and not pa.types.is_nested(chunk.schema.field(known).type):
                labels.append(table_hashes(chunk, [known]))
        return cls(
            source, prints, np.concatenate(exact), np.concatenate(labels) if labels else None
        )


def near_copies(side: Side, train: Side | None = None) -> NearCopies:
    """Search `side` for near copies among its rows, and for near twins in `train`."""
    first = np.zeros(len(side.exact), dtype=bool)
    first[np.unique(side.exact, return_index=True)[1]] = True
    alive = first & side.prints.enough
    by_chance, threshold, pairs = alike_pairs(side, alive)
    groups, members = _groups(pairs, len(alive))
    later = np.unique(pairs.max(axis=1)) if len(pairs) else np.zeros(0, np.int64)
    return NearCopies(
        columns=side.prints.columns,
        how=side.prints.how,
        rows=len(alive),
        compared=int(side.prints.enough.sum()),
        threshold=float(threshold),
        by_chance=by_chance,
        copies=len(later),
        groups=groups,
        mean_group=members,
        examples=tuple(side.source.rows[later[:20]].tolist()),
        note="; ".join(
            f"{s.source.name}: {s.source.note}" for s in (train, side) if s and s.source.note
        ),
        **(_twins(side, train, alive, threshold) if train is not None else {}),
    )


def alike_pairs(
    side: Side, alive: npt.NDArray[np.bool_]
) -> tuple[float, float, npt.NDArray[np.int64]]:
    """Likeness by chance, the threshold that follows, and the pairs of rows that reach it."""
    prints = side.prints
    middle, by_chance = _by_chance(prints, alive)
    beyond = middle + prints.deviations * (by_chance - middle) / 1.2816  # the normal's 90 %
    threshold = max(prints.near, by_chance + prints.near * (1 - by_chance), beyond)
    pairs = candidate_pairs(prints.keys, alive)
    return by_chance, threshold, pairs[prints.likeness(pairs, prints) >= threshold]


def _by_chance(prints: Prints, alive: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """The median likeness of random pairs, and the one that a tenth of them exceeds."""
    rows = np.flatnonzero(alive)
    if len(rows) < 3:
        return 0.0, 0.0
    draw = np.random.default_rng(0)
    pairs = np.sort(draw.choice(rows, (RANDOM_PAIRS, 2)), axis=1)
    pairs = pairs[pairs[:, 0] < pairs[:, 1]]
    middle, high = np.quantile(prints.likeness(pairs, prints), (0.5, 0.9))
    return float(middle), float(high)


def components(pairs: npt.NDArray[np.int64], rows: int) -> npt.NDArray[np.int64]:
    """The number of the group, (rows,), that each row hangs together with by `pairs`."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    graph = coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(rows, rows))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)


def _groups(pairs: npt.NDArray[np.int64], rows: int) -> tuple[int, float]:
    """How many groups the pairs make, and the mean size of the group that a member stands in."""
    if not len(pairs):
        return 0, 0.0
    names = components(pairs, rows)
    sizes = np.bincount(names[np.unique(pairs)])
    sizes = sizes[sizes > 0].astype(np.float64)
    return len(sizes), float((sizes**2).sum() / sizes.sum())


def _twins(
    side: Side, train: Side, alive: npt.NDArray[np.bool_], threshold: float
) -> dict[str, Any]:
    """Rows of `side` with a near twin in `train` that are no exact copies of a training row."""
    fresh = side.prints.enough & ~np.isin(side.exact, train.exact)
    single = np.zeros(len(train.exact), dtype=bool)
    single[np.unique(train.exact, return_index=True)[1]] = True
    count = len(train.exact)
    keys = np.concatenate([train.prints.keys, side.prints.keys])
    pairs = candidate_pairs(keys, np.concatenate([single & train.prints.enough, fresh]))
    across = (pairs[:, 0] < count) & (pairs[:, 1] >= count)
    pairs = pairs[across] - np.array([0, count])
    alike = train.prints.likeness(pairs, side.prints)
    gap = 1 - threshold
    wider = [len(np.unique(pairs[alike >= 1 - width * gap, 1])) for width in (1, 2, 4)]
    pairs, alike = pairs[alike >= threshold], alike[alike >= threshold]
    rows = np.unique(pairs[:, 1])
    best = np.zeros(len(side.exact))
    np.maximum.at(best, pairs[:, 1], alike)
    order = rows[np.argsort(-best[rows], kind="stable")]
    relabelled = None
    if train.labels is not None and side.labels is not None:
        agree = train.labels[pairs[:, 0]] == side.labels[pairs[:, 1]]
        relabelled = len(rows) - len(np.unique(pairs[agree, 1]))
    return {
        "in_train": len(rows),
        "relabelled": relabelled,
        "leaked": tuple(side.source.rows[order[:20]].tolist()),
        "below": tuple(np.diff(wider).tolist()) if side.prints.bits.size else (0, 0),
    }


# ---------------------------------------------------------------- verdicts


def near_duplicate_example(
    seen: NearCopies,
    *,
    fraction: Annotated[float, "share of copies worth a note; web text has 1 to 10 %"] = 0.01,
) -> Iterator[Fault]:
    """A note on near copies inside a split."""
    share = seen.copies / max(seen.rows, 1)
    if not seen.copies or share < fraction:
        return
    yield Fault(
        message=f"{seen.copies:,} of {seen.rows:,} rows ({share:.1%}) are near copies of an "
        f"earlier one, in {seen.groups:,} groups ({seen.how} of {', '.join(seen.columns)}: "
        f"likeness {seen.threshold:.2f} or more; random pairs have {seen.by_chance:.2f})",
        evidence={
            "seen": f"{seen.copies:,} near copies",
            "expected": "few",
            "fraction": share,
            "mean_group": seen.mean_group,
        },
        examples=seen.examples,
    )


def near_leak(
    seen: NearCopies,
    *,
    near_fraction: Annotated[
        float, "share of evaluation rows, as for exact copies: beyond the metric's last digit"
    ] = 0.005,
    near_rows: Annotated[int, "rows under which two similar rows may be chance; judged"] = 3,
    largest_group: Annotated[
        float, "rows in a group of like rows from which they share a template; judged"
    ] = 32.0,
    excess: Annotated[float, "Poisson deviations beyond what likeness by nature gives"] = 3.0,
) -> Iterator[Fault]:
    """Evaluation rows with a near twin in the training set.

    Where rows are alike by nature (small drawings), their number falls off steadily towards 1: by
    the same factor with every halving of the distance, and by three at least. Copies stand out.
    """
    if not seen.in_train or seen.mean_group > largest_group:
        return
    share = seen.in_train / seen.rows
    near, far = seen.below
    by_nature = min(near / 3, near**2 / max(far, 1))
    stands_out = seen.in_train > by_nature + excess * by_nature**0.5
    parts = [
        f"{seen.in_train:,} of {seen.rows:,} rows ({share:.1%}) have a near copy in the training "
        "set"
    ]
    if seen.relabelled:
        parts.append(f"{seen.relabelled:,} of them under another label")
    if seen.note:
        parts.append(seen.note)
    yield Fault(
        message="; ".join(parts) + f" ({seen.how} of {', '.join(seen.columns)}: likeness "
        f"{seen.threshold:.2f} or more; random pairs have {seen.by_chance:.2f})",
        subject="near copies",
        severity="warning"
        if share >= near_fraction and seen.in_train >= near_rows and stands_out
        else "note",
        evidence={
            "seen": f"{seen.in_train:,} near copies",
            "expected": "none",
            "copies": seen.in_train,
            "fraction": share,
            "relabelled": seen.relabelled,
        },
        examples=seen.leaked,
        fix="splits = hf_recipe.group_split({'train': train, 'validation': validation})",
    )


NEAR = Probe("search near copies", "dataset", (NearCopies,), take_near)

NEAR_DUPLICATE = Check(
    name="near-duplicate-example",
    stage="data",
    severity="note",
    moments=("dataset",),
    why="Near copies weigh double, are memorised first, and leak when rows are split at random.",
    fix="splits = hf_recipe.group_split({'train': train, 'validation': validation})",
    source="Lee et al. 2022 (arXiv:2107.06499); Broder 1997",
    judges=(near_duplicate_example,),
    unsure="Templates and paraphrases are alike on purpose. Rows under eight word pairs are not "
    "compared.",
)
