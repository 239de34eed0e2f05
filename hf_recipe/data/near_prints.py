"""What near copies are told by: a print per row, and how alike two rows are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hf_recipe.core.check import Skip
from hf_recipe.data.audio import is_audio
from hf_recipe.data.column_exhibits import take_cells
from hf_recipe.data.hashing import Hashes, flat_array, is_list, mix
from hf_recipe.data.minhash import Integers, Shingles, band_keys, overlaps, shingles_of
from hf_recipe.data.source import Source

FEWEST = 8  # word pairs under which a shared phrase is no copy
TEXT_NEAR = 0.55  # one word in eight replaced in a text of sixty; 5 % of edits leave about .8
PICTURE_NEAR = 0.9  # saved again at quality 20, resized, brightened, with noise: all above .93
MOST_PICTURES = 20_000
SIDE = 16
PICTURE_BANDS = 16


@dataclass
class Prints:
    """The prints of a split's rows.

    Attributes:
        columns: what they are made of; how: by which likeness, in words.
        keys: (rows, bands): rows that agree in one are compared.
        enough: (rows,) whether a row says enough to be compared at all.
        near: the least likeness of near copies.
        deviations: how far beyond random pairs it must lie at least.
    """

    source: Source
    columns: tuple[str, ...]
    how: str
    keys: Hashes
    enough: npt.NDArray[np.bool_]
    near: float
    deviations: float = 7.0  # beyond the likest of 10 billion random pairs
    bits: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros((0, 0), dtype=bool))
    grey: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))

    def likeness(self, pairs: Integers, other: Prints) -> npt.NDArray[np.float64]:
        """How alike (0 to 1) rows ``pairs[:, 0]`` of this and ``pairs[:, 1]`` of `other` are."""
        if not len(pairs):
            return np.zeros(0)
        if self.bits.size:
            grey, gray = self.grey[pairs[:, 0]], other.grey[pairs[:, 1]]
            # Unit vectors about their means: the product is the correlation.
            alike = np.clip((grey * gray).sum(axis=1), 0.0, 1.0).astype(np.float64)
            same = (self.bits[pairs[:, 0]] == other.bits[pairs[:, 1]]).mean(axis=1)
            return np.asarray(np.minimum(same, alike))
        found = np.ones(len(pairs))
        for column in self.columns:  # one part that differs (another question) is another row
            one, left = _shingled(self.source, column, pairs[:, 0])
            two, right = _shingled(other.source, column, pairs[:, 1])
            both = Shingles(
                np.concatenate([one.values, two.values]),
                np.concatenate([one.bounds, two.bounds[1:] + len(one.values)]),
            )
            local = np.stack([left, right + len(one.sizes)], axis=1)
            empty = (both.sizes[local] == 0).all(axis=1)
            found = np.minimum(found, np.where(empty, 1.0, overlaps(local, both)))
        return found


def _shingled(source: Source, column: str, places: Integers) -> tuple[Shingles, Integers]:
    """The shingles of the different rows among `places`, and where each of `places` stands."""
    rows, inverse = np.unique(places, return_inverse=True)
    return shingles_of([take_cells(source, column, rows)]), inverse.astype(np.int64)


def comparable(source: Source, columns: Sequence[str]) -> tuple[str, ...]:
    """The columns that a near copy can be told by: texts and token ids, else one of images.

    Raises:
        Skip: there is none.
    """
    schema = next(source.chunks(columns)).schema if columns else pa.schema([])
    texts = tuple(c for c in columns if _is_words(schema.field(c).type))
    if texts:
        return texts
    files = (c for c in columns if _is_file(schema.field(c).type))
    pictures = tuple(c for c in files if not is_audio(source, c))
    if pictures:
        return pictures[:1]
    raise Skip("near copies are looked for in texts, token ids and image files; there are none")


def _is_words(kind: pa.DataType) -> bool:
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return True
    return is_list(kind) and bool(pa.types.is_integer(kind.value_type))


def _is_file(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind):
        return False
    return {kind.field(i).name for i in range(kind.num_fields)} == {"bytes", "path"}


def prints_of(source: Source, columns: tuple[str, ...]) -> Prints:
    """The prints of every row over `columns` (of `comparable`)."""
    first = next(source.chunks(columns))
    if _is_file(first.schema.field(columns[0]).type):
        return _picture_prints(source, columns[0])
    keys, sizes = [], []
    for chunk in source.chunks(columns):
        made, size = band_keys([flat_array(chunk.column(name)) for name in columns])
        keys.append(made)
        sizes.append(size)
    enough = np.concatenate(sizes) >= FEWEST
    return Prints(source, columns, "word pairs", np.concatenate(keys), enough, TEXT_NEAR)


# ---------------------------------------------------------------- pictures


def _picture_prints(source: Source, column: str) -> Prints:
    """Small grey pictures, and for each place whether it is darker than its right neighbour."""
    if len(source) > MOST_PICTURES:
        raise Skip(f"{len(source):,} images are more than the {MOST_PICTURES:,} that are decoded")
    grey, readable = grey_pictures(source, column)
    bits = (grey[:, :, 1:] > grey[:, :, :-1]).reshape(len(grey), -1)
    width = bits.shape[1] // PICTURE_BANDS
    parts = bits[:, : width * PICTURE_BANDS].reshape(len(bits), PICTURE_BANDS, width)
    weights = np.uint64(1) << np.arange(width, dtype=np.uint64)
    keys = (parts.astype(np.uint64) * weights).sum(axis=2, dtype=np.uint64)
    keys = mix(keys ^ (np.arange(PICTURE_BANDS, dtype=np.uint64) << np.uint64(48)))
    flat = grey.reshape(len(grey), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    enough = readable & (length[:, 0] > 0)
    return Prints(
        source, (column,), "small grey pictures", keys, enough, PICTURE_NEAR, 0.0, bits,
        (flat / np.maximum(length, 1e-9)).astype(np.float32),
    )  # fmt: skip


def grey_pictures(
    source: Source, column: str
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Every image as grey values, (rows, SIDE, SIDE + 1), and which rows could be read."""
    key = f"grey:{column}"
    if key not in source.kept:
        source.kept[key] = _read_pictures(source, column)
    made: tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]] = source.kept[key]
    return made


def _read_pictures(
    source: Source, column: str
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    grey = np.zeros((len(source), SIDE, SIDE + 1), dtype=np.float32)
    readable = np.zeros(len(source), dtype=bool)
    place = 0
    for chunk in source.chunks([column]):
        for cell in flat_array(chunk.column(column)).to_pylist():
            picture = _decoded(cell)
            if picture is not None:
                grey[place], readable[place] = picture, True
            place += 1
    return grey, readable


def _decoded(cell: Any) -> npt.NDArray[np.float32] | None:
    """One image file as a small grey picture; None where it cannot be read."""
    import io

    from PIL import Image, UnidentifiedImageError

    if cell is None or not (cell["bytes"] or cell["path"]):
        return None
    try:
        with Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] else cell["path"]) as image:
            image.draft("L", (4 * SIDE, 4 * SIDE))  # JPEG files decode at a fraction of the cost
            small = image.convert("L").resize((SIDE + 1, SIDE), Image.Resampling.BOX)
            return np.asarray(small, dtype=np.float32)
    except (OSError, UnidentifiedImageError, ValueError):
        return None
