"""Where each text column stands in the rows of ids that were made of it.

Every text is split again, without a limit, and looked for in its row: what truncation took, and
which labels are the prompt's, is read off the place.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from hf_recipe.data.alignment import Place, place
from hf_recipe.data.text_rows import TextRow, text_rows
from hf_recipe.data.tokenizer import Splitter, special_ids, splitting, tokenizer_of
from hf_recipe.instruments.subject import Subject

Places = dict[str, list[Place | None]]


def text_places(subject: Subject, split: str) -> Places:
    """For each text column, where it stands in each of `text_rows`; looked for once per subject.

    Empty where there is no tokenizer, or no text.
    """
    key, tokenizer = f"text places:{split}", tokenizer_of(subject)
    if key not in subject.cache and tokenizer is not None:
        with splitting(tokenizer) as splitter:
            subject.cache[key] = _places(
                text_rows(subject, split), splitter, special_ids(subject).every
            )
    found: Places = subject.cache.get(key, {})
    return found


def _places(rows: Sequence[TextRow], splitter: Splitter, borders: Collection[int]) -> Places:
    """A text is split by itself and behind a space, since many tokenizers tell the two apart."""
    found: Places = {}
    for column in dict.fromkeys(name for row in rows for name in row.texts):
        best: list[Place | None] = []
        for before in ("", " "):
            places = [_place(row, column, before, splitter, borders) for row in rows]
            if seen_in(places) > seen_in(best):
                best = places
            if seen_in(best) == len(rows):
                break
        found[column] = best or [None] * len(rows)
    return found


def _place(
    row: TextRow, column: str, before: str, splitter: Splitter, borders: Collection[int]
) -> Place | None:
    text = row.texts.get(column, "").strip()
    if not text:
        return None
    ids = splitter.ids(before + text)
    at = place(row.ids, ids, borders)
    if row.target is None or (at is not None and not at.is_cut):
        return at
    aim = place(row.target, ids, borders)
    better = aim is not None and (at is None or aim.kept > at.kept)
    return replace(aim, target=True) if aim is not None and better else at


def seen_in(places: Sequence[Place | None]) -> int:
    """In how many rows a text was found."""
    return sum(p is not None for p in places)
