"""Audio columns: how long, at which rate, how loud; which rows are silent or cannot be read; and
the power by pitch, from which a cheap probe learns what is heard.

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

Samples = npt.NDArray[np.float64]

ROWS = 1_000
FACTS = ("seconds", "samples a second", "level")
SILENT = -200.0  # decibels that stand for none
WINDOW, WINDOWS, BANDS = 512, 64, 24
LOWEST, HIGHEST = 60.0, 8_000.0  # hertz: where speech and most music lie
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


def recording_of(cell: Mapping[str, Any] | None) -> tuple[Samples, int] | None:
    """(frames, channels) in -1..1 and the rate of an audio cell; None where it cannot be read.

    Args:
        cell: encoded ({"bytes", "path"}) or decoded ({"array", "sampling_rate"}).
    """
    if not cell:
        return None
    if cell.get("array") is not None:
        samples = np.asarray(cell["array"], dtype=np.float64)
        return samples.reshape(-1, samples.shape[-1]).T, int(cell["sampling_rate"])
    if not (cell.get("bytes") or cell.get("path")):
        return None
    raw = cell.get("bytes")
    try:
        with wave.open(io.BytesIO(raw) if raw else str(cell["path"])) as file:
            samples = _samples(file.readframes(file.getnframes()), file.getsampwidth())
            return samples.reshape(-1, file.getnchannels()), file.getframerate()
    except (wave.Error, EOFError, OSError, ValueError, KeyError):
        return _by_soundfile(io.BytesIO(raw) if raw else str(cell["path"]))


def _samples(frames: bytes, width: int) -> Samples:
    """PCM frames as numbers in -1..1, channels interleaved."""
    if width == 1:  # of the four widths the one that is unsigned
        return np.frombuffer(frames, np.uint8).astype(np.float64) / FULL[1] - 1
    if width == 3:
        wide = np.zeros((len(frames) // 3, 4), dtype=np.uint8)
        wide[:, 1:] = np.frombuffer(frames, np.uint8)[: 3 * len(wide)].reshape(-1, 3)
        return wide.view("<i4")[:, 0].astype(np.float64) / FULL[4]
    return np.frombuffer(frames, f"<i{width}").astype(np.float64) / FULL[width]


def _by_soundfile(file: Any) -> tuple[Samples, int] | None:
    try:
        import soundfile
    except ImportError:
        return None
    try:
        samples, rate = soundfile.read(file, always_2d=True)
    except (soundfile.SoundFileError, OSError):
        return None
    return np.asarray(samples, dtype=np.float64), int(rate)


def sound_of(cell: Mapping[str, Any] | None) -> Sound | None:
    """How long, at which rate and how loud an audio cell is; None where it cannot be read."""
    return _sound(recording_of(cell))


def _sound(recording: tuple[Samples, int] | None) -> Sound | None:
    if recording is None or recording[1] <= 0:
        return None
    samples, rate = recording
    power = float(np.mean(samples**2)) if len(samples) else 0.0
    return Sound(len(samples) / rate, rate, 10 * math.log10(power) if power > 0 else -math.inf)


# ---------------------------------------------------------------- for cheap probes


@dataclass(frozen=True)
class Sounds:
    """Recordings as a cheap probe hears them; NaN where one cannot be read.

    Attributes:
        facts: (rows, 3): what stands in `FACTS`.
        bands: (rows, 48): mean and deviation over time of the power in 24 bands of pitch, in
            logarithms, without the level.
    """

    facts: Samples
    bands: Samples

    def take(self, rows: npt.NDArray[Any]) -> Sounds:
        """The recordings at `rows`."""
        return Sounds(self.facts[rows], self.bands[rows])


def read_sounds(array: pa.Array) -> Sounds:
    """Every recording of an audio column, one at a time."""
    facts = np.full((len(array), len(FACTS)), np.nan)
    bands = np.full((len(array), 2 * BANDS), np.nan)
    for row, cell in enumerate(array):
        recording = recording_of(cell.as_py())
        sound = _sound(recording)
        if recording is not None and sound is not None:
            level = sound.level if math.isfinite(sound.level) else SILENT
            facts[row] = sound.seconds, sound.rate, level
            bands[row] = spectrum(*recording)
    return Sounds(facts, bands)


def spectrum(samples: Samples, rate: int) -> Samples:
    """Power by band of pitch in evenly spaced windows: its mean and deviation over time."""
    mono = samples.mean(axis=1) if samples.size else np.zeros(0)
    mono = np.pad(mono, (0, max(WINDOW - len(mono), 0)))
    starts = np.linspace(0, len(mono) - WINDOW, WINDOWS).astype(np.int64)
    frames = mono[starts[:, None] + np.arange(WINDOW)] * np.hanning(WINDOW)
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    pitches = np.fft.rfftfreq(WINDOW, 1 / rate)
    edges = np.geomspace(LOWEST, HIGHEST, BANDS - 1)
    where = np.searchsorted(edges, pitches)
    summed = np.stack([power[:, where == band].sum(axis=1) for band in range(BANDS)], axis=1)
    loud = np.log10(summed + 1e-9)
    loud -= loud.mean(axis=1, keepdims=True)
    return np.concatenate([loud.mean(axis=0), loud.std(axis=0)])


# ---------------------------------------------------------------- for the report


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
