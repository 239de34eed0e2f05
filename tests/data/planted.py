"""Data sets whose answers are known: what was planted is what the data stage has to say."""

from __future__ import annotations

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

WORDS = np.array([f"word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(200)])


def rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def dataset(texts, labels, **columns) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {"text": list(texts), "label": [int(y) for y in labels], **columns}
    )


def background(rng, rows: int, length: int) -> np.ndarray:
    return rng.choice(WORDS, (rows, length)).astype(object)


def joined(words: np.ndarray) -> list[str]:
    return [" ".join(row) for row in words]


def halves(data: datasets.Dataset, share: float = 0.7) -> dict[str, datasets.Dataset]:
    cut = int(share * len(data))
    return {"train": data.select(range(cut)), "validation": data.select(range(cut, len(data)))}


# ---------------------------------------------------------------- context


def context(truth: str, seed: int, rows: int = 2_000, length: int = 40) -> datasets.Dataset:
    """Label told by a word ("bag"), two neighbours, two words' order, the two ends, or nothing."""
    rng = rng_of(seed)
    y, words = rng.integers(0, 2, rows), background(rng, rows, length)
    for i in range(rows):
        if truth == "bag":
            words[i, rng.integers(length)] = ("good", "poor")[y[i]]
        elif truth == "neighbours":
            at = rng.integers(length - 1)
            words[i, at : at + 2] = ("left", "right") if y[i] else ("right", "left")
        elif truth == "order":
            first, second = sorted(rng.choice(length, 2, replace=False))
            words[i, [first, second]] = ("before", "after") if y[i] else ("after", "before")
    if truth == "ends":
        words[:, 1:-1] = np.where(
            rng.random((rows, length - 2)) < 0.2,
            rng.choice(["yes", "no"], (rows, length - 2)),
            words[:, 1:-1],
        )
        first = rng.integers(0, 2, rows)
        words[:, 0] = np.where(first, "yes", "no")
        words[:, -1] = np.where(first ^ y, "yes", "no")
    return dataset(joined(words), y)


def images(pixels: np.ndarray, labels) -> datasets.Dataset:
    """Arrays (rows, h, w) in 0..255 as PNGs."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    pictures = [Image.fromarray(p) for p in np.clip(pixels, 0, 255).round().astype(np.uint8)]
    return datasets.Dataset.from_dict(
        {"image": pictures, "label": [int(y) for y in labels]}, features=features
    )


def stripes(seed: int, rows: int = 700, side: int = 16) -> datasets.Dataset:
    """Two directions of stripes at a random phase: any patch tells."""
    rng = rng_of(seed)
    y = rng.integers(0, 2, rows)
    ramp = np.arange(side)[None, :] + rng.integers(0, 4, (rows, 1))
    lines = 128 + 60 * np.sign(np.sin(ramp * np.pi / 2 + 0.3))
    down = np.repeat(lines[:, :, None], side, axis=2)
    pixels = np.where(y[:, None, None] == 1, down, down.transpose(0, 2, 1))
    return images(pixels + rng.normal(0, 10, pixels.shape), y)


def blobs(seed: int, rows: int = 700, side: int = 16) -> datasets.Dataset:
    """A blob in the upper or the lower half, never at the border: its place tells."""
    rng = rng_of(seed)
    y = rng.integers(0, 2, rows)
    row = rng.integers(2, 5, rows) + np.where(y, side // 2, 0)
    column = rng.integers(2, side - 5, rows)
    pixels = rng.normal(60, 10, (rows, side, side))
    for i in range(rows):
        pixels[i, row[i] : row[i] + 3, column[i] : column[i] + 3] += 120
    return images(pixels, y)


def digits(seed: int = 0, side: int = 8, noise: float = 0.0, shift=None) -> datasets.Dataset:
    """Handwritten digits in a random order, as images of `side`, with noise; `shift(pixels, y)`."""
    rng = rng_of(seed)
    x, y = load_digits(return_X_y=True)
    order = rng.permutation(len(y))
    pixels, y = x[order].reshape(-1, 8, 8) * 15, y[order]
    pixels = pixels.repeat(side // 8, axis=1).repeat(side // 8, axis=2)
    pixels = pixels + rng.normal(0, noise, pixels.shape) if noise else pixels
    return images(pixels if shift is None else shift(pixels, y, rng), y)


def textures(seed: int, rows: int = 700, side: int = 16) -> datasets.Dataset:
    """Grains of three sizes: patches tell, and so do a file's size and, a little, contrast."""
    rng = rng_of(seed)
    y, pixels = rng.integers(0, 3, rows), rng.normal(size=(rows, side, side))
    for passes in (1, 2):
        some = y >= passes
        for _ in range(passes):
            pixels[some] += sum(np.roll(pixels[some], s, axis) for axis in (1, 2) for s in (-1, 1))
    pixels *= 40 / pixels.std(axis=(1, 2), keepdims=True) * rng.normal(1, 0.1, (rows, 1, 1))
    return images(128 + pixels * (1 + 0.1 * y[:, None, None]), y)


# ---------------------------------------------------------------- size


def evidence(seed: int, where: str, rows: int = 2_000, length: int = 128) -> datasets.Dataset:
    """Six weak words in a quarter of the text: its "head", "tail" or "middle"."""
    rng = rng_of(seed)
    y, words = rng.integers(0, 2, rows), background(rng, rows, length)
    quarter = length // 4
    start = {"head": 0, "tail": length - quarter, "middle": (length - quarter) // 2}[where]
    hints = np.array([[f"pro{i}" for i in "abcd"], [f"con{i}" for i in "abcd"]], dtype=object)
    for i in range(rows):
        at = start + rng.choice(quarter, 6, replace=False)
        side = np.where(rng.random(6) < 0.85, y[i], 1 - y[i])
        words[i, at] = hints[side, rng.integers(0, 4, 6)]
    return dataset(joined(words), y)


# ---------------------------------------------------------------- variation


def varied(seed: int, kind: str, *, tells: bool, rows: int = 2_000) -> datasets.Dataset:
    """Words tell the label in 90 % of the rows; a variation is random, or tells it as well."""
    rng = rng_of(seed)
    y, words = rng.integers(0, 2, rows), background(rng, rows, 20)
    shown = y if tells else rng.integers(0, 2, rows)
    told = np.where(rng.random(rows) < (0.6 if tells else 0.9), y, 1 - y)
    texts = []
    for i in range(rows):
        words[i, rng.integers(0, 10)] = ("pro", "con")[told[i]]
        words[i, 10] = "name 7 cafe"
        text = " ".join(words[i])
        if shown[i]:
            text = {
                "case": lambda t: t.replace("name", "NAME"),
                "accents": lambda t: t.replace("cafe", "café"),
                "white space": lambda t: t.replace(" cafe", "   cafe"),
                "digits": lambda t: t.replace("7", "8"),
            }[kind](text)
        texts.append(text)
    return dataset(texts, y)


def moved(seed: int, rows: int = 1_000, side: int = 20, *, tells: bool) -> datasets.Dataset:
    """A square or a cross on a noisy ground; where it stands is random, or tells the label."""
    rng = rng_of(seed)
    y, pixels = rng.integers(0, 2, rows), rng.normal(80, 4, (rows, side, side))
    place = y if tells else rng.integers(0, 2, rows)
    cross = rng.integers(0, 2, rows) if tells else y
    for i in range(rows):
        top = 2 + 10 * int(place[i])
        if cross[i]:
            pixels[i, top + 2 : top + 4, 7:13] += 60
            pixels[i, top : top + 6, 9:11] += 60
        else:
            pixels[i, top : top + 6, 7:13] += 60
    return images(pixels, y)


def lit(seed: int, kind: str, *, tells: bool) -> datasets.Dataset:
    """Odd and even digits under a change that is random, or that tells the label."""

    def change(pixels, y, rng):
        y = y % 2
        shown = y if tells else rng.integers(0, 2, len(y))
        pixels = 60 + pixels / 255 * 60
        if tells:  # the content itself tells little
            pixels = 60 + (pixels[rng.permutation(len(y))] - 60)
        if kind == "brightness":
            return pixels + 40 * shown[:, None, None]
        if kind == "contrast":
            mean = pixels.mean(axis=(1, 2), keepdims=True)
            return mean + (pixels - mean) * (1 + shown[:, None, None])
        wide = np.full((len(y), 8, 16), 60.0)
        for i in range(len(y)):
            wide[i, :, 7 * shown[i] + 1 : 7 * shown[i] + 9] = pixels[i]
        return wide

    data = digits(seed, shift=change)
    return data.map(lambda row: {"label": row["label"] % 2})


# ---------------------------------------------------------------- tables


def table(seed: int, rows: int = 2_000, width: int = 8, *, signal: bool = True) -> dict:
    """Normal columns; the first three tell the label, with noise."""
    rng = rng_of(seed)
    x = rng.normal(size=(rows, width))
    y = (signal * x[:, :3].sum(axis=1) + rng.normal(size=rows) > 0).astype(int)
    return {**{f"f{j}": x[:, j] for j in range(width)}, "label": y}


def keyed(seed: int, rows: int = 2_000, share: float = 0.8) -> datasets.Dataset:
    """A clean set of texts: a keyword tells the class in `share` of the rows."""
    rng = rng_of(seed)
    y, words = rng.integers(0, 2, rows), background(rng, rows, 30)
    lengths = rng.integers(15, 31, rows)
    for i in np.flatnonzero(rng.random(rows) < share):
        words[i, rng.integers(lengths[i])] = ("good", "poor")[y[i]]
    texts = [" ".join(row[:n]) for row, n in zip(words, lengths, strict=True)]
    return dataset(texts, y)
