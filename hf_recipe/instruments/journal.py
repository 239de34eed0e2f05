"""A file that a crash cannot spoil: one JSON object a line, on disk before the next question."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Journal:
    """Appends lines to `path`; the first line is the header that says what the rest is.

    Args:
        path: made where it is missing, continued where it is there.
        header: written first; a file that begins with another one is refused.

    Raises:
        ValueError: the file belongs to something else.
    """

    def __init__(self, path: str | os.PathLike[str], header: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lines = read_journal(self.path) if self.path.exists() else []
        wanted = json.loads(json.dumps(dict(header)))
        if self.lines and self.lines[0] != wanted:
            changed = sorted(
                k for k in {*wanted, *self.lines[0]} if wanted.get(k) != self.lines[0].get(k)
            )
            raise ValueError(
                f"{self.path} was begun for something else ({', '.join(changed)} differ): "
                "give another file"
            )
        _drop_torn_line(self.path)
        if not self.lines:
            self.add(wanted)

    def add(self, line: Mapping[str, Any]) -> None:
        """Append one line; it is on disk when this returns."""
        with self.path.open("ab") as file:
            file.write(json.dumps(dict(line), ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(dict(line))


def read_journal(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a journal; a last line that was cut off by a crash is left out.

    Raises:
        ValueError: a line in the middle is no JSON object.
    """
    found: list[dict[str, Any]] = []
    whole = Path(path).read_bytes().split(b"\n")[:-1]  # what follows the last newline is torn
    for number, raw in enumerate(whole, 1):
        try:
            line = json.loads(raw)
        except ValueError:
            line = None
        if not isinstance(line, dict):
            raise ValueError(f"{path}, line {number}: not a JSON object")
        found.append(line)
    return found


def standing(
    path: str | os.PathLike[str], kind: str, what: str
) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """The header, and the last line of each item that was not undone.

    Raises:
        ValueError: `path` is not of this `kind`; the message says what it is not.
    """
    lines = read_journal(path)
    if not lines or lines[0].get("kind") != kind:
        raise ValueError(f"{path} is not a {what}")
    found: dict[int, dict[str, Any]] = {}
    for line in lines[1:]:
        if "undo" in line:
            found.pop(line["undo"], None)
        else:
            found[line["item"]] = line
    return lines[0], found


def _drop_torn_line(path: Path) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with path.open("rb+") as file:
            file.truncate(content.rfind(b"\n") + 1)
