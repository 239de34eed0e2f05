"""Where a text's ids stand in a row of ids: whole, cut off at a border, or not at all."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where a text's ids were found.

    Attributes:
        start: position of the first id that was found.
        kept: ids of the text that stand there.
        whole: ids of the text.
        target: whether that is in the target of an encoder-decoder.
    """

    start: int
    kept: int
    whole: int
    target: bool = False

    @property
    def end(self) -> int:
        """The position behind the last id that was found."""
        return self.start + self.kept

    @property
    def is_cut(self) -> bool:
        """Whether a part of the text is missing."""
        return self.kept < self.whole


def find(ids: Sequence[int], part: Sequence[int], start: int = 0) -> int:
    """The first position at or after `start` where `part` stands in `ids`; -1: nowhere."""
    if not part:
        return -1
    hay, needle = array("q", ids).tobytes(), array("q", part).tobytes()
    at = hay.find(needle, start * 8)
    while at >= 0 and at % 8:
        at = hay.find(needle, at + 1)
    return at // 8 if at >= 0 else -1


def place(ids: Sequence[int], text: Sequence[int], borders: Collection[int]) -> Place | None:
    """Find `text` in `ids`.

    A text that does not stand there whole counts as cut if its beginning runs up to a border (the
    row's end, or a special id), or its end begins at one. The outermost id at either end of a
    text may differ, since texts that are joined before they are split melt together there.

    Args:
        ids: a row.
        text: the ids of a text by itself.
        borders: special ids.
    """
    trim = 1 if len(text) >= 4 else 0
    core = list(text[trim : len(text) - trim])
    at = find(ids, core)
    if at >= 0:
        return Place(max(0, at - trim), len(text), len(text))
    if len(core) < 2:
        return None
    right = _run_to_border(ids, core, borders)
    if right is not None:
        start, kept = right
        first = max(0, start - trim)
        return Place(first, kept + start - first, len(text))
    left = _run_to_border(list(ids)[::-1], core[::-1], borders)
    if left is not None:
        start, kept = left
        begin = len(ids) - start - kept
        return Place(begin, kept + min(trim, start), len(text))
    return None


def _run_to_border(
    ids: Sequence[int], core: Sequence[int], borders: Collection[int]
) -> tuple[int, int] | None:
    """(start, length) of the longest beginning of `core` that ends at a border of `ids`."""
    best: tuple[int, int] | None = None
    for head in (8, 4, 2):
        if head > len(core):
            continue
        at = find(ids, core[:head])
        while at >= 0:
            kept = head
            while kept < len(core) and at + kept < len(ids) and ids[at + kept] == core[kept]:
                kept += 1
            ends = at + kept == len(ids) or ids[at + kept] in borders
            if ends and (best is None or kept > best[1]):
                best = (at, kept)
            at = find(ids, core[:head], at + 1)
        if best is not None:
            return best
    return None
