"""A cheap witness for the labels: cross-validated, so that no row speaks for its own label.

Words are hashed into a logistic regression; numbers and pixels go to extremely randomised trees,
which need no scaling and see clusters and interactions that no line could.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_recipe.core.check import Located, Probe, Skip
from hf_recipe.data.labels import count_labels
from hf_recipe.data.source import Source, roles_of, source_of
from hf_recipe.data.suspect_label import LabelSuspects, margins_of, weigh
from hf_recipe.data.suspects import confident_learning
from hf_recipe.instruments.batches import Rows
from hf_recipe.instruments.subject import Subject

Matrix = npt.NDArray[Any]

MOST = 8_000  # rows the probe is trained on
FEWEST_OF_A_CLASS = 10  # two for each fold
MOST_CLASSES = 200
FOLDS = 5
SIDE = 16  # pictures are looked at as 16 x 16 grey values and 8 x 8 colours
WORDS = 2**15  # the regression holds one weight of each for every class


@dataclass(frozen=True)
class Witnessed:
    """Out-of-sample probabilities of the rows that could be judged.

    Attributes:
        rows: (rows,) data set row numbers.
        labels: (rows,) column numbers of `probabilities`.
        classes: the label that each column stands for.
        probabilities: (rows, classes).
    """

    rows: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    classes: tuple[Any, ...]
    probabilities: npt.NDArray[np.float64]


def cross_validate(
    rows: Rows, source: Source, inputs: tuple[str, ...], label: str, *, most: int = MOST
) -> Witnessed:
    """Out-of-sample probabilities for at most `most` evenly spaced rows.

    Raises:
        Skip: too few rows or classes, or inputs of no known kind.
    """
    chosen = source.rows[np.linspace(0, len(source) - 1, min(most, len(source))).astype(np.int64)]
    columns = read_columns(rows.dataset, chosen, (*inputs, label))
    known = np.array([v is not None and v == v and v != -100 for v in columns[label]])
    given = np.array([str(v) for v in columns[label]])
    names, places, counts = np.unique(given, return_inverse=True, return_counts=True)
    usable = known & (counts >= FEWEST_OF_A_CLASS)[places]
    kept = np.flatnonzero(usable)
    classes, labels = np.unique(places[kept], return_inverse=True)
    if len(classes) < 2 or len(kept) < 10 * FOLDS:
        raise Skip(f"fewer than 2 classes have {FEWEST_OF_A_CLASS} labelled rows")
    if len(classes) > MOST_CLASSES:
        raise Skip(f"{len(classes):,} classes are too many for a cheap probe")
    values = {str(g): v for g, v in zip(given, columns[label], strict=True)}
    matrix, model = features_and_model({c: columns[c] for c in inputs}, kept)
    return Witnessed(
        rows=chosen[kept],
        labels=labels.astype(np.int64),
        classes=tuple(values[str(names[c])] for c in classes),
        probabilities=_out_of_sample(model, matrix, labels),
    )


def _out_of_sample(model: Any, matrix: Any, labels: Any) -> npt.NDArray[np.float64]:
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a probe that has not converged is good enough
        found = cross_val_predict(model, matrix, labels, cv=folds, method="predict_proba")
    return np.asarray(found, dtype=np.float64)


def read_columns(
    dataset: Any, chosen: npt.NDArray[np.int64], names: tuple[str, ...]
) -> Mapping[str, list[Any]]:
    """The cells of some rows by column, images decoded."""
    import datasets

    if isinstance(dataset, datasets.Dataset):
        some = dataset.select_columns(list(names)).select(chosen)
        files = [n for n in names
                 if isinstance(dataset.features[n], (datasets.Audio, datasets.Image))]  # fmt: skip
        for name in files:
            some = some.cast_column(name, type(dataset.features[name])(decode=False))
        found: dict[str, list[Any]] = some[:]
        for name in files:  # nothing here hears a recording
            if isinstance(dataset.features[name], datasets.Image):
                found[name] = [opened(cell) for cell in found[name]]
        return found
    rows = [dataset[int(i)] for i in chosen]
    if isinstance(rows[0], Mapping):
        return {name: [row.get(name) for row in rows] for name in names}
    return {name: [row[int(name)] for row in rows] for name in names}


def opened(cell: Mapping[str, Any] | None) -> Any:
    """An image file as a PIL picture; None where it cannot be read."""
    from PIL import Image, UnidentifiedImageError

    if not cell or not (cell["bytes"] or cell["path"]):
        return None
    try:
        picture = Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] else cell["path"])
        picture.load()
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError):
        return None
    return picture


def features_and_model(columns: Mapping[str, list[Any]], kept: Any) -> tuple[Any, Any]:
    """A matrix (rows, features) of the columns' cells, and the classifier that suits it.

    Raises:
        Skip: no column holds text, numbers or pictures.
    """
    from scipy import sparse
    from sklearn.ensemble import ExtraTreesClassifier
    from sklearn.linear_model import LogisticRegression

    words: list[Any] = []
    numbers: list[Any] = []
    for name, cells in columns.items():
        own = [cells[i] for i in kept]
        sample = next((v for v in own if v is not None), None)
        if isinstance(sample, str) or (name == "input_ids" and sample is not None):
            words.append(_hashed(own))
        elif (dense := _dense(own, sample)) is not None:
            numbers.append(dense)
    if words:
        scaled = [sparse.csr_matrix(_scaled(part)) for part in numbers]
        return sparse.hstack([*words, *scaled]).tocsr(), LogisticRegression(max_iter=100)
    if numbers:
        trees = ExtraTreesClassifier(100, min_samples_leaf=3, random_state=0)
        return np.nan_to_num(np.concatenate(numbers, axis=1), nan=-1e6), trees
    raise Skip("no input column holds text, numbers of one length, or pictures")


def _hashed(cells: list[Any]) -> Any:
    """Words, or token ids, and pairs of them: (rows, 2**15), as TF-IDF."""
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

    texts = [
        cell if isinstance(cell, str) else " ".join(f"t{int(i)}" for i in (_flat(cell) or ()))
        for cell in cells
    ]
    counts = HashingVectorizer(
        n_features=WORDS, ngram_range=(1, 2), alternate_sign=False, norm=None
    ).transform(texts)
    return TfidfTransformer(sublinear_tf=True).fit_transform(counts)


def _flat(cell: Any) -> list[Any]:
    """A cell's numbers in a row; lists within lists may be of any length, as answers are."""
    if cell is None:
        return []
    if isinstance(cell, list) and any(isinstance(part, list) for part in cell):
        return [number for part in cell for number in _flat(part)]
    found: list[Any] = np.asarray(cell).reshape(-1).tolist()
    return found


def _dense(cells: list[Any], sample: Any) -> Matrix | None:
    """Numbers or pixels as (rows, features), NaN where missing; None for cells of another kind."""
    if hasattr(sample, "getbands"):
        return np.stack([picture_values(cell) for cell in cells])
    try:
        width = np.asarray(sample, dtype=np.float64).size
        whole = [np.full(width, np.nan) if v is None else np.asarray(v, float) for v in cells]
        found = np.stack([values.reshape(-1) for values in whole])
    except (ValueError, TypeError):  # ragged, or no numbers
        return None
    near: Matrix = np.clip(found, -1e6, 1e6).astype(np.float32)
    return near


def picture_values(picture: Any) -> Matrix:
    """A PIL picture as 16 x 16 grey values, and 8 x 8 colours where it has any."""
    if picture is None:
        return np.zeros(SIDE * SIDE + 3 * (SIDE // 2) ** 2, dtype=np.float32)
    grey = np.asarray(picture.convert("L").resize((SIDE, SIDE)), dtype=np.float32)
    small = picture.convert("RGB").resize((SIDE // 2, SIDE // 2))
    colours = np.asarray(small, dtype=np.float32)
    return np.concatenate([grey.reshape(-1), colours.reshape(-1)]) / np.float32(255)


def _scaled(values: Matrix) -> Matrix:
    """Columns about 0 with a spread of 1, missing cells at 0, far ones pulled in to +- 3.

    One cell far out would else set the scale of its column, and the regression would crawl.
    """
    known = np.isfinite(values)
    counts = np.maximum(known.sum(axis=0), 1)
    low, middle, high = np.quantile(
        np.where(known, values, np.where(known, values, 0).sum(axis=0) / counts),
        (0.159, 0.5, 0.841), axis=0,
    )  # fmt: skip
    spread = (high - low) / 2
    plain = np.where(known, values, middle).std(axis=0)
    spread = np.where(spread > 0, spread, np.where(plain > 0, plain, 1))
    scaled: Matrix = np.where(known, np.clip((values - middle) / spread, -3, 3), 0.0)
    return scaled


def take_suspects(subject: Subject) -> Iterator[Located]:
    """Cross-validate the training labels of a data set that is looked at by itself."""
    if not subject.cache.get("raw"):
        raise Skip("the run's own margins judge the labels at its end; before it: inspect_dataset")
    rows, source = subject.rows("train"), source_of(subject, "train")
    roles = roles_of(subject, source)
    if roles.label is None:
        raise Skip("the train data has no label column")
    form = count_labels(source, roles).form
    if form != "class":
        raise Skip(f"labels of the form {form!r} have no margin between classes")
    if rows.is_stream:
        raise Skip("rows of a stream cannot be read again")
    inputs = tuple(c for c in roles.inputs if c != roles.label)
    seen = cross_validate(rows, source, inputs, roles.label)
    margins, others = margins_of(seen.probabilities, seen.labels)
    total = source.total or len(source)
    note = f"{len(seen.rows):,} of {total:,} rows, evenly spaced" if len(source) > MOST else ""
    yield Located(
        weigh(
            margins,
            seen.labels,
            others,
            seen.rows,
            column=roles.label,
            witness="cross-validated probe",
            ranked=confident_learning(seen.probabilities, seen.labels),
            note=note,
        ),
        "train",
    )


SUSPECTS = Probe("cross-validate labels", "dataset", (LabelSuspects,), take_suspects)
