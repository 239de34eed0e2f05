"""The task's data: bundled digits, local files, a folder of images or the hub, in three parts.

Tuning, stopping and choosing see validation only; test is kept apart until the end. Where a part
is missing it is cut from the training rows: by a hash of each row's input and the seed, class by
class, so that equal inputs never fall on both sides and the cut is the same on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from hf_recipe.runner.cutting import cut, row_bytes
from hf_recipe.runner.options import TASKS, Options, UsageError

LABELS = ("label", "labels", "target", "class", "y", "score", "category")
SUFFIXES = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
VALIDATION_SHARE, TEST_SHARE = 0.2, 0.2


@dataclass
class Data:
    """What is to be learned.

    Attributes:
        name: of the data set.
        task: one of `TASKS`.
        kind: what goes in: "image", "text" or "numbers".
        splits: "train", "validation" and "test", with the columns `inputs` and "label".
        inputs: the input columns ("image"; a text column; numeric columns).
        classes: class names; empty for a regression.
        center, scale: mean and standard deviation of a regression's training targets.
    """

    name: str
    task: str
    kind: str
    splits: Mapping[str, datasets.Dataset]
    inputs: tuple[str, ...]
    classes: tuple[str, ...] = ()
    center: float = 0.0
    scale: float = 1.0

    @property
    def outputs(self) -> int:
        """Width of the head."""
        return len(self.classes) or 1

    def labels(self, split: str) -> np.ndarray[Any, Any]:
        """Targets as the network gets them: class numbers, or standardised numbers."""
        values = np.asarray(self.splits[split]["label"])
        if self.classes:
            return values.astype(np.int64)
        return ((values.astype(np.float64) - self.center) / self.scale).astype(np.float32)

    @property
    def fingerprint(self) -> str:
        """Changes when any row of any part does."""
        digest = hashlib.sha256(self.task.encode())
        for name in sorted(self.splits):
            split = self.splits[name]
            digest.update(f"{name}{len(split)}".encode())
            for row in row_bytes(split, [*self.inputs, "label"]):
                digest.update(row)
        return digest.hexdigest()[:16]


def load(options: Options) -> Data:
    """The data that `options` name.

    Raises:
        UsageError: one line that names the file, column or value that cannot work.
    """
    chosen = options.data
    if chosen.dataset_name:
        parts, name = _from_hub(options), chosen.dataset_name
    elif chosen.train_file:
        parts, name = _from_files(options), Path(chosen.train_file).stem
    else:
        parts, name = {"train": digits()}, "digits (bundled with scikit-learn)"
    first = parts["train"]
    label = _label_column(first, chosen.label_column)
    kind, inputs = _inputs(first, label, options)
    task = _task(first, label, kind, chosen.task)
    parts = {k: _selected(part, inputs, label, f"{name}, {k}") for k, part in parts.items()}
    classes: tuple[str, ...] = ()
    if task != "regression":
        parts, classes = _numbered(parts)
    seed = int(options.training.seed)
    if "test" not in parts:
        parts["train"], parts["test"] = cut(parts["train"], inputs, TEST_SHARE, seed, classes)
    if "validation" not in parts:
        share = VALIDATION_SHARE / (1 - TEST_SHARE)
        parts["train"], parts["validation"] = cut(parts["train"], inputs, share, seed, classes)
    for part in ("train", "validation", "test"):
        if len(parts[part]) < 8:
            raise UsageError(f"{name}: only {len(parts[part])} rows in {part}; 8 are the least")
    data = Data(name, task, kind, parts, inputs, classes)
    if not classes:
        targets = np.asarray(parts["train"]["label"], dtype=float)
        data.center, data.scale = float(targets.mean()), float(targets.std()) or 1.0
    return data


def digits() -> datasets.Dataset:
    """1,797 handwritten digits, 8 x 8 pixels (Alpaydin and Kaynak 1998)."""
    from PIL import Image
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = (pixels.reshape(-1, 8, 8) / 16 * 255).round().astype(np.uint8)
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=[str(k) for k in range(10)]),
        }
    )
    columns = {"image": [Image.fromarray(i) for i in images], "label": labels.tolist()}
    return datasets.Dataset.from_dict(columns, features=features)


# ------------------------------------------------------------------ reading


def _from_hub(options: Options) -> dict[str, datasets.Dataset]:
    name = options.data.dataset_name
    try:
        found = datasets.load_dataset(name, options.data.dataset_config_name)
    except Exception as error:  # whatever the hub, the network or the loader says
        raise UsageError(f"--dataset_name {name}: {_first_line(error)}") from None
    return _named_parts(dict(found), f"--dataset_name {name}")


def _named_parts(found: Mapping[str, datasets.Dataset], what: str) -> dict[str, datasets.Dataset]:
    parts = {k: v for k, v in found.items() if k in ("train", "validation", "test")}
    for other in ("valid", "val", "dev"):
        if other in found:
            parts.setdefault("validation", found[other])
    if "train" not in parts:
        raise UsageError(f"{what}: no train part; it has {', '.join(found)}")
    # hub test sets without labels (-1 everywhere) cannot be read at the end
    return parts


def _from_files(options: Options) -> dict[str, datasets.Dataset]:
    given = {
        "train": options.data.train_file,
        "validation": options.data.validation_file,
        "test": options.data.test_file,
    }
    parts: dict[str, datasets.Dataset] = {}
    for part, path in given.items():
        if path is None:
            continue
        if Path(path).is_dir():
            found = _images(path, f"--{part}_file")
            parts |= _named_parts(found, path) if part == "train" else {part: found["train"]}
        else:
            parts[part] = _read(path, f"--{part}_file")
    return parts


def _images(path: str, flag: str) -> dict[str, datasets.Dataset]:
    try:
        return dict(datasets.load_dataset("imagefolder", data_dir=path))
    except Exception as error:  # whatever the loader says
        raise UsageError(
            f"{flag}: {path} is not a folder of images: {_first_line(error)}"
        ) from None


def _read(path: str, flag: str) -> datasets.Dataset:
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"{flag}: no such file: {path}")
    form = SUFFIXES.get(file.suffix.lower())
    if form is None:
        raise UsageError(f"{flag}: {path}: unknown ending; known: {', '.join(SUFFIXES)}")
    try:
        if form == "csv":
            rows = _read_csv(file, flag)
        elif form == "json":
            rows = datasets.Dataset.from_json(str(file))
        else:
            rows = datasets.Dataset.from_parquet(str(file))
    except UsageError:
        raise
    except Exception as error:  # whatever the reader says
        cause = error.__cause__ or error
        raise UsageError(f"{flag}: {path} cannot be read: {_first_line(cause)}") from None
    if not len(rows):
        raise UsageError(f"{flag}: {path} has no rows")
    return rows


def _read_csv(file: Path, flag: str) -> datasets.Dataset:
    import pandas as pd  # type: ignore[import-untyped]

    separator = "\t" if file.suffix.lower() == ".tsv" else ","
    try:
        frame = pd.read_csv(file, sep=separator, skipinitialspace=True)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UsageError(f"{flag}: {file} cannot be read: {_first_line(error)}") from None
    return datasets.Dataset.from_pandas(frame, preserve_index=False)


# ------------------------------------------------------------------ columns


def _label_column(rows: datasets.Dataset, asked: str | None) -> str:
    columns = rows.column_names
    if asked is not None:
        if asked not in columns:
            raise UsageError(f"--label_column {asked}: no such column; it has {', '.join(columns)}")
        return asked
    for name in LABELS:
        for column in columns:
            if column.lower() == name:
                return str(column)
    raise UsageError(
        f"no label column found among {', '.join(columns)}; name it with --label_column"
    )


def _inputs(rows: datasets.Dataset, label: str, options: Options) -> tuple[str, tuple[str, ...]]:
    features, asked = rows.features, options.data
    for flag, column in (("text", asked.text_column), ("image", asked.image_column)):
        if column is not None:
            if column not in features:
                raise UsageError(
                    f"--{flag}_column {column}: no such column; "
                    f"it has {', '.join(rows.column_names)}"
                )
            return flag, (column,)
    others = [c for c in rows.column_names if c != label]
    images = [c for c in others if isinstance(features[c], datasets.Image)]
    if images:
        return "image", (images[0],)
    texts = [c for c in others if getattr(features[c], "dtype", "") in ("string", "large_string")]
    if texts:
        sample = rows.select(range(min(256, len(rows))))
        lengths = {c: sum(len(str(v)) for v in sample[c]) for c in texts}
        return "text", (max(texts, key=lambda c: lengths[c]),)
    numbers = [c for c in others if _is_number(features[c])]
    if numbers:
        return "numbers", tuple(numbers)
    raise UsageError(
        f"no image, text or number column beside the label {label!r}; "
        f"the columns are {', '.join(rows.column_names)}"
    )


def _task(rows: datasets.Dataset, label: str, kind: str, asked: str | None) -> str:
    dtype = str(getattr(rows.features[label], "dtype", ""))
    guess = "regression" if dtype.startswith("float") and not _is_whole(rows[label]) else None
    guess = guess or ("image-classification" if kind == "image" else "sequence-classification")
    if asked is None:
        return guess
    if asked == "image-classification" and kind != "image":
        raise UsageError(f"--task {asked} needs a column of images; the input found is {kind}")
    if asked == "sequence-classification" and kind == "image":
        raise UsageError(f"--task {asked} needs a text column; the input found is images")
    if asked == "regression" and not _is_number(rows.features[label]):
        raise UsageError(f"--task regression needs numbers; column {label!r} holds {dtype or '?'}")
    assert asked in TASKS
    return asked


def _is_number(feature: Any) -> bool:
    dtype = str(getattr(feature, "dtype", ""))
    return dtype.startswith(("int", "uint", "float", "bool"))


def _is_whole(values: Sequence[Any]) -> bool:
    numbers = np.asarray([v for v in values if v is not None], dtype=float)
    return bool(np.all(numbers == np.round(numbers))) and len(np.unique(numbers)) <= 100


def _selected(
    rows: datasets.Dataset, inputs: Sequence[str], label: str, what: str
) -> datasets.Dataset:
    for column in (*inputs, label):
        if column not in rows.column_names:
            raise UsageError(f"{what}: no column {column!r}; it has {', '.join(rows.column_names)}")
    rows = rows.select_columns([*inputs, label])
    if label != "label":
        rows = rows.rename_column(label, "label")
    absent = [i for i, value in enumerate(rows["label"]) if value is None or value != value]
    if absent:
        raise UsageError(
            f"{what}: {len(absent)} rows have no value in {label!r}, the first is row {absent[0]}"
        )
    for column in inputs:
        if isinstance(rows.features[column], datasets.Image):
            continue
        empty = [i for i, value in enumerate(rows[column]) if value is None or value != value]
        if empty:
            raise UsageError(
                f"{what}: {len(empty)} rows have no value in {column!r}, "
                f"the first is row {empty[0]}"
            )
    return rows


def _numbered(
    parts: Mapping[str, datasets.Dataset],
) -> tuple[dict[str, datasets.Dataset], tuple[str, ...]]:
    feature = parts["train"].features["label"]
    if isinstance(feature, datasets.ClassLabel):
        return dict(parts), tuple(feature.names)
    values = sorted({v for part in parts.values() for v in part["label"]}, key=_sortable)
    if len(values) < 2:
        raise UsageError(f"the label column has {len(values)} class; 2 are the least")
    if len(values) > max(2, len(parts["train"]) // 2):
        raise UsageError(
            f"the label column has {len(values)} different values in {len(parts['train'])} rows: "
            "is it a class? (--label_column, or --task regression)"
        )
    number = {value: k for k, value in enumerate(values)}
    names = tuple(_name(v) for v in values)
    numbered = {}
    for name, part in parts.items():
        labels = [number[v] for v in part["label"]]
        rest = part.remove_columns("label")
        numbered[name] = rest.add_column("label", labels).cast_column(
            "label", datasets.ClassLabel(names=list(names))
        )
    return numbered, names


def _sortable(value: Any) -> tuple[str, Any]:
    return ("", value) if isinstance(value, (int, float)) else ("text", str(value))


def _name(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
