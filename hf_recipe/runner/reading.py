"""Rows as they lie in local files, in a folder of images, on the hub, or bundled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import datasets

from hf_recipe.data.files import READERS, as_dataset, read_table
from hf_recipe.runner.usage import UsageError, first_line

if TYPE_CHECKING:
    from hf_recipe.runner.options import DataOptions

SUFFIXES = READERS | {".txt": "text"}


def from_hub(chosen: DataOptions) -> dict[str, datasets.Dataset]:
    """The parts of a data set on the hub, or of one that is cached."""
    name = str(chosen.dataset_name)
    try:
        found = datasets.load_dataset(name, chosen.dataset_config_name)
    except Exception as error:  # whatever the hub, the network or the loader says
        raise UsageError(f"--dataset_name {name}: {first_line(error)}") from None
    return named_parts(dict(found), f"--dataset_name {name}")


def named_parts(found: Mapping[str, datasets.Dataset], what: str) -> dict[str, datasets.Dataset]:
    """Train, validation and test, by whatever names the validation part goes."""
    parts = {k: v for k, v in found.items() if k in ("train", "validation", "test")}
    for other in ("valid", "val", "dev"):
        if other in found:
            parts.setdefault("validation", found[other])
    if "train" not in parts:
        raise UsageError(f"{what}: no train part; it has {', '.join(found)}")
    # hub test sets without labels (-1 everywhere) cannot be read at the end
    return parts


def from_files(chosen: DataOptions) -> dict[str, datasets.Dataset]:
    """The parts that ``--train_file`` and its kin name."""
    given = {
        "train": chosen.train_file,
        "validation": chosen.validation_file,
        "test": chosen.test_file,
    }
    parts: dict[str, datasets.Dataset] = {}
    for part, path in given.items():
        if path is None:
            continue
        if Path(path).is_dir():
            found = _images(path, f"--{part}_file")
            parts |= named_parts(found, path) if part == "train" else {part: found["train"]}
        else:
            parts[part] = read(path, f"--{part}_file")
    return parts


def _images(path: str, flag: str) -> dict[str, datasets.Dataset]:
    try:
        return dict(datasets.load_dataset("imagefolder", data_dir=path))
    except Exception as error:  # whatever the loader says
        raise UsageError(f"{flag}: {path} is not a folder of images: {first_line(error)}") from None


def read(path: str, flag: str) -> datasets.Dataset:
    """One file's rows."""
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"{flag}: no such file: {path}")
    form = SUFFIXES.get(file.suffix.lower())
    if form is None:
        raise UsageError(f"{flag}: {path}: unknown ending; known: {', '.join(SUFFIXES)}")
    try:
        if form == "text":
            rows = _read_text(file)
        elif form == "parquet":  # may be large: mapped, not held in memory
            rows = datasets.Dataset.from_parquet(str(file))
        else:
            rows = as_dataset(read_table(file))
    except Exception as error:  # whatever the reader says
        cause = error.__cause__ or error
        raise UsageError(f"{flag}: {path} cannot be read: {first_line(cause)}") from None
    if not len(rows):
        raise UsageError(f"{flag}: {path} has no rows")
    return rows


def _read_text(file: Path) -> datasets.Dataset:
    """Paragraphs, where empty lines part them; else lines."""
    text = file.read_text(encoding="utf-8-sig").replace("\r\n", "\n").strip()
    blocks = [block.strip() for block in text.split("\n\n")]
    lines = blocks if len(blocks) > 1 else text.split("\n")
    return datasets.Dataset.from_dict({"text": [line.strip() for line in lines if line.strip()]})
