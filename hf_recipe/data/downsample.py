"""How far can the input be cut or downsampled?

The recipe asks for the smallest input that still tells the label: it pays in speed at once. A
cheap probe learns from ever shorter texts (their head, tail or middle) or ever smaller images.
The sizes are tried from the largest down, each against the best larger one on the same rows;
the first one with a loss that the paired test sees ends the sweep.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from hf_recipe.core.check import Measurement
from hf_recipe.core.exhibit import Answer, Curve, Line, Mark, Table
from hf_recipe.core.finding import Fault
from hf_recipe.data.asked import answered, asking, chance_cell
from hf_recipe.data.cheap import ALPHA, Trial, kernel, linear, paired
from hf_recipe.data.context import no_context, tokens_of, words_trial
from hf_recipe.data.pictures import Pictures, area
from hf_recipe.data.sample import Sample, sample_of
from hf_recipe.data.words import TokenRows, bag
from hf_recipe.instruments.subject import Subject

QUESTION = "How far can the input be cut or downsampled?"
SHORTEST = 4  # tokens
ENDS = {"head": "the first", "tail": "the last", "middle": "the middle"}


@dataclass(frozen=True)
class Size:
    """One size of the input.

    Attributes:
        way: "head", "tail", "middle" (of a text) or "side" (of an image).
        size: tokens, or pixels of the longer side.
        accuracy, error: of the probe, with its standard error.
        p_loss: chance that its loss against the best larger size is an accident.
        most: the largest loss of accuracy that the rows leave open, at 95 %.
    """

    way: str
    size: int
    accuracy: float
    error: float
    p_loss: float
    most: float


@dataclass(frozen=True)
class SizeSweep(Measurement):
    """A probe's accuracy by size of the input.

    Attributes:
        modality: "text" or "image".
        full: tokens of the longest texts (99 %), or pixels of the longer side, that were tried.
        stored: the same of the input as it is stored; larger where images were scaled first.
        accuracy: of the probe at the full size; p_chance: its chance under shuffled labels.
        rows: held-out rows.
        sizes: by way, from the largest down.
        note: how the rows were drawn.
    """

    modality: str
    full: int
    stored: int
    accuracy: float
    p_chance: float
    rows: int
    sizes: tuple[Size, ...]
    note: str = ""


def take_sweep(subject: Subject) -> Iterator[SizeSweep | Answer | Curve | Table]:
    """Sweep the sizes on the training set's sample."""
    sample = sample_of(subject)
    tokens, pictures = tokens_of(subject, sample), sample.inputs.pictures
    if pictures is not None:
        sweep = sweep_images(sample, pictures)
    elif tokens is not None:
        sweep = sweep_text(sample, tokens, words_trial(subject, sample, tokens))
    else:
        raise no_context(sample)
    yield sweep
    yield sweep_table(sweep)
    if sweep.sizes:
        yield sweep_curve(sweep)
    yield Answer(QUESTION, "data", answer(sweep), {"rows": sweep.rows, "sample": sweep.note})


def halvings(full: int, least: int) -> list[int]:
    """Sizes below `full`, down to `least`: by halves, and three quarters of each."""
    sizes, size = [], full
    while size // 2 >= least:
        sizes += [size * 3 // 4, size // 2]
        size //= 2
    return [s for s in dict.fromkeys(sizes) if least <= s < full]


def sweep_text(sample: Sample, tokens: TokenRows, whole: Trial) -> SizeSweep:
    """Ever fewer tokens from the head, the tail and the middle."""
    full = int(np.quantile(tokens.lengths, 0.99))
    sizes: list[Size] = []
    for way in ENDS if whole.p_chance < ALPHA else ():  # nothing to lose: no cut can be judged
        trials = (
            (count, linear("", bag(tokens.keep(count, way)), sample.labels, sample.held))
            for count in [s for s in halvings(full, SHORTEST) if _is_half(s, full)]
        )
        sizes += descend(way, whole, trials)
    return _swept("text", full, full, whole, sizes, sample)


def _is_half(size: int, full: int) -> bool:
    """Texts are tried at halves alone: three sweeps cost three times as much."""
    while full > size:
        full //= 2
    return full == size


def sweep_images(sample: Sample, pictures: Pictures) -> SizeSweep:
    """Ever smaller sides, by area means."""
    height, width = pictures.pixels.shape[1:3]
    full = max(height, width)

    def at(side: int) -> Trial:
        scale = side / full
        small = area(pictures.pixels, max(1, round(height * scale)), max(1, round(width * scale)))
        return kernel("", small, sample.labels, sample.held)

    whole = at(full)
    tried = halvings(full, 2) if whole.p_chance < ALPHA else []
    sizes = descend("side", whole, ((side, at(side)) for side in tried))
    return _swept("image", full, max(pictures.shape), whole, sizes, sample)


def descend(way: str, whole: Trial, trials: Iterator[tuple[int, Trial]]) -> list[Size]:
    """Compare each size with the best larger one; stop at the first loss that is seen."""
    sizes, best = [], whole
    for size, trial in trials:
        pair = paired(best, trial)
        sizes.append(Size(way, size, trial.accuracy, trial.error, pair.p_loss, pair.most_loss))
        if pair.p_loss < ALPHA:
            break
        if trial.accuracy > best.accuracy:
            best = trial
    return sizes


def _swept(
    modality: str, full: int, stored: int, whole: Trial, sizes: list[Size], sample: Sample
) -> SizeSweep:
    return SizeSweep(
        modality=modality,
        full=full,
        stored=stored,
        accuracy=whole.accuracy,
        p_chance=whole.p_chance,
        rows=len(whole.truth),
        sizes=tuple(sizes),
        note=sample.note,
    )


# ---------------------------------------------------------------- verdicts


def smallest(sweep: SizeSweep, alpha: float = ALPHA, resolution: float = 0.05) -> dict[str, Size]:
    """For each way the smallest size before the first loss; only what the test could resolve."""
    found: dict[str, Size] = {}
    lost: set[str] = set()
    for size in sweep.sizes:
        if size.p_loss < alpha or size.most > resolution:
            lost.add(size.way)
        if size.way not in lost:
            found[size.way] = size
    return found


def answer(sweep: SizeSweep, alpha: float = ALPHA, resolution: float = 0.05) -> str:
    """The sweep in one sentence."""
    if not sweep.p_chance < alpha:
        return (
            f"undecided: a cheap probe is at chance with the whole input ({sweep.accuracy:.1%} "
            f"of {sweep.rows:,} held-out rows)"
        )
    if not sweep.sizes:
        return f"undecided: the input is too small to be cut ({sweep.full})"
    found = smallest(sweep, alpha, resolution)
    start = f"at full size a cheap probe tells {sweep.accuracy:.1%} of {sweep.rows:,} held-out rows"
    unseen = [s for s in sweep.sizes if not s.p_loss < alpha and s.most > resolution]
    if not found and unseen:
        most = min(size.most for size in unseen)
        return f"undecided: {start}; a loss of {most:.1%} by the first cut cannot be excluded"
    if not found:
        return f"not at all: {start}, and every cut costs accuracy"
    parts = [f"{_named(size, sweep)} ({size.accuracy:.1%})" for size in found.values()]
    most = max(size.most for size in found.values())
    text = f"{start}; no loss seen down to {', '.join(parts)}; at most {most:.1%} (95 %)"
    if sweep.stored > sweep.full:
        text += f"; the images were scaled from {sweep.stored} to {sweep.full} pixels first"
    return text


def _named(size: Size, sweep: SizeSweep) -> str:
    if sweep.modality == "image":
        return f"{size.size} of {sweep.full} pixels a side"
    return f"{ENDS[size.way]} {size.size} of {sweep.full} tokens"


def sweep_table(sweep: SizeSweep) -> Table:
    """The sizes as a table."""
    rows: list[tuple[str | float | None, ...]] = [
        ("whole", sweep.full, round(sweep.accuracy, 4), 0.0, None, None)
    ]
    rows += [
        (s.way, s.size, round(s.accuracy, 4), round(2 * s.error, 4), chance_cell(s.p_loss),
         round(s.most, 4))
        for s in sweep.sizes
    ]  # fmt: skip
    head = ("kept", "tokens" if sweep.modality == "text" else "side", "accuracy",
            "+- (2 standard errors)", "p of the loss", "largest loss left open")  # fmt: skip
    caption = f"{sweep.rows:,} held-out rows; each size against the best larger one; {sweep.note}"
    return Table("How far can the input be cut?", "data", head, tuple(rows), caption)


def sweep_curve(sweep: SizeSweep) -> Curve:
    """Accuracy by size, with bands of two standard errors."""
    error = math.sqrt(sweep.accuracy * (1 - sweep.accuracy) / max(sweep.rows, 1))
    lines = []
    for way in dict.fromkeys(size.way for size in sweep.sizes):
        whole = Size(way, sweep.full, sweep.accuracy, error, 1.0, 0.0)
        sizes = [*(size for size in reversed(sweep.sizes) if size.way == way), whole]
        lines.append(
            Line(
                way,
                tuple(float(s.size) for s in sizes),
                tuple(s.accuracy for s in sizes),
                tuple(s.accuracy - 2 * s.error for s in sizes),
                tuple(s.accuracy + 2 * s.error for s in sizes),
            )
        )
    unit = "tokens kept" if sweep.modality == "text" else "pixels a side"
    return Curve(
        "Accuracy by size of the input", "data", unit, "accuracy of a cheap probe", tuple(lines),
        (Mark("whole input", sweep.accuracy),), sweep.note, log_x=True,
    )  # fmt: skip


def input_oversized(
    sweep: SizeSweep,
    *,
    alpha: Annotated[
        float, "of one paired test; a sweep ends at the first loss, so tests do not add up"
    ] = ALPHA,
    resolution: Annotated[
        float, "accuracy; a loss beyond it that cannot be excluded leaves the answer open; judged"
    ] = 0.05,
    share: Annotated[
        float, "of the full size: half the tokens or pixels a side is worth a change; judged"
    ] = 0.5,
) -> Iterator[Fault]:
    """A note where half the size or less does as well."""
    if not sweep.p_chance < alpha:
        return
    found = smallest(sweep, alpha, resolution)
    if not found:
        return
    size = min(found.values(), key=lambda s: s.size)
    if size.size > share * sweep.full:
        return
    yield Fault(
        message=f"{_named(size, sweep)} tell the label as well as all: {size.accuracy:.1%} against "
        f"{sweep.accuracy:.1%} of {sweep.rows:,} held-out rows, by a cheap probe; the loss is at "
        f"most {size.most:.1%} (95 %)",
        subject=sweep.modality,
        evidence={
            "seen": f"{size.accuracy:.1%} at {size.size}",
            "expected": f"{sweep.accuracy:.1%} at {sweep.full}",
            "size": size.size,
            "way": size.way,
            "p_loss": size.p_loss,
            "largest_loss_left_open": size.most,
        },
    )


SWEEP = asking("sweep the input's size", SizeSweep, take_sweep)

INPUT_OVERSIZED = answered(
    "input-oversized",
    input_oversized,
    why="Tokens and pixels that tell nothing cost memory and time in every step.",
    fix="tokenizer(text, truncation=True, max_length=...); image.resize((side, side))",
    source="Karpathy 2019; McNemar 1947, paired test of two classifiers",
    unsure="The probe is a bag of words, or all pixels through one kernel: a stronger model may "
    "use details that it cannot. Tokens are words and marks unless the data holds token ids.",
)
