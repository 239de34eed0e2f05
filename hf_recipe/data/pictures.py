"""Images as arrays small enough for a cheap probe, with what their files say.

Encoded images are decoded, colour kept; arrays are taken as they stand. All are brought to one
shape: the commonest one where none of its sides passes 64 pixels, else that one scaled down.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hf_recipe.data.hashing import is_list
from hf_recipe.data.source import Source
from hf_recipe.instruments.batches import has_rows
from hf_recipe.instruments.subject import Subject

Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

SIDE = 64
FEATURES = ("width", "height", "bytes", "format", "brightness", "contrast", "border")


@dataclass(frozen=True)
class Pictures:
    """Images of one shape.

    Attributes:
        pixels: (rows, height, width, channels), in the data's own units.
        shape: (height, width) of most images before scaling.
        facts: (rows, 7): what stands in `FEATURES`, of the image as it was stored.
    """

    pixels: npt.NDArray[np.float32]
    shape: tuple[int, int]
    facts: Floats

    def take(self, rows: npt.NDArray[Any]) -> Pictures:
        """The images at `rows`."""
        return Pictures(self.pixels[rows], self.shape, self.facts[rows])

    @property
    def gray(self) -> npt.NDArray[np.float32]:
        """(rows, height, width): the channels' mean."""
        return np.asarray(self.pixels.mean(axis=3), dtype=np.float32)


def read_pictures(
    subject: Subject, source: Source, name: str, array: pa.Array, places: Integers
) -> tuple[Pictures | None, Flags]:
    """The images of a column, and which rows hold one; None where it holds no images."""
    everything = np.ones(len(array), dtype=bool)
    kind = array.type
    if pa.types.is_struct(kind):
        fields = {kind.field(i).name for i in range(kind.num_fields)}
        feature = type(source.features.get(name)).__name__
        if fields == {"bytes", "path"} and feature in ("Image", "NoneType"):
            decoded = [decode(cell.as_py()) for cell in array]
        elif "digest" in fields:  # a torch data set, whose arrays Arrow does not hold
            decoded = _cells(subject, source, name, places)
        else:
            return None, everything
    elif is_list(kind) and is_list(kind.value_type):
        decoded = [as_image(cell.as_py()) for cell in array]
    elif is_list(kind) and isinstance(source.data, pa.Table):
        decoded = _cells(subject, source, name, places)
    else:
        return None, everything
    good = np.array([image is not None for image in decoded], dtype=bool)
    images = [image for image in decoded if image is not None]
    return (stack(images), good) if images and good.mean() > 0.5 else (None, everything)


@dataclass(frozen=True)
class Image:
    """One image (height, width, channels) with the size of its file and its format's number."""

    pixels: npt.NDArray[np.float32]
    size: int = 0
    form: int = 0


def decode(cell: Mapping[str, Any] | None) -> Image | None:
    """An encoded image; None where it cannot be read."""
    from PIL import Image as Pillow
    from PIL import UnidentifiedImageError

    if not cell or not (cell.get("bytes") or cell.get("path")):
        return None
    raw = cell.get("bytes")
    try:
        with Pillow.open(io.BytesIO(raw) if raw else cell["path"]) as file:
            form = str(file.format)
            file.draft("RGB", (2 * SIDE, 2 * SIDE))  # a JPEG is decoded no larger than needed
            gray = file.mode in ("1", "L", "I", "I;16", "F")
            pixels = np.asarray(file.convert("F" if gray else "RGB"), dtype=np.float32)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError):
        return None
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    return Image(pixels, len(raw or b""), sum(form.encode()))


def as_image(value: Any) -> Image | None:
    """An array (h, w), (h, w, c) or (c, h, w) as an image; None where it is none."""
    try:
        pixels = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError):
        return None
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4) and pixels.shape[2] not in (1, 3, 4):
        pixels = pixels.transpose(1, 2, 0)
    fits = pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4) and min(pixels.shape[:2]) >= 4
    return Image(pixels) if fits and bool(np.isfinite(pixels).all()) else None


def _cells(subject: Subject, source: Source, name: str, places: Integers) -> list[Image | None]:
    dataset = subject.rows(source.name).dataset
    if source.total is None or not has_rows(dataset):
        return [None] * len(places)
    found: list[Image | None] = []
    for row in source.rows[places]:
        value = dataset[int(row)]
        cell = value[name] if isinstance(value, Mapping) else value
        if isinstance(cell, (tuple, list)) and name.isdigit():
            cell = cell[int(name)]
        found.append(as_image(cell))
        if found == [None] * 4:
            return [None] * len(places)  # no images here: do not read all rows to learn it
    return found


def stack(images: list[Image]) -> Pictures:
    """Images of any size as one array, with their facts."""
    shapes = [image.pixels.shape for image in images]
    common = max(set(shapes), key=shapes.count)
    scale = min(1.0, SIDE / max(common[:2]))
    height, width = (max(1, round(side * scale)) for side in common[:2])
    channels = min(shape[2] for shape in shapes)
    pixels = np.stack(
        [area(image.pixels[None, :, :, :channels], height, width)[0] for image in images]
    )
    return Pictures(pixels, (common[0], common[1]), np.array([_facts(image) for image in images]))


def _facts(image: Image) -> tuple[float, ...]:
    height, width = image.pixels.shape[:2]
    gray = image.pixels.mean(axis=2)
    border = np.concatenate([gray[0], gray[-1], gray[:, 0], gray[:, -1]])
    return (
        float(width),
        float(height),
        float(image.size),
        float(image.form),
        float(gray.mean()),
        float(gray.std()),
        float(border.mean()),
    )


def area(pixels: npt.NDArray[Any], height: int, width: int) -> npt.NDArray[np.float32]:
    """(rows, h, w, c) as (rows, height, width, c), by the mean over each new pixel's area."""
    if pixels.shape[1:3] == (height, width):
        return np.asarray(pixels, dtype=np.float32)
    rows, columns = _weights(pixels.shape[1], height), _weights(pixels.shape[2], width)
    shrunk = np.einsum("ah,nhwc->nawc", rows, pixels, optimize=True)
    return np.asarray(np.einsum("bw,nawc->nabc", columns, shrunk, optimize=True), np.float32)


def _weights(old: int, new: int) -> npt.NDArray[np.float32]:
    """(new, old): the share of each old pixel in each new one."""
    edges = np.arange(new + 1) * (old / new)
    low, high = np.arange(old), np.arange(old) + 1
    overlap = np.minimum(edges[1:, None], high) - np.maximum(edges[:-1, None], low)
    return np.asarray(np.clip(overlap, 0, None) * (new / old), dtype=np.float32)
