"""Audio columns: how long, at which rate, how loud; which rows are silent or cannot be read.

WAV files are read with Python's own library, everything else where `soundfile` is installed; a
file that neither reads is counted, never dropped in silence. At most 1,000 evenly spaced rows.
"""

from __future__ import annotations

import io
import math
import wave
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hf_recipe.core.exhibit import Table
from hf_recipe.data.source import Source

ROWS = 1_000
FULL = {1: 128.0, 2: 2.0**15, 3: 2.0**23, 4: 2.0**31}  # of a sample of so many bytes


@dataclass(frozen=True)
class Sound:
    """One recording.

    Attributes:
        seconds: its length.
        rate: samples a second.
        level: root mean square against full scale, in decibels; -inf is silence.
    """

    seconds: float
    rate: int
    level: float


def is_audio(source: Source, column: str) -> bool:
    """Whether the data set declares the column as audio."""
    return type(source.features.get(column)).__name__ == "Audio"


def sound_of(cell: Mapping[str, Any] | None) -> Sound | None:
    """An audio cell, encoded ({"bytes", "path"}) or decoded; None where it cannot be read."""
    if not cell:
        return None
    if cell.get("array") is not None:
        samples = np.asarray(cell["array"], dtype=np.float64)
        return _sound(samples.reshape(-1), samples.shape[-1], int(cell["sampling_rate"]))
    if not (cell.get("bytes") or cell.get("path")):
        return None
    raw = cell.get("bytes")
    try:
        with wave.open(io.BytesIO(raw) if raw else str(cell["path"])) as file:
            samples = _samples(file.readframes(file.getnframes()), file.getsampwidth())
            return _sound(samples, file.getnframes(), file.getframerate())
    except (wave.Error, EOFError, OSError, ValueError, KeyError):
        return _by_soundfile(io.BytesIO(raw) if raw else str(cell["path"]))


def _samples(frames: bytes, width: int) -> npt.NDArray[np.float64]:
    """PCM frames as numbers in -1..1, channels interleaved."""
    if width == 1:  # of the four widths the one that is unsigned
        return np.frombuffer(frames, np.uint8).astype(np.float64) / FULL[1] - 1
    if width == 3:
        wide = np.zeros((len(frames) // 3, 4), dtype=np.uint8)
        wide[:, 1:] = np.frombuffer(frames, np.uint8)[: 3 * len(wide)].reshape(-1, 3)
        return wide.view("<i4")[:, 0].astype(np.float64) / FULL[4]
    return np.frombuffer(frames, f"<i{width}").astype(np.float64) / FULL[width]


def _by_soundfile(file: Any) -> Sound | None:
    try:
        import soundfile
    except ImportError:
        return None
    try:
        samples, rate = soundfile.read(file)
    except (soundfile.SoundFileError, OSError):
        return None
    return _sound(np.asarray(samples).reshape(-1), len(samples), int(rate))


def _sound(samples: npt.NDArray[np.float64], frames: int, rate: int) -> Sound | None:
    if rate <= 0:
        return None
    power = float(np.mean(samples**2)) if len(samples) else 0.0
    return Sound(frames / rate, rate, 10 * math.log10(power) if power > 0 else -math.inf)


def audio_table(source: Source, column: str) -> Table:
    """Length, rate and level of a column's recordings, with what could not be read."""
    places = np.linspace(0, len(source) - 1, min(ROWS, len(source))).astype(np.int64)
    if isinstance(source.data, pa.Table):
        cells = source.data.column(column).take(pa.array(places))
    else:
        chosen = source.data.select_columns([column]).with_format("arrow").select(places)
        cells = chosen[:].column(column)
    sounds = [sound_of(cell.as_py()) for cell in cells]
    unread = [int(source.rows[p]) for p, s in zip(places, sounds, strict=True) if s is None]
    heard = [sound for sound in sounds if sound is not None]
    silent = [int(source.rows[p]) for p, s in zip(places, sounds, strict=True)
              if s is not None and not math.isfinite(s.level)]  # fmt: skip
    rows = [
        (name, *(_cell(v) for v in _spread([float(getattr(s, key)) for s in heard])))
        for name, key in (("seconds", "seconds"), ("samples a second", "rate"),
                          ("level, dB of full scale", "level"))
    ]  # fmt: skip
    rates = len({sound.rate for sound in heard})
    parts = [f"{len(sounds):,} of {len(source):,} rows", f"{rates} sampling rates"]
    if silent:
        parts.append(f"{len(silent):,} are silent, first row {silent[0]}")
    if unread:
        parts.append(f"{len(unread):,} could not be read, first row {unread[0]}")
    head = ("audio", "low", "lower quartile", "median", "upper quartile", "high")
    title = f"Audio {column} of {source.name}"
    return Table(title, "data", head, tuple(rows), caption="; ".join(parts))


def _spread(values: list[float]) -> list[float]:
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return [math.nan] * 5
    return [float(q) for q in np.quantile(known, (0, 0.25, 0.5, 0.75, 1))]


def _cell(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None
