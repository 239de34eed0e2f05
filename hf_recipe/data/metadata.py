"""What can be said of an input without reading it: its length, its characters, its file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hf_recipe.data.audio import FACTS
from hf_recipe.data.pictures import FEATURES
from hf_recipe.data.sample import Contents
from hf_recipe.data.words import TokenRows

Floats = npt.NDArray[np.float64]

KINDS = ("upper case", "digits", "marks", "beyond ASCII")


def metadata(contents: Contents, tokens: TokenRows | None) -> dict[str, Floats]:
    """Columns of facts about each row, by name; those that never vary are left out.

    Text: characters, words, shares of kinds of characters. Images: size, file, brightness,
    contrast, border. Recordings: length, rate, level. Tables: which cells are missing.
    """
    found: dict[str, Floats] = {}
    if contents.texts is not None:
        found |= characters(contents.texts)
    if tokens is not None:
        found["words" if tokens.vocabulary else "tokens"] = tokens.lengths.astype(np.float64)
    if contents.pictures is not None:
        found |= dict(zip(FEATURES, contents.pictures.facts.T, strict=True))
    if contents.sounds is not None:
        found |= dict(zip(FACTS, contents.sounds.facts.T, strict=True))
    for name, values in contents.columns.items():
        found[f"missing {name}"] = np.isnan(values).astype(np.float64)
    return {name: values for name, values in found.items() if len(np.unique(values)) > 1}


def characters(texts: Sequence[str], longest: int = 4_000) -> dict[str, Floats]:
    """Length of each text, and shares of kinds of characters in its first `longest`."""
    parts = [text[:longest] for text in texts]
    lengths = np.array([len(part) for part in parts])
    raw = "".join(parts).encode("utf-32-le", "surrogatepass")
    codes = np.frombuffer(raw, dtype=np.uint32)
    owner = np.repeat(np.arange(len(texts)), lengths)
    beyond = codes > 127
    upper = (codes >= 65) & (codes <= 90)
    lower = (codes >= 97) & (codes <= 122)
    digits = (codes >= 48) & (codes <= 57)
    white = (codes == 32) | ((codes >= 9) & (codes <= 13))
    flags = (upper, digits, ~(beyond | upper | lower | digits | white), beyond)
    found = {"characters": np.array([len(text) for text in texts], dtype=np.float64)}
    for name, flag in zip(KINDS, flags, strict=True):
        counts = np.bincount(owner, weights=flag, minlength=len(texts))
        found[f"share of {name}"] = counts / np.maximum(lengths, 1)
    return found
