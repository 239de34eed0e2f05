"""One 64-bit number per row, straight from Arrow's buffers, and how much a row says.

Equal rows have equal numbers whatever integer width they are stored in. Two different rows
collide with probability 2^-64 (200,000 rows: one chance in a billion).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

Hashes = npt.NDArray[np.uint64]

_NULL = np.uint64(0x9E3779B97F4A7C15)
_ODD, _FOLD = np.uint64(0xBF58476D1CE4E5B9), np.uint64(29)  # of a multiplicative hash


def mix(values: Hashes) -> Hashes:
    """Scatter the bits of `values` (the finalizer of SplitMix64, Steele et al. 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def table_hashes(
    table: pa.Table, columns: Sequence[str], of: Callable[[pa.Array], Hashes] | None = None
) -> Hashes:
    """One number per row of `table` over `columns`; their order matters, their chunks do not.

    Args:
        of: how one array is hashed; default: `array_hashes`.
    """
    combined = np.zeros(table.num_rows, dtype=np.uint64)
    for name in columns:
        combined = mix(combined ^ (of or array_hashes)(flat_array(table.column(name))))
    return combined


def flat_array(column: pa.ChunkedArray) -> pa.Array:
    """One contiguous array, extension and dictionary types resolved."""
    array = column
    if isinstance(column, pa.ChunkedArray):  # one chunk is taken as it is: combining copies
        array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else array.chunk(0)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return array


def array_hashes(array: pa.Array) -> Hashes:
    """One number per element of an Arrow array of any type."""
    array = flat_array(array)
    kind = array.type
    if pa.types.is_null(kind):
        return np.full(len(array), _NULL)
    if pa.types.is_struct(kind):
        hashes = _struct_hashes(array)
    elif pa.types.is_string(kind) or pa.types.is_binary(kind):
        hashes = _bytes_hashes(array, np.int32)
    elif pa.types.is_large_string(kind) or pa.types.is_large_binary(kind):
        hashes = _bytes_hashes(array, np.int64)
    elif is_list(kind):
        hashes = _list_hashes(array)
    else:
        hashes = mix(numbers(array).view(np.uint64))
    if array.null_count:
        hashes[~np.asarray(array.is_valid())] = _NULL
    return hashes


def glances(array: pa.Array) -> Hashes:
    """Equal elements have equal numbers, and different ones seldom do.

    Texts and files are looked at in their middle and at their end alone: a fraction of reading
    them. What agrees in its glance is hashed in full before anybody calls it equal.
    """
    array = flat_array(array)
    kind = array.type
    if pa.types.is_struct(kind) and {kind.field(i).name for i in range(kind.num_fields)} == {
        "bytes", "path",
    } and not array.field("bytes").null_count:  # fmt: skip
        return glances(array.field("bytes"))
    if not (pa.types.is_string(kind) or pa.types.is_binary(kind)) or not len(array):
        return array_hashes(array)
    _, offset_buffer, data = array.buffers()
    offsets = np.frombuffer(offset_buffer, np.int32)[array.offset : array.offset + len(array) + 1]
    starts, lengths = offsets[:-1].astype(np.int64), np.diff(offsets)
    found: Hashes = lengths.astype(np.uint64)
    if data is not None and len(data) >= 8:
        # eight bytes from every byte on, as they lie
        words = np.ndarray(len(data) - 7, dtype="<u8", buffer=data, strides=(1,))
        room = np.maximum(lengths - 8, 0)
        for places in (starts + room // 2, starts + room):  # files begin alike
            seen = words[np.minimum(places, len(words) - 1)]
            seen[lengths < 8] = 0
            found = (found ^ seen) * _ODD
            found ^= found >> _FOLD
    if array.null_count:
        found[~np.asarray(array.is_valid())] = _NULL
    return found


def shared(numbers: Hashes) -> npt.NDArray[np.bool_]:
    """Which elements may have an equal one; one in twenty of the others is taken along."""
    bits = (len(numbers) * 16 + 1).bit_length()
    slots = (mix(numbers) >> np.uint64(64 - bits)).astype(np.int64)
    last = np.empty(1 << bits, dtype=np.int32)  # of each slot; only those written are read
    places = np.arange(len(numbers), dtype=np.int32)
    last[slots] = places
    last[slots[last[slots] != places]] = -1
    return np.asarray(last[slots] < 0)


def is_list(kind: pa.DataType) -> bool:
    """Whether cells of this type are sequences."""
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def is_number(kind: pa.DataType) -> bool:
    """Whether cells of this type are numbers or truth values."""
    return bool(
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    )


def numbers(array: pa.Array) -> npt.NDArray[Any]:
    """A primitive array as int64 or float64, nulls as 0, -0.0 as 0.0."""
    kind = array.type
    if pa.types.is_floating(kind):
        filled = array.cast(pa.float64()).fill_null(0.0)
        return np.ascontiguousarray(filled.to_numpy(zero_copy_only=False)) + 0.0
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind):
        safe = kind != pa.uint64()
        return np.ascontiguousarray(
            array.cast(pa.int64(), safe=safe).fill_null(0).to_numpy(zero_copy_only=False)
        )
    texts = array.cast(pa.string()).fill_null("")  # times, decimals
    return _bytes_hashes(texts, np.int32).view(np.int64)


def list_parts(array: pa.Array) -> tuple[pa.Array, npt.NDArray[np.int64]]:
    """The elements of a list array, laid end to end, and the offset of each list (n + 1)."""
    if pa.types.is_fixed_size_list(array.type):
        width = array.type.list_size
        values = array.values.slice(array.offset * width, len(array) * width)
        return values, np.arange(len(array) + 1, dtype=np.int64) * width
    offsets = np.asarray(array.offsets, dtype=np.int64)
    return array.values.slice(offsets[0], offsets[-1] - offsets[0]), offsets - offsets[0]


def flat_lists(array: pa.Array) -> tuple[pa.Array, npt.NDArray[np.int64]]:
    """As `list_parts`, down to the innermost elements of nested lists."""
    values, offsets = list_parts(array)
    values = flat_array(values)
    while is_list(values.type):
        values, inner = list_parts(values)
        values, offsets = flat_array(values), inner[offsets]
    return values, offsets


def _bytes_hashes(array: pa.Array, offset_type: type) -> Hashes:
    _, offset_buffer, data = array.buffers()
    if not len(array):
        return np.zeros(0, dtype=np.uint64)
    offsets = np.frombuffer(offset_buffer, dtype=offset_type)[
        array.offset : array.offset + len(array) + 1
    ].tolist()
    view = memoryview(data if data is not None else b"")
    spans = map(view.__getitem__, map(slice, offsets, offsets[1:]))
    return np.fromiter(map(xxhash.xxh3_64_intdigest, spans), np.uint64, len(array))


def _list_hashes(array: pa.Array) -> Hashes:
    values, offsets = list_parts(array)
    values = flat_array(values)
    kind = values.type
    if pa.types.is_floating(kind) and not values.null_count:
        flat = np.ascontiguousarray(values.to_numpy(zero_copy_only=False))
    elif is_number(kind) and kind != pa.uint8():
        flat = numbers(values)
    elif kind == pa.uint8() and not values.null_count:
        flat = np.ascontiguousarray(values.to_numpy(zero_copy_only=False))
    else:
        flat = array_hashes(values)
    raw = memoryview(flat.tobytes())
    bounds = (offsets * flat.dtype.itemsize).tolist()
    digest = xxhash.xxh3_64_intdigest
    return np.array([digest(raw[a:b]) for a, b in itertools.pairwise(bounds)], dtype=np.uint64)


def _struct_hashes(array: pa.Array) -> Hashes:
    names = [array.type.field(i).name for i in range(array.type.num_fields)]
    if set(names) == {"bytes", "path"}:
        return _file_hashes(array)
    combined = np.zeros(len(array), dtype=np.uint64)
    for name in names:
        combined = mix(combined ^ array_hashes(array.field(name)))
    return combined


def _file_hashes(array: pa.Array) -> Hashes:
    """Images and audio: the encoded bytes, wherever they lie; their path where unreadable."""
    hashes = array_hashes(array.field("bytes"))
    elsewhere = np.flatnonzero(np.asarray(array.field("bytes").is_null()))
    paths = array.field("path").take(pa.array(elsewhere)).to_pylist() if len(elsewhere) else []
    for place, path in zip(elsewhere, paths, strict=True):
        file = Path(path or "")
        content = file.read_bytes() if path and file.is_file() else str(path).encode()
        hashes[place] = xxhash.xxh3_64_intdigest(content)
    return hashes


# ---------------------------------------------------------------- how much a row says


def row_bits(table: pa.Table, columns: Sequence[str]) -> npt.NDArray[np.float64]:
    """A cautious estimate of the information in each row, in bits.

    Text counts one bit a character (English carries 1.0 to 1.3, Shannon 1951). Numbers count half
    the negative log of the chance that two rows agree, sequences half of their elements' bits:
    columns and neighbours depend on each other. A sequence's most frequent element (padding,
    background) counts nothing.
    """
    total = np.zeros(table.num_rows)
    for name in columns:
        total += _array_bits(flat_array(table.column(name)))
    return total


def _array_bits(array: pa.Array) -> npt.NDArray[np.float64]:
    kind = array.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        import pyarrow.compute as pc

        lengths = pc.utf8_length(pc.utf8_trim_whitespace(array)).fill_null(0)
        return np.asarray(lengths, dtype=np.float64)
    if pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return np.where(np.asarray(array.is_valid()), 1e4, 0.0)
    if is_list(kind) and len(array):
        values, offsets = list_parts(array)
        values = flat_array(values)
        if not is_number(values.type):
            return np.repeat(1e4, len(array))
        flat = numbers(values)
        elements, places, counts = np.unique(flat, return_inverse=True, return_counts=True)
        bits = -np.log2(counts / max(len(flat), 1)) / 2
        if len(elements):
            bits[np.argmax(counts)] = 0.0
        sums = np.concatenate([[0.0], np.cumsum(bits[places])])
        return np.asarray(sums[offsets[1:]] - sums[offsets[:-1]])
    return np.full(len(array), collision_bits(array_hashes(array)) / 2)


def collision_bits(hashes: Hashes) -> float:
    """-log2 of the chance that two rows agree; at most what this many rows could show."""
    rows = len(hashes)
    if rows < 2:
        return 0.0
    _, counts = np.unique(hashes, return_counts=True)
    pairs = rows * (rows - 1)
    return float(-np.log2(max(float((counts * (counts - 1)).sum()), 1.0) / pairs))
