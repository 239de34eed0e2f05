"""Preprocessors: steps for `dataset.map` and `dataset.filter`, and a pipeline of them.

Every step is a frozen dataclass: what it does is its name and its parameters, and so is its
fingerprint (a hash of the input's fingerprint, the step's name, its parameters as sorted JSON and
this package's version). It does not hang on hash seeds or on the code's byte form; editing one
parameter changes it, and the cache with it.

What is learnt from data (`Standardise`) is learnt by `fit` from the rows it is given, which is to
be the training set; `Pipeline.fit_transform` sees to that.

    pipeline = Pipeline((DropBlanks(("text",)), NormaliseText(("text",)), Deduplicate(("text",))))
    splits = pipeline.fit_transform(splits)          # learns from splits["train"] alone
    train = train.map(NormaliseText(("text",)))      # or one step by itself
"""

from __future__ import annotations

import dataclasses
import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import datasets
import numpy as np
import xxhash

import hf_recipe
from hf_recipe.data.hashing import table_hashes

Row = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One step; `__call__` is what `dataset.map` or `dataset.filter` gets."""

    keeps: ClassVar[bool] = False  # True: the call says whether a row stays

    def __call__(self, row: Row) -> Any:
        raise NotImplementedError

    def fit(self, train: datasets.Dataset) -> Step:
        """The step with what it learns from the training set; most learn nothing."""
        return self

    def parameters(self) -> dict[str, Any]:
        """What decides the result, as JSON."""
        return dataclasses.asdict(self)

    def fingerprint(self, before: str) -> str:
        """The fingerprint of what this step makes of data with the fingerprint `before`."""
        whole = [before, type(self).__name__, self.parameters(), hf_recipe.__version__]
        return xxhash.xxh3_64_hexdigest(json.dumps(whole, sort_keys=True, default=str).encode())

    def transform(self, data: datasets.Dataset) -> datasets.Dataset:
        """`data` after this step."""
        self._require(data)
        fingerprint = self.fingerprint(data._fingerprint)
        if self.keeps:
            return data.filter(self, new_fingerprint=fingerprint)
        return data.map(self, new_fingerprint=fingerprint)

    def _require(self, data: datasets.Dataset) -> None:
        for name in getattr(self, "columns", ()):
            if name not in data.column_names:
                raise ValueError(
                    f"{type(self).__name__}: no column {name!r}; there are "
                    f"{', '.join(data.column_names)}"
                )


@dataclass(frozen=True)
class DropBlanks(Step):
    """Drop rows in which any of `columns` is null, or empty but for white space."""

    columns: tuple[str, ...]
    keeps = True

    def __call__(self, row: Row) -> bool:
        return all(not _blank(row[name]) for name in self.columns)


def _blank(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, float):
        return value != value
    return value is None or (isinstance(value, (list, tuple)) and not value)


@dataclass(frozen=True)
class Deduplicate(Step):
    """Keep the first of the rows that are equal in `columns`."""

    columns: tuple[str, ...]

    def __call__(self, row: Row) -> Any:
        raise TypeError("one row cannot know of the others: use Deduplicate(...).transform(data)")

    def transform(self, data: datasets.Dataset) -> datasets.Dataset:
        self._require(data)
        first = np.unique(row_hashes(data, self.columns), return_index=True)[1]
        return data.select(np.sort(first), new_fingerprint=self.fingerprint(data._fingerprint))


def row_hashes(data: datasets.Dataset, columns: tuple[str, ...]) -> np.ndarray[Any, Any]:
    """(rows,) one 64-bit number per row over `columns`."""
    plain = data.select_columns(list(columns)).with_format("arrow")
    parts = [table_hashes(part, columns) for part in plain.iter(batch_size=4_096)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint64)


@dataclass(frozen=True)
class Standardise(Step):
    """Subtract the training mean of each of `columns` and divide by its standard deviation.

    `means` and `deviations` are what `fit` learnt; vectors are standardised place by place.
    """

    columns: tuple[str, ...]
    means: tuple[tuple[float, ...], ...] = ()
    deviations: tuple[tuple[float, ...], ...] = ()

    def fit(self, train: datasets.Dataset) -> Standardise:
        self._require(train)
        means, deviations = [], []
        for name in self.columns:
            values = np.asarray(train[name][:], dtype=np.float64).reshape(len(train), -1)
            if not len(values):
                raise ValueError("Standardise: the training set has no rows")
            spread = np.nanstd(values, axis=0)
            means.append(tuple(np.nanmean(values, axis=0).tolist()))
            deviations.append(tuple(np.where(spread > 0, spread, 1.0).tolist()))
        return dataclasses.replace(self, means=tuple(means), deviations=tuple(deviations))

    def __call__(self, row: Row) -> Row:
        if not self.means:
            raise ValueError("Standardise has learnt nothing yet: fit(train) first")
        changed = {}
        for name, mean, spread in zip(self.columns, self.means, self.deviations, strict=True):
            value = (np.asarray(row[name], dtype=np.float64).reshape(-1) - mean) / spread
            shape = np.shape(row[name])
            changed[name] = value.reshape(shape).tolist() if shape else float(value[0])
        return changed

    def transform(self, data: datasets.Dataset) -> datasets.Dataset:
        real = data.features.copy()
        for name in self.columns:
            if isinstance(real.get(name), datasets.Value):
                real[name] = datasets.Value("float64")
        return super().transform(data.cast(real) if real != data.features else data)


@dataclass(frozen=True)
class Downsample(Step):
    """Cut `columns` down: texts to words, sequences to places, pictures to a side.

    Args:
        length: most words of a text, or places of a sequence.
        side: longest side of a picture.
        keep: which part of a text or sequence stays.
    """

    columns: tuple[str, ...]
    length: int | None = None
    side: int | None = None
    keep: Literal["head", "tail", "middle"] = "head"

    def __post_init__(self) -> None:
        for name in ("length", "side"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Downsample: {name} must be 1 or more; got {value}")
        if self.length is None and self.side is None:
            raise ValueError("Downsample: give length= or side=")

    def __call__(self, row: Row) -> Row:
        return {name: self._cut(row[name]) for name in self.columns}

    def _cut(self, value: Any) -> Any:
        if hasattr(value, "getbands"):
            if self.side is None or max(value.size) <= self.side:
                return value
            scale = self.side / max(value.size)
            return value.resize([max(1, round(edge * scale)) for edge in value.size])
        if value is None or self.length is None:
            return value
        parts = value.split() if isinstance(value, str) else value
        if len(parts) <= self.length:
            return value
        spare = len(parts) - self.length
        start = {"head": 0, "tail": spare, "middle": spare // 2}[self.keep]
        kept = parts[start : start + self.length]
        return " ".join(kept) if isinstance(value, str) else kept


@dataclass(frozen=True)
class NormaliseText(Step):
    """Take variation out of texts that does not bear on the label.

    Args:
        case: to lower case; accents: off; spaces: runs of white space to one blank; digits: all
            to 0; and always Unicode's NFKC form.
    """

    columns: tuple[str, ...]
    case: bool = True
    accents: bool = False
    spaces: bool = True
    digits: bool = False

    def __call__(self, row: Row) -> Row:
        return {name: self._normal(row[name]) for name in self.columns}

    def _normal(self, text: str | None) -> str | None:
        if text is None:
            return None
        text = unicodedata.normalize("NFKC", text)
        if self.accents:
            apart = unicodedata.normalize("NFD", text)
            text = unicodedata.normalize("NFC", re.sub(r"[\u0300-\u036f]", "", apart))
        if self.case:
            text = text.lower()
        if self.digits:
            text = re.sub(r"\d", "0", text)
        return re.sub(r"\s+", " ", text).strip() if self.spaces else text


@dataclass(frozen=True)
class GroupSplit(Step):
    """Keep one part of a split that never parts a group: all rows of a group go the same way.

    Args:
        column: names the group (a patient, an author, a document).
        share: of the groups that go to validation.
        part: which part stays.
    """

    column: str
    share: float = 0.2
    seed: int = 0
    part: Literal["train", "validation"] = "train"
    keeps = True

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"GroupSplit: share must lie between 0 and 1; got {self.share}")

    def __call__(self, row: Row) -> bool:
        group = json.dumps([self.seed, row[self.column]], default=str).encode()
        digest = xxhash.xxh3_64_intdigest(group)
        return (digest / 2**64 < self.share) == (self.part == "validation")

    def split(self, data: datasets.Dataset) -> datasets.DatasetDict:
        """Both parts."""
        held = dataclasses.replace(self, part="validation")
        rest = dataclasses.replace(self, part="train")
        return datasets.DatasetDict(
            {"train": rest.transform(data), "validation": held.transform(data)}
        )


@dataclass(frozen=True)
class BlindInputs(Step):
    """Blank out `columns`: what a model still learns then, it learns from the labels alone."""

    columns: tuple[str, ...]

    def __call__(self, row: Row) -> Row:
        return {name: _blanked(row[name]) for name in self.columns}


def _blanked(value: Any) -> Any:
    if hasattr(value, "getbands"):
        return value.point(lambda _: 0)
    if isinstance(value, (list, tuple)):
        return [_blanked(item) for item in value]
    return "" if isinstance(value, str) else None if value is None else type(value)(0)


@dataclass(frozen=True)
class DropColumns(Step):
    """Leave `columns` out."""

    columns: tuple[str, ...]

    def __call__(self, row: Row) -> Row:
        return {name: value for name, value in row.items() if name not in self.columns}

    def transform(self, data: datasets.Dataset) -> datasets.Dataset:
        self._require(data)
        fingerprint = self.fingerprint(data._fingerprint)
        return data.remove_columns(list(self.columns), new_fingerprint=fingerprint)


@dataclass(frozen=True)
class Pipeline:
    """Steps in order."""

    steps: tuple[Step, ...]

    def fit(self, train: datasets.Dataset) -> Pipeline:
        """The pipeline with what its steps learn from the training set."""
        fitted = []
        for i, step in enumerate(self.steps):
            fitted.append(step.fit(train))
            if i + 1 < len(self.steps):
                train = fitted[-1].transform(train)
        return Pipeline(tuple(fitted))

    def transform(self, data: datasets.Dataset) -> datasets.Dataset:
        """`data` after all steps."""
        for step in self.steps:
            data = step.transform(data)
        return data

    def fit_transform(
        self, splits: Mapping[str, datasets.Dataset], *, train: str = "train"
    ) -> datasets.DatasetDict:
        """Learn from the training split alone, and transform all of them."""
        if train not in splits:
            raise ValueError(f"no split {train!r} to fit on; there are {', '.join(splits)}")
        fitted = self.fit(splits[train])
        return datasets.DatasetDict({n: fitted.transform(d) for n, d in splits.items()})
