"""Which columns go together, and how the label differs between groups of rows.

Biases and patterns show here before any model is there: two columns that say the same, a column
that goes with the label, a site or a sex whose rows are labelled otherwise. One number for each
pair of columns, 0 for none and 1 for all: Spearman's rank correlation (with its sign) of two
numbers, Cramer's V of two categories, the root of epsilon squared of a category and a number,
the last two corrected for what chance alone would give. Texts and lists count by their length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hf_recipe.core.exhibit import Cell, Exhibit, Matrix, Table
from hf_recipe.data.browse import content, facts
from hf_recipe.data.hashing import flat_array
from hf_recipe.data.sample import floats_of, gather
from hf_recipe.data.source import Roles, Source

ROWS = 10_000
MOST = 14  # columns side by side
MOST_GROUPS = 20  # different values of a category
FEWEST = 20  # rows of a group
LISTED = 40

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Laid:
    """A column to be compared: ranks (NaN where missing), or codes of groups (-1) with names."""

    values: Floats
    groups: tuple[str, ...] = ()

    @property
    def there(self) -> npt.NDArray[np.bool_]:
        return np.asarray(self.values >= 0) if self.groups else np.isfinite(self.values)


def association_exhibits(source: Source, roles: Roles) -> Iterator[Exhibit]:
    """The matrix of all pairs, and the label by group, of evenly spaced rows."""
    count = min(ROWS, len(source))
    places = np.linspace(0, len(source) - 1, count).astype(np.int64)
    order = [*([roles.label] if roles.label else []), *roles.inputs, *source.columns]
    names = [n for n in dict.fromkeys(order) if n in source.columns]
    table = gather(source, places, names)
    columns: dict[str, Laid] = {}
    for name in names:
        columns |= laid(name, flat_array(table.column(name)), source.features.get(name))
    label = columns.get(roles.label or "")
    if len(columns) < 2:
        return
    if len(columns) > MOST and label is not None:
        near = {n: abs(associated(label, c)) for n, c in columns.items()}
        kept = sorted(near, key=lambda n: -near[n])[:MOST]
        chosen = {n: c for n, c in columns.items() if n in kept}
    else:
        chosen = dict(list(columns.items())[:MOST])
    yield matrix(chosen, len(columns), count)
    if label is not None and roles.label is not None:
        others = {n: c for n, c in columns.items() if c.groups and n != roles.label}
        rows = by_group(roles.label, label, others)
        if rows:
            head = ("column", "value", "rows", "label", "here", "over all", "standard errors apart")
            caption = f"of {count:,} rows; the class whose share is the oddest, groups of {FEWEST}+"
            yield Table(
                f"{roles.label} by group", "data", head, rows, caption, private=True
            )  # fmt: skip


def laid(name: str, array: pa.Array, feature: object = None) -> dict[str, Laid]:
    """A column as ranks or groups; empty where it is neither, or never varies."""
    if not pa.types.is_nested(array.type) and len(array):
        encoded = array.dictionary_encode()
        different = len(encoded.dictionary)
        whole = not pa.types.is_floating(array.type)
        if 2 <= different <= MOST_GROUPS and whole and len(array) >= FEWEST * different:
            codes = np.asarray(encoded.indices.fill_null(-1), dtype=np.float64)
            return {name: Laid(codes, tuple(map(str, _names(name, encoded.dictionary, feature))))}
    found = {}
    for fact, values in facts(name, array).items():
        numbers = floats_of(values)
        known = numbers[np.isfinite(numbers)]
        if len(known) > 2 and known.min() < known.max():
            found[fact] = Laid(ranks(numbers))
    return found


def _names(name: str, values: pa.Array, feature: object) -> list[Cell]:
    return content(name, values, feature)[name]


def ranks(values: Floats) -> Floats:
    """Mean ranks, NaN where missing."""
    from scipy.stats import rankdata

    found = np.full(len(values), np.nan)
    known = np.isfinite(values)
    found[known] = rankdata(values[known])
    return found


def associated(one: Laid, two: Laid) -> float:
    """How far two columns go together; NaN where no row has both, or one never varies there."""
    both = one.there & two.there
    a, b = one.values[both], two.values[both]
    if len(a) < 3 or a.min() == a.max() or b.min() == b.max():
        return math.nan
    if one.groups and two.groups:
        return cramers_v(a.astype(np.int64), b.astype(np.int64))
    if one.groups or two.groups:
        groups, numbers = (a, b) if one.groups else (b, a)
        return epsilon(groups.astype(np.int64), numbers)
    return float(np.corrcoef(a, b)[0, 1])


def cramers_v(one: npt.NDArray[np.int64], two: npt.NDArray[np.int64]) -> float:
    """Cramer's V with the bias correction of Bergsma 2013."""
    _, one = np.unique(one, return_inverse=True)
    _, two = np.unique(two, return_inverse=True)
    rows, columns, n = int(one.max()) + 1, int(two.max()) + 1, len(one)
    seen = np.bincount(one * columns + two, minlength=rows * columns).reshape(rows, columns)
    expected = seen.sum(axis=1, keepdims=True) * seen.sum(axis=0, keepdims=True) / n
    phi = float(((seen - expected) ** 2 / expected).sum()) / n
    phi = max(0.0, phi - (rows - 1) * (columns - 1) / (n - 1))
    r, c = (k - (k - 1) ** 2 / (n - 1) for k in (rows, columns))
    return math.sqrt(min(1.0, phi / max(min(r, c) - 1, 1e-12)))


def epsilon(groups: npt.NDArray[np.int64], numbers: Floats) -> float:
    """The root of epsilon squared (Kelley 1935): variance between groups beyond chance."""
    _, groups = np.unique(groups, return_inverse=True)
    counts = np.bincount(groups)
    means = np.bincount(groups, weights=numbers) / counts
    within = float(((numbers - means[groups]) ** 2).sum())
    total = float(((numbers - numbers.mean()) ** 2).sum())
    free = len(numbers) - len(counts)
    if free <= 0:
        return math.nan
    return math.sqrt(max(0.0, 1 - within / free / (total / (len(numbers) - 1))))


def matrix(columns: Mapping[str, Laid], every: int, rows: int) -> Matrix:
    """All pairs of `columns`, of `every` that there are."""
    names = tuple(columns)
    values = tuple(
        tuple(1.0 if a == b else round(associated(columns[a], columns[b]), 3) for b in names)
        for a in names
    )
    caption = (
        f"{rows:,} rows; rank correlation of two numbers, else Cramer's V or the root of epsilon "
        f"squared; chance alone keeps two numbers within {1.96 / math.sqrt(rows):.3f} (95 %)"
    )
    if every > len(names):
        caption += f"; {len(names)} of {every} columns, those that go with the label most"
    return Matrix("Which columns go together", "data", names, names, values, caption)


def by_group(name: str, label: Laid, others: Mapping[str, Laid]) -> tuple[tuple[Cell, ...], ...]:
    """(column, value, rows, label, here, over all, standard errors), the oddest group first."""
    found: list[tuple[Cell, ...]] = []
    for column, groups in others.items():
        for code, value in enumerate(groups.groups):
            inside = (groups.values == code) & label.there
            if int(inside.sum()) >= FEWEST and not inside.all():
                found.append((column, value, int(inside.sum()), *_oddest(name, label, inside)))
    found.sort(key=lambda row: -abs(float(row[-1] or 0)))
    return tuple(found[:LISTED])


def _oddest(name: str, label: Laid, inside: npt.NDArray[np.bool_]) -> tuple[Cell, ...]:
    """What differs most between the rows inside and the others: (what, here, over all, z)."""
    known, rest = label.values[label.there], label.values[label.there & ~inside]
    own = label.values[inside]
    if not label.groups:
        spread = math.sqrt(own.var() / len(own) + rest.var() / max(len(rest), 1)) or 1.0
        high = [float((part > np.median(known)).mean()) for part in (own, known)]
        apart = float(own.mean() - rest.mean()) / spread
        return f"{name} over the median", round(high[0], 3), round(high[1], 3), round(apart, 1)
    size = len(label.groups)
    here, there, over = (
        np.bincount(part.astype(np.int64), minlength=size) / max(len(part), 1)
        for part in (own, rest, known)
    )
    error = np.sqrt(over * (1 - over) * (1 / len(own) + 1 / max(len(rest), 1)))
    z = (here - there) / np.maximum(error, 1e-12)
    k = int(np.argmax(np.abs(z)))
    return (
        label.groups[k],
        round(float(here[k]), 3),
        round(float(over[k]), 3),
        round(float(z[k]), 1),
    )
