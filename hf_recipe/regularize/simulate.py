"""Simulated data: "if half-fake data doesn't do it, fake data may also do something".

Generated rows are mixed into the training set with a column that says which they are, so that they
never pass for real ones: the comparison that decides whether they stay is made on real evaluation
rows alone.

    data = Simulated(render, share=0.3).mix(data)           # render(count, numpy Generator) -> rows
    real = data.filter(lambda row: row["provenance"] == "real")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from hf_recipe.core.exhibit import Ladder
from hf_recipe.instruments.compare import Outcome, Variant, compare

PROVENANCE = "provenance"
REAL, SIMULATED = "real", "simulated"

Columns = Mapping[str, Sequence[Any]]
Generator = Callable[[int, np.random.Generator], Any]


@dataclass(frozen=True)
class Simulated:
    """Rows out of a generator, as a share of the mixed set.

    Args:
        generator: (count, numpy Generator) -> `count` rows, as a list of dicts, a dict of columns
            or a `datasets.Dataset`, with the real rows' columns.
        share: of simulated rows in the mixed set, in [0, 1).
        seed: of the generator and of the order.

    Raises:
        ValueError: a share outside [0, 1).
    """

    generator: Generator
    share: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"share of simulated rows must be in [0, 1); got {self.share}")

    def mix(self, data: datasets.Dataset) -> datasets.Dataset:
        """All rows of `data` and simulated ones, shuffled, with the column ``provenance``.

        The Trainer removes that column by itself (``remove_unused_columns``).

        Raises:
            TypeError: `data` is no `datasets.Dataset`.
            ValueError: the generator gave too few rows, other columns, or values of another type.
        """
        if not isinstance(data, datasets.Dataset):
            raise TypeError(f"Simulated mixes a datasets.Dataset; got {type(data).__name__}")
        if PROVENANCE in data.column_names:
            raise ValueError(f"the data set already has a column {PROVENANCE!r}")
        count = round(len(data) * self.share / (1 - self.share))
        real = data.add_column(PROVENANCE, [REAL] * len(data))
        if not count:
            return real
        made = self.rows(count, data)
        made = made.add_column(PROVENANCE, [SIMULATED] * count)
        return datasets.concatenate_datasets([real, made]).shuffle(seed=self.seed)

    def rows(self, count: int, like: datasets.Dataset) -> datasets.Dataset:
        """`count` simulated rows with the columns and types of `like`."""
        rows = self.generator(count, np.random.default_rng(self.seed))
        if isinstance(rows, Mapping):
            made = datasets.Dataset.from_dict({k: _listed(v) for k, v in rows.items()})
        elif isinstance(rows, datasets.Dataset):
            made = rows
        else:
            made = datasets.Dataset.from_list([dict(row) for row in rows])
        if len(made) != count:
            raise ValueError(f"the generator gave {len(made)} rows where {count} were asked for")
        absent = sorted(set(like.column_names) - set(made.column_names))
        unknown = sorted(set(made.column_names) - set(like.column_names))
        if absent or unknown:
            raise ValueError(
                "simulated rows need the real rows' columns; "
                f"absent: {', '.join(absent) or 'none'}, unknown: {', '.join(unknown) or 'none'}"
            )
        try:
            return made.select_columns(like.column_names).cast(like.features)
        except (TypeError, ValueError) as error:
            line = str(error).splitlines()[0]
            raise ValueError(f"simulated rows are of another type: {line}") from None

    def sized(self, share: float) -> Simulated:
        """The same with another share."""
        return Simulated(self.generator, share, self.seed)


def compare_simulated(
    train: Callable[[datasets.Dataset, int], Sequence[float]],
    data: datasets.Dataset,
    simulated: Simulated,
    *,
    shares: Sequence[float] = (),
    seeds: Sequence[int] = (0, 1, 2),
) -> Ladder:
    """Are they worth it? Real rows alone against mixtures, paired on real evaluation rows.

    Args:
        train: (training set, seed) -> losses of real evaluation rows, in a fixed order.
        data: the real training rows.
        shares: of simulated rows; default: that of `simulated`.

    Returns:
        One rung per share; ``kept`` True where the paired interval says that they help.
    """

    def run(variant: Variant) -> Outcome:
        share = float(variant.settings["share"])
        mixed = simulated.sized(share).mix(data) if share else data
        losses = tuple(float(loss) for loss in train(mixed, variant.seed))
        if not losses:
            raise ValueError("train returned no losses of evaluation rows")
        finite = all(math.isfinite(loss) for loss in losses)
        return Outcome(losses, facts={"rows": len(mixed), "finite": finite})

    variants = [
        Variant(f"{share:.0%} simulated", {"share": share})
        for share in (shares or (simulated.share,))
    ]
    return compare(run, Variant("real rows alone", {"share": 0.0}), variants, seeds)


def _listed(values: Any) -> list[Any]:
    return values.tolist() if hasattr(values, "tolist") else list(values)
