"""The checkpoint that a model was made from, as far as it lies on this machine.

Only safetensors are read, a few thousand numbers at a time; nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """Which file holds which tensor.

    Attributes:
        name: as the config names it.
        files: tensor name -> file.
        shapes: tensor name -> shape.
    """

    name: str
    files: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]

    def values(self, name: str, limit: int) -> torch.Tensor:
        """Up to `limit` first rows' numbers of one tensor, flat."""
        from safetensors import safe_open

        shape = self.shapes[name]
        with safe_open(self.files[name], framework="pt") as file:
            if not shape:
                whole: torch.Tensor = file.get_tensor(name)
                return whole.reshape(-1)
            row = 1
            for size in shape[1:]:
                row *= size
            rows = max(1, min(shape[0], limit // max(row, 1)))
            part: torch.Tensor = file.get_slice(name)[:rows]
            return part.reshape(-1)[:limit]


def checkpoint_of(config: Any) -> Checkpoint | None:
    """The safetensors that the config's name stands for; None where none lie here."""
    name = str(getattr(config, "_name_or_path", "") or "")
    if not name:
        return None
    index, single = _file(name, INDEX), _file(name, SINGLE)
    if single is not None:
        return _read(name, {single})
    if index is None:
        return None
    parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    files = {part: _file(name, part) for part in parts}
    found = {file for file in files.values() if file is not None}
    return _read(name, found) if len(found) == len(parts) else None


def checkpoint_in(folder: Path) -> Checkpoint | None:
    """The safetensors of a whole model in a folder; None where there are none."""
    found = set(folder.glob("model*.safetensors"))
    return _read(str(folder), found) if found else None


def _file(name: str, part: str) -> Path | None:
    if Path(name).is_dir():
        path = Path(name) / part
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, part)
    except HFValidationError:  # a path that is gone
        return None
    return Path(cached) if isinstance(cached, str) else None


def _read(name: str, files: set[Path]) -> Checkpoint:
    from safetensors import safe_open

    where: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(files):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (not a mapping)
                where[key] = file
                shapes[key] = tuple(opened.get_slice(key).get_shape())
    return Checkpoint(name, where, shapes)
