"""Files among the rows, images and recordings, that cannot be read: training would stop at them.

Images are all opened up to 20,000 rows (the search for near copies needs them too), beyond that
and for recordings evenly spaced ones.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hf_recipe.core.check import Located, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.data.audio import is_audio, sound_of
from hf_recipe.data.hashing import flat_array
from hf_recipe.data.label_probe import opened
from hf_recipe.data.near_prints import MOST_PICTURES, grey_pictures
from hf_recipe.data.sample import gather
from hf_recipe.data.source import Source, roles_of, source_of, splits_of
from hf_recipe.instruments.subject import Subject

ROWS = 1_000  # opened where not all are
KEPT = 20


@dataclass(frozen=True)
class FilesOpened(Measurement):
    """Files of one column of one split.

    Attributes:
        column, what: its name; "images" or "recordings".
        rows: files that were opened; unreadable: of these, how many could not be read.
        examples: their data set rows.
        note: how many were opened, where not all were.
    """

    column: str
    what: str
    rows: int
    unreadable: int
    examples: tuple[int, ...] = ()
    note: str = ""


def take_opened(subject: Subject) -> Iterator[Located]:
    """Open the files of every split of a data set that is looked at by itself."""
    if not subject.cache.get("raw"):
        raise Skip("takes seconds of its own: hf_recipe.inspect_dataset(dataset)")
    found = False
    for split in splits_of(subject):
        try:
            source = source_of(subject, split)
        except Skip:
            continue
        for name in roles_of(subject, source).inputs:
            what = kind_of_files(source, name)
            if what:
                found = True
                yield Located(open_files(source, name, what), split)
    if not found:
        raise Skip("the input holds no image or audio files")


def kind_of_files(source: Source, name: str) -> str:
    """ "images", "recordings", or "" where a column holds no files that can be read here."""
    kind = source.schema.field(name).type
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return ""
    if not is_audio(source, name):
        return "images"
    return "recordings" if importlib.util.find_spec("soundfile") else ""


def open_files(source: Source, name: str, what: str) -> FilesOpened:
    """Which of the files of a column cannot be read."""
    if what == "images" and len(source) <= MOST_PICTURES:
        parts = [flat_array(chunk.column(name)) for chunk in source.chunks([name])]
        missing = np.concatenate([np.asarray(part.is_null()) for part in parts])
        good, rows = grey_pictures(source, name)[1] | missing, source.rows
    else:
        places = np.linspace(0, len(source) - 1, min(ROWS, len(source))).astype(np.int64)
        cells = flat_array(gather(source, places, [name]).column(name))
        read = opened if what == "images" else sound_of
        good = np.array(
            [not cell.is_valid or read(cell.as_py()) is not None for cell in cells], dtype=bool
        )
        rows = source.rows[places]
    bad: npt.NDArray[np.int64] = rows[~good]
    partly = f"{len(rows):,} of {len(source):,} files were opened"
    return FilesOpened(
        name, what, len(rows), len(bad), tuple(bad[:KEPT].tolist()),
        partly if len(rows) < len(source) else source.note,
    )  # fmt: skip


def unreadable_files(seen: FilesOpened) -> Iterator[Fault]:
    """Files that stop the training at the row that holds them."""
    if not seen.unreadable:
        return
    listed = ", ".join(map(str, seen.examples[:5])) + (", ..." if seen.unreadable > 5 else "")
    yield Fault(
        message=f"{seen.unreadable:,} of {seen.rows:,} {seen.what} of {seen.column} cannot be "
        f"read, rows {listed}" + (f"; {seen.note}" if seen.note else ""),
        subject=f"{seen.what} of {seen.column}",
        severity="error",
        fix=f"bad = set({list(seen.examples)}); "
        "dataset = dataset.select([i for i in range(len(dataset)) if i not in bad])",
        evidence={"seen": f"{seen.unreadable:,} unreadable files", "expected": "none"},
        examples=seen.examples,
    )


OPENED = Probe("open files", "dataset", (FilesOpened,), take_opened)
