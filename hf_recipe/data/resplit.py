"""Split anew so that no row's copy, near copy or relative stands on the other side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_recipe.core.check import Skip
from hf_recipe.data.hashing import table_hashes
from hf_recipe.data.near import Side, alike_pairs, components
from hf_recipe.data.source import LABELS, input_columns, read_source
from hf_recipe.instruments.batches import Rows

Integers = npt.NDArray[np.int64]
LARGEST_GROUP, LARGEST_SHARE = 32, 0.02  # near copies in larger groups share a template


def group_split(
    dataset: Any,
    sizes: Mapping[str, float] | None = None,
    *,
    columns: Sequence[str] | None = None,
    label: str | None = None,
    group: str | None = None,
    near: bool = True,
    seed: int = 0,
) -> Any:
    """Split so that rows that belong together stay together: a `DatasetDict`.

    Rows belong together if they are equal, near copies of each other, or share a value of
    `group` (a document, a patient). Every label keeps its share in every split as far as groups
    allow; the same rows and seed give the same splits.

    Args:
        dataset: a `datasets.Dataset`, or a dict of them, which are joined first.
        sizes: relative size of each split; default: the sizes of the given splits, or 0.8 to 0.2
            for "train" and "validation".
        columns: what is compared; default: all but labels and row numbers.
        label: the column whose values each split gets its share of; guessed where not given.
        group: a column whose equal values belong together.
        near: whether near copies are searched too.

    Raises:
        TypeError: not a `datasets.Dataset` or a dict of them.
        ValueError: an unknown column, or sizes that are not positive.
    """
    import datasets

    parts = dict(dataset) if isinstance(dataset, Mapping) else {"": dataset}
    if not parts or not all(isinstance(part, datasets.Dataset) for part in parts.values()):
        kinds = ", ".join(sorted({type(part).__name__ for part in parts.values()})) or "nothing"
        raise TypeError(f"group_split takes a datasets.Dataset or a dict of them; got {kinds}")
    joined = datasets.concatenate_datasets(list(parts.values()))
    if sizes is None:
        given = {name: float(len(part)) for name, part in parts.items()}
        sizes = given if len(parts) > 1 else {"train": 0.8, "validation": 0.2}
    if not sizes or min(sizes.values()) <= 0:
        raise ValueError(f"sizes must be positive numbers by split; got {dict(sizes)}")
    for name in (*(columns or ()), *filter(None, (label, group))):
        if name not in joined.column_names:
            raise ValueError(f"no column {name!r}; columns: {', '.join(joined.column_names)}")
    label = label or next((name for name in LABELS if name in joined.column_names), None)
    rest = [c for c in joined.column_names if c not in (label, group)]
    compared = tuple(columns) if columns else tuple(input_columns(rest))
    groups = _belonging(joined, compared, group, near)
    classes = _classes(joined, label)
    chosen = assign(groups, classes, list(sizes.values()), seed)
    return datasets.DatasetDict(
        {name: joined.select(np.flatnonzero(chosen == i)) for i, name in enumerate(sizes)}
    )


def _belonging(joined: Any, columns: tuple[str, ...], group: str | None, near: bool) -> Integers:
    """The number of the group, (rows,), that each row belongs to."""
    rows = Rows(joined, joined, lambda features: {}, "train")
    source = read_source(rows, limit=max(len(joined), 1))
    links = []
    wanted = [*columns, *([group] if group else [])]
    hashes = [[table_hashes(c, columns), table_hashes(c, [group]) if group else None]
              for c in source.chunks(wanted)]  # fmt: skip
    exact = np.concatenate([h for h, _ in hashes])
    links.append(_chained(exact))
    if group:
        links.append(_chained(np.concatenate([h for _, h in hashes if h is not None])))
    if near:
        try:
            side = Side.of(source, columns, None)
        except Skip:  # nothing that near copies could be told by
            pass
        else:
            first = np.zeros(len(exact), dtype=bool)
            first[np.unique(exact, return_index=True)[1]] = True
            pairs = alike_pairs(side, first & side.prints.enough)[2]
            together = components(pairs, len(joined))
            sizes = np.bincount(together)[together[pairs[:, 0]]]
            # A template that a large part of the rows share cannot stand on one side alone.
            links.append(pairs[sizes <= max(LARGEST_GROUP, LARGEST_SHARE * len(joined))])
    return components(np.concatenate(links), len(joined))


def _chained(hashes: npt.NDArray[np.uint64]) -> Integers:
    """Pairs, (pairs, 2), that link all rows of equal hash."""
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    return np.stack([order[same], order[same + 1]], axis=1)


def _classes(joined: Any, label: str | None) -> Integers:
    """Codes of the labels, (rows,); all 0 where they are no classes."""
    if label is None:
        return np.zeros(len(joined), dtype=np.int64)
    chunks = joined.select_columns([label]).with_format("arrow").iter(batch_size=65_536)
    hashes = np.concatenate([table_hashes(chunk, [label]) for chunk in chunks])
    distinct, codes = np.unique(hashes, return_inverse=True)
    few = len(distinct) <= max(len(joined) // 10, 2)
    return codes.astype(np.int64) if few else np.zeros(len(joined), dtype=np.int64)


def assign(groups: Integers, classes: Integers, sizes: Sequence[float], seed: int) -> Integers:
    """The split, (rows,), of each row: large groups first, each where most room is left.

    Args:
        groups: the group of each row; classes: its label's code.
        sizes: relative sizes of the splits.
    """
    share = np.asarray(sizes, dtype=np.float64) / sum(sizes)
    room = share[:, None] * np.bincount(classes)[None, :].astype(np.float64)
    chosen = np.zeros(len(groups), dtype=np.int64)
    draw = np.random.default_rng(seed)
    counts = np.bincount(groups)
    order = np.argsort(groups, kind="stable")
    bounds = np.concatenate([[0], np.cumsum(counts)])
    many = np.flatnonzero(counts > 1)
    many = many[np.lexsort((draw.random(len(many)), -counts[many]))]
    for group in many:
        rows = order[bounds[group] : bounds[group + 1]]
        wanted = np.bincount(classes[rows], minlength=room.shape[1])
        split = int(np.argmax((room * wanted).sum(axis=1) / share))
        chosen[rows] = split
        room[split] -= wanted
    single = np.flatnonzero(counts[groups] == 1)
    for code in range(room.shape[1]):
        rows = draw.permutation(single[classes[single] == code])
        left = np.clip(room[:, code], 0, None)
        edges = np.cumsum(left / max(left.sum(), 1e-9)) * len(rows)
        chosen[rows] = np.searchsorted(np.round(edges), np.arange(len(rows)), side="right").clip(
            max=len(share) - 1
        )
    return chosen
