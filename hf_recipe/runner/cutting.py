"""Cutting a part off the training rows: by class, by content, the same on every machine."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets


def cut(
    rows: datasets.Dataset,
    inputs: Sequence[str],
    share: float,
    seed: int,
    strata: Sequence[int] | None = None,
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Two parts of `rows`, the second with about `share` of each stratum.

    Rows with equal inputs stay together.

    Args:
        strata: of each row: its class, or the tenth of the range; None: all alike.
    """
    keys = [hashlib.sha256(f"{seed}".encode() + row).digest() for row in row_bytes(rows, inputs)]
    labels = [0] * len(rows) if strata is None else [int(label) for label in strata]
    groups: dict[bytes, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    by_label: dict[int, list[bytes]] = {}
    for key, members in groups.items():
        common = Counter(labels[i] for i in members).most_common(1)[0][0]
        by_label.setdefault(common, []).append(key)
    second: set[int] = set()
    for keys_of in by_label.values():
        wanted = share * sum(len(groups[key]) for key in keys_of)
        taken = 0
        for key in sorted(keys_of):
            if taken + len(groups[key]) / 2 > wanted:
                break
            second.update(groups[key])
            taken += len(groups[key])
    first = [i for i in range(len(rows)) if i not in second]
    return rows.select(first), rows.select(sorted(second))


def row_bytes(rows: datasets.Dataset, columns: Sequence[str]) -> list[bytes]:
    """Each row's values of `columns` as bytes."""
    parts: list[list[bytes]] = []
    for column in columns:
        if isinstance(rows.features[column], datasets.Image):
            encoded = rows.cast_column(column, datasets.Image(decode=False))[column]
            parts.append([_image_bytes(value) for value in encoded])
        else:
            parts.append([repr(value).encode() for value in rows[column]])
    return [b"\x00".join(values) for values in zip(*parts, strict=True)]


def _image_bytes(value: Mapping[str, Any]) -> bytes:
    content = value.get("bytes")
    return content if content is not None else Path(value["path"]).read_bytes()
