"""Which variation is spurious and can be preprocessed out?

Case, accents, white space and digits of a text; brightness, contrast and shift of an image: each
is normalised away, and a cheap probe learns again. Where the paired test sees no loss (and would
have seen a small one) the variation tells nothing about the label; where it sees one, it must stay.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

from hf_recipe.core.check import Measurement, Skip
from hf_recipe.core.exhibit import Answer, Table
from hf_recipe.core.finding import Fault
from hf_recipe.data.asked import answered, asking, chance_cell
from hf_recipe.data.cheap import ALPHA, Trial, kernel, linear, paired
from hf_recipe.data.context import (
    LARGEST,
    at_most,
    no_context,
    pixels_trial,
    tokens_of,
    words_trial,
)
from hf_recipe.data.pictures import Pictures
from hf_recipe.data.sample import Sample, sample_of
from hf_recipe.data.words import TokenRows, bag
from hf_recipe.instruments.subject import Subject

QUESTION = "Which variation is spurious and can be preprocessed out?"
NOISE = 3.0  # deviations of the border's noise that ink must rise above
RARE = 0.01  # share of rows that vary; below it there is nothing to normalise

Images = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Variation:
    """One way in which inputs vary.

    Attributes:
        name: of the variation.
        share: of the rows that normalising it changes.
        accuracy: of the probe without it; p_loss, p_gain: chance that its loss (gain) against
            the raw input is an accident.
        most: the largest loss of accuracy that the rows leave open, at 95 %.
    """

    name: str
    share: float
    accuracy: float
    p_loss: float
    p_gain: float
    most: float


@dataclass(frozen=True)
class VariationTrials(Measurement):
    """A cheap probe with and without each variation.

    Attributes:
        modality: "text" or "image".
        accuracy: of the probe on the raw input; p_chance: its chance under shuffled labels.
        rows: held-out rows.
        variations: those that were tried, rare ones with `share` alone.
        note: how the rows were drawn.
    """

    modality: str
    accuracy: float
    p_chance: float
    rows: int
    variations: tuple[Variation, ...]
    note: str = ""


# ---------------------------------------------------------------- what is normalised away


def bare(word: str) -> str:
    """A word without its accents; empty where it was an accent alone."""
    if word.isascii():
        return word
    parts = unicodedata.normalize("NFKD", word)
    return "".join(part for part in parts if not unicodedata.combining(part))


def _blank(word: str) -> str:
    return "" if word.isspace() else word


def _digits(word: str) -> str:
    return re.sub(r"\d", "0", word)


TEXT: dict[str, Callable[[str], str]] = {
    "case": str.lower,
    "accents": bare,
    "white space": _blank,
    "digits": _digits,
}


MENDS = {
    "case": "text = text.lower()",
    "accents": "text = ''.join(c for c in unicodedata.normalize('NFKD', text) if not "
    "unicodedata.combining(c))",
    "white space": "text = ' '.join(text.split())",
    "digits": "text = re.sub(r'\\d', '0', text)",
    "brightness": "pixels = pixels - pixels.mean()  # of each image",
    "contrast": "pixels = (pixels - pixels.mean()) / pixels.std()  # of each image",
    "shift": "centre each image on what differs from its border",
}


def recoded(tokens: TokenRows, normal: Callable[[str], str]) -> tuple[TokenRows, float]:
    """The tokens after `normal`, and the share of rows that it changed; empty words are dropped."""
    known: dict[str, int] = {}
    new = [normal(word) for word in tokens.vocabulary]
    codes = np.array([known.setdefault(word, len(known)) for word in new], dtype=np.int64)
    moved = np.array([a != b for a, b in zip(new, tokens.vocabulary, strict=True)], dtype=bool)
    there = np.array([word != "" for word in new], dtype=bool)
    changed = np.bincount(tokens.owner, weights=moved[tokens.ids], minlength=len(tokens)) > 0
    kept = tokens.where(there[tokens.ids])
    words = TokenRows(codes[kept.ids], kept.offsets, tuple(known), tokens.cut)
    return words, float(changed.mean())


def level(images: Images) -> Images:
    """Every image with the same mean."""
    moved = images - images.mean(axis=(1, 2, 3), keepdims=True) + images.mean()
    return np.asarray(moved, dtype=np.float32)


def even(images: Images) -> Images:
    """Every image with the same deviation about its mean."""
    mean = images.mean(axis=(1, 2, 3), keepdims=True)
    spread = images.std(axis=(1, 2, 3), keepdims=True)
    scale = np.where(
        spread > 1e-6 * float(images.std()), spread.mean() / np.maximum(spread, 1e-12), 1
    )
    return np.asarray(mean + (images - mean) * scale, dtype=np.float32)


def centred(images: Images) -> Images:
    """Every image rolled so that what differs from its border lies in the middle."""
    height, width = images.shape[1:3]
    gray = images.mean(axis=3)
    border = np.concatenate([gray[:, 0], gray[:, -1], gray[:, :, 0], gray[:, :, -1]], axis=1)
    middle = np.median(border, axis=1, keepdims=True)
    # noise all over the image would pull every centre to the middle
    noise = 1.4826 * np.median(np.abs(border - middle), axis=1)[:, None, None]
    ink = np.maximum(np.abs(gray - middle[:, :, None]) - NOISE * noise, 0)
    total = ink.sum(axis=(1, 2))
    none, total = total == 0, np.maximum(total, 1e-12)
    down = np.where(none, 0, (ink.sum(axis=2) @ np.arange(height)) / total - (height - 1) / 2)
    right = np.where(none, 0, (ink.sum(axis=1) @ np.arange(width)) / total - (width - 1) / 2)
    y = (np.arange(height) + np.rint(down).astype(int)[:, None]) % height
    x = (np.arange(width) + np.rint(right).astype(int)[:, None]) % width
    rows = np.arange(len(images))[:, None, None]
    rolled: Images = images[rows, y[:, :, None], x[:, None, :]]
    return rolled


IMAGE: dict[str, Callable[[Images], Images]] = {
    "brightness": level,
    "contrast": even,
    "shift": centred,
}


# ---------------------------------------------------------------- trials


def take_variation(subject: Subject) -> Iterator[VariationTrials | Answer | Table]:
    """Normalise one variation at a time on the training set's sample."""
    sample = sample_of(subject)
    tokens, pictures = tokens_of(subject, sample), sample.inputs.pictures
    if pictures is not None:
        raw = pixels_trial(subject, sample, pictures)
        compared = image_variations(raw, sample, pictures)
    elif tokens is not None and not tokens.vocabulary:
        raise Skip("the inputs are token ids; give the text to ask about case or white space")
    elif tokens is not None:
        raw = words_trial(subject, sample, tokens)
        compared = text_variations(raw, sample, tokens)
    else:
        raise no_context(sample)
    tried = tuple(compared) if raw.p_chance < ALPHA else ()  # nothing to lose, nothing to say
    trials = VariationTrials(
        modality="text" if pictures is None else "image",
        accuracy=raw.accuracy,
        p_chance=raw.p_chance,
        rows=len(raw.truth),
        variations=tried,
        note=sample.note,
    )
    yield trials
    if tried:
        yield variation_table(trials)
    yield Answer(QUESTION, "data", answer(trials), {"rows": trials.rows, "sample": trials.note})


def text_variations(raw: Trial, sample: Sample, tokens: TokenRows) -> Iterator[Variation]:
    """Case, accents, white space, digits."""
    for name, normal in TEXT.items():
        words, share = recoded(tokens, normal)
        if share < RARE:
            yield Variation(name, share, raw.accuracy, 1.0, 1.0, 0.0)
        else:
            trial = linear(name, bag(words), sample.labels, sample.held)
            yield _compared(name, share, raw, trial)


def image_variations(raw: Trial, sample: Sample, pictures: Pictures) -> Iterator[Variation]:
    """Brightness, contrast, shift."""
    images = at_most(pictures, LARGEST)
    size = float(images.std()) or 1.0
    for name, normal in IMAGE.items():
        new = normal(images)
        moved = np.sqrt(((new - images) ** 2).mean(axis=(1, 2, 3))) > 0.02 * size
        share = float(moved.mean())
        if share < RARE:
            yield Variation(name, share, raw.accuracy, 1.0, 1.0, 0.0)
        else:
            yield _compared(name, share, raw, kernel(name, new, sample.labels, sample.held))


def _compared(name: str, share: float, raw: Trial, trial: Trial) -> Variation:
    pair = paired(raw, trial)
    return Variation(name, share, trial.accuracy, pair.p_loss, pair.p_gain, pair.most_loss)


# ---------------------------------------------------------------- verdicts


def verdict(
    variation: Variation, alpha: float = ALPHA, resolution: float = 0.05, rare: float = RARE
) -> str:
    """ "absent", "tells" (the label), "spurious" or "undecided"."""
    if variation.share < rare:
        return "absent"
    if variation.p_loss < alpha:
        return "tells"
    return "spurious" if variation.most <= resolution else "undecided"


def answer(trials: VariationTrials, alpha: float = ALPHA, resolution: float = 0.05) -> str:
    """All variations in one sentence."""
    if not trials.p_chance < alpha:
        return (
            f"undecided: a cheap probe is at chance on the raw input ({trials.accuracy:.1%} of "
            f"{trials.rows:,} held-out rows)"
        )
    words: dict[str, list[str]] = {}
    for variation in trials.variations:
        word = verdict(variation, alpha, resolution)
        gain = " (a gain)" if word == "spurious" and variation.p_gain < alpha else ""
        words.setdefault(word, []).append(variation.name + gain)
    names = {
        "spurious": "can be normalised out at no loss that shows",
        "tells": "must stay, since it tells the label",
        "undecided": "undecided, a loss cannot be excluded",
        "absent": "hardly varies",
    }
    parts = [f"{', '.join(words[word])}: {text}" for word, text in names.items() if word in words]
    return "; ".join(parts) + (
        f" (a cheap probe, {trials.accuracy:.1%} of {trials.rows:,} held-out rows)"
    )


def variation_table(trials: VariationTrials) -> Table:
    """The variations as a table."""
    rows: list[tuple[Any, ...]] = [
        (v.name, round(v.share, 4), round(v.accuracy, 4), chance_cell(v.p_loss),
         chance_cell(v.p_gain), round(v.most, 4), verdict(v))
        for v in trials.variations
    ]  # fmt: skip
    head = ("normalised", "rows changed", "accuracy without it", "p of the loss",
            "p of the gain", "largest loss left open", "verdict")  # fmt: skip
    caption = f"raw input: {trials.accuracy:.1%} of {trials.rows:,} held-out rows; {trials.note}"
    return Table("What may be normalised away?", "data", head, tuple(rows), caption)


def spurious_variation(
    trials: VariationTrials,
    *,
    alpha: Annotated[
        float, "of one paired test; four variations at most, so under one in twenty in all"
    ] = ALPHA,
    resolution: Annotated[
        float, "accuracy; a loss beyond it that cannot be excluded leaves the answer open; judged"
    ] = 0.05,
    rare: Annotated[float, "share of rows that vary, below which nothing is won; judged"] = RARE,
) -> Iterator[Fault]:
    """A note for each variation that can go at no visible loss."""
    if not trials.p_chance < alpha:
        return
    for variation in trials.variations:
        if verdict(variation, alpha, resolution, rare) != "spurious":
            continue
        yield Fault(
            message=f"{variation.name} can be normalised out: {variation.accuracy:.1%} of "
            f"{trials.rows:,} held-out rows without it, {trials.accuracy:.1%} with it, by a cheap "
            f"probe; the loss is at most {variation.most:.1%} (95 %); it changes "
            f"{variation.share:.1%} of the rows",
            subject=variation.name,
            fix=MENDS.get(variation.name),
            evidence={
                "seen": f"{variation.accuracy:.1%} without it",
                "expected": f"{trials.accuracy:.1%} with it",
                "p_loss": variation.p_loss,
                "p_gain": variation.p_gain,
                "largest_loss_left_open": variation.most,
            },
        )


VARIATION = asking("normalise variation", VariationTrials, take_variation)

SPURIOUS_VARIATION = answered(
    "spurious-variation",
    spurious_variation,
    why="Variation that tells nothing about the label must be learned away from examples, or be "
    "preprocessed out once.",
    fix="dataset = dataset.map(lambda row: {'text': row['text'].lower()})",
    source="Karpathy 2019; McNemar 1947, paired test of two classifiers",
    unsure="By a cheap probe: a pretrained model has seen raw text and may do worse without case. "
    "Normalising is for what this model never learned.",
)
