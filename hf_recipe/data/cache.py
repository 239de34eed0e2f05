"""What was measured once on a data set is not measured again: a small cache on this machine.

Costly measurements (near duplicates, cross-validated labels) are kept as JSON under the data
set's fingerprint, our version and the measurement's own; so a second launch on the same data
reads a file. Data sets without a fingerprint (torch data sets, streams) are never remembered.

    fingerprint = dataset_fingerprint(train, validation, about=(columns, label))
    found = remembered_measurement(fingerprint, NearCopies, lambda: near_copies(...))
    known = recalled_measurement(fingerprint, NearCopies)      # None: not measured yet

The folder is ``$HF_RECIPE_CACHE``, or ``hf_recipe`` beside Hugging Face's own caches; the value
``off`` turns it off. A cache that cannot be read or written is no error: the work is done again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from hf_recipe.core.check import Measurement

M = TypeVar("M", bound=Measurement)

MOST_FILES = 1_000  # a measurement is a few kB; the oldest go first


def dataset_fingerprint(*datasets: Any, about: Any = ()) -> str | None:
    """One name for the content of `datasets` (in this order) and whatever `about` says of the work.

    Args:
        about: what else the result depends on (columns, label, limits), as JSON values.

    Returns:
        None where a data set has no fingerprint, so that its content cannot be told by name.
    """
    prints = [getattr(dataset, "_fingerprint", None) for dataset in datasets]
    if not prints or not all(isinstance(each, str) and each for each in prints):
        return None
    sizes = [len(dataset) for dataset in datasets]
    return _digest([prints, sizes, about])


def remembered_measurement(
    fingerprint: str | None, kind: type[M], compute: Callable[[], M], *, name: str = ""
) -> M:
    """The measurement of `kind` that is known for `fingerprint`, else what `compute` returns.

    Args:
        fingerprint: of `dataset_fingerprint`; None: compute, and remember nothing.
        name: tells several measurements of one kind apart (a split, a column).
    """
    known = recalled_measurement(fingerprint, kind, name=name)
    if known is not None:
        return known
    found = compute()
    if fingerprint is not None:
        remember(fingerprint, _name(kind, name), found.values())
    return found


def recalled_measurement(fingerprint: str | None, kind: type[M], *, name: str = "") -> M | None:
    """The measurement of `kind` if this machine knows it already; nothing is computed."""
    values = None if fingerprint is None else recall(fingerprint, _name(kind, name))
    if not isinstance(values, dict):
        return None
    try:
        return kind.from_values(values)
    except (TypeError, ValueError, KeyError):  # written by another version of the same name
        return None


def _name(kind: type[Measurement], name: str) -> str:
    return f"{kind.kind()}.{kind.version}.{name}"


# ---------------------------------------------------------------- the files


def folder() -> Path | None:
    """Where results are kept; None: nowhere."""
    chosen = os.environ.get("HF_RECIPE_CACHE", "")
    if chosen.lower() in ("off", "0", "none"):
        return None
    if chosen:
        return Path(chosen).expanduser()
    home = os.environ.get("HF_HOME") or str(Path("~/.cache/huggingface").expanduser())
    return Path(home).expanduser() / "hf_recipe"


def recall(fingerprint: str, name: str) -> Any:
    """The JSON value kept under `fingerprint` and `name`; None where there is none."""
    path = _path(fingerprint, name)
    if path is None:
        return None
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return kept.get("value") if isinstance(kept, dict) and kept.get("name") == name else None


def remember(fingerprint: str, name: str, value: Any) -> None:
    """Keep a JSON value; written whole or not at all."""
    path = _path(fingerprint, name)
    if path is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"name": name, "value": value}, file)
            os.replace(partial, path)
        finally:
            Path(partial).unlink(missing_ok=True)
        _forget_oldest(path.parent)


def _path(fingerprint: str, name: str) -> Path | None:
    from hf_recipe import __version__

    place = folder()
    return None if place is None else place / f"{_digest([fingerprint, name, __version__])}.json"


def _forget_oldest(place: Path) -> None:
    files = list(place.glob("*.json"))
    if len(files) > MOST_FILES:
        files.sort(key=lambda file: file.stat().st_mtime)
        for file in files[: len(files) - MOST_FILES]:
            file.unlink(missing_ok=True)


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
