import io
import math
import wave

import datasets
import numpy as np
import pytest

from hf_recipe.data.audio import sound_of
from hf_recipe.inspection import inspect_dataset
from tests.data.asking import ask, found, measured


def encoded(samples, rate, width=2, channels=1):
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(width)
        out.setframerate(rate)
        high = 2 ** (8 * width - 1) - 1
        whole = np.round(np.asarray(samples) * high).astype(np.int64)
        if width == 1:
            out.writeframes((whole + 128).astype(np.uint8).tobytes())
        elif width == 3:
            out.writeframes(b"".join(int(v).to_bytes(3, "little", signed=True) for v in whole))
        else:
            out.writeframes(whole.astype(f"<i{width}").tobytes())
    return {"bytes": file.getvalue(), "path": None}


def tone(seconds, rate, loud=0.5):
    return loud * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_length_rate_and_level(width):
    sound = sound_of(encoded(tone(0.5, 8_000), 8_000, width))
    assert (sound.seconds, sound.rate) == (0.5, 8_000)
    assert sound.level == pytest.approx(20 * math.log10(0.5 / math.sqrt(2)), abs=0.1)


def test_channels_silence_arrays_and_broken_files():
    both = np.repeat(tone(1.0, 4_000), 2)
    assert sound_of(encoded(both, 4_000, channels=2)).seconds == 1.0
    assert sound_of(encoded(np.zeros(100), 8_000)).level == -math.inf
    decoded = {"array": tone(1.0, 4_000), "sampling_rate": 4_000, "path": None}
    assert sound_of(decoded).seconds == 1.0
    assert sound_of({"bytes": b"RIFF no sound", "path": None}) is None
    assert sound_of({"bytes": None, "path": "nowhere.wav"}) is None
    assert sound_of(None) is None


def test_a_column_of_audio_is_told_and_never_crashes():
    rng = np.random.default_rng(0)
    cells = [encoded(tone(rng.uniform(0.1, 0.3), 4_000), 4_000) for _ in range(60)]
    cells[7] = encoded(np.zeros(400), 4_000)
    cells[9] = {"bytes": b"nothing", "path": None}
    features = datasets.Features({"audio": datasets.Audio(), "label": datasets.Value("int64")})
    storage = {"audio": cells, "label": [0, 1] * 30}
    plain = datasets.Features(
        {"audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
         "label": datasets.Value("int64")}
    )  # fmt: skip
    data = datasets.Dataset.from_dict(storage, features=plain).cast(features)
    report = inspect_dataset(data, label="label")
    assert not report.crashed
    (table,) = [e for e in report.exhibits if e.title == "Audio audio of train"]
    assert "1 are silent, first row 7" in table.caption
    assert "1 could not be read, first row 9" in table.caption
    assert dict((row[0], row[3]) for row in table.rows)["samples a second"] == 4_000
    columns = next(e for e in report.exhibits if e.title == "Columns of train")
    assert columns.rows[0][:3] == ("audio", "audio", "input")


@pytest.mark.parametrize("told_by", ["pitch", "length", "nothing"])
def test_recordings_are_asked_for_shortcuts(told_by):
    """Pitch is content, length alone a shortcut; nobody crashes where nothing tells."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    cells = []
    for label in labels:
        seconds = rng.uniform(0.1, 0.2) + 0.1 * (told_by == "length") * label
        pitch = (440 if told_by != "pitch" else 440 + 440 * label) * rng.uniform(0.95, 1.05)
        time = np.arange(int(4_000 * seconds)) / 4_000
        wave_ = 0.4 * np.sin(2 * np.pi * pitch * time) + rng.normal(0, 0.01, len(time))
        cells.append(encoded(np.clip(wave_, -1, 1), 4_000))
    plain = datasets.Features(
        {"audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
         "label": datasets.Value("int64")}
    )  # fmt: skip
    data = datasets.Dataset.from_dict({"audio": cells, "label": labels.tolist()}, features=plain)
    features = datasets.Features({"audio": datasets.Audio(), "label": datasets.Value("int64")})
    report = ask(data.cast(features), "label-shortcut")
    assert [f.subject for f in found(report, "label-shortcut", "warning")] == (
        ["seconds"] if told_by == "length" else []
    )
    content = measured(report, "LabelShortcuts")["content"]["auc"]
    assert (content > 0.95) == (told_by == "pitch")
