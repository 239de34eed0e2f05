"""Tokens that give the label away: at a fixed place of a text, or one word a class anywhere."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hf_recipe.core.check import private
from hf_recipe.data.cheap import Trial, linear, looked_up, paired
from hf_recipe.data.sample import Sample
from hf_recipe.data.words import TokenRows, bag

ENDS = 8  # places from either end of a text that are looked at
NEARLY = 0.99


@dataclass(frozen=True)
class Giveaway:
    """One feature that tells the label nearly by itself.

    Attributes:
        name: the column, pixel, place ("place 0 from the end") or "one word a class".
        form: "exact" (one value in each class), "copy", "single value", "threshold", "place",
            "name", "added" (a name, and the one place that tells, though everything else together
            tells too), "word" or "line" (a quantity that the label is a straight or rising
            function of).
        accuracy: balanced accuracy on held-out rows; R squared for a quantity.
        rest: the same of everything else together.
        p: chance that the others' shortfall is an accident; 0 for a quantity.
        words: the tokens, where there are any.
    """

    name: str
    form: str
    accuracy: float
    rest: float
    p: float
    words: tuple[str, ...] = private(default=())


def balanced(trial: Trial) -> float:
    """Mean over classes of the share of rows that are told right."""
    classes = np.unique(trial.truth)
    return float(np.mean([trial.right[trial.truth == k].mean() for k in classes]))


def from_tokens(sample: Sample, tokens: TokenRows) -> list[Giveaway]:
    """Places of a text, else words anywhere in it, that tell the class."""
    labels, held, classes = sample.labels, sample.held, sample.classes
    found = []
    for place, codes in places(tokens):
        distinct = np.unique(codes[~held])
        if not 2 <= len(distinct) <= 4 * classes + 2:
            continue
        trial = looked_up(place, np.unique(codes, return_inverse=True)[1], labels, held)
        if balanced(trial) < NEARLY:
            continue
        others = linear("", bag(_without_place(tokens, place)), labels, held)
        inside = np.searchsorted(distinct, codes).clip(0, len(distinct) - 1)
        table = np.bincount(inside * classes + labels, minlength=len(distinct) * classes)
        words = distinct[table.reshape(-1, classes).argmax(axis=0)]
        elsewhere = np.isin(tokens.ids, words)
        again = np.bincount(tokens.owner[elsewhere], minlength=len(tokens)) > 1
        form = "place"
        if named_after(_spelled(tokens, words), sample.names, alone=float(again.mean()) < 0.01):
            form = "name"
        p = paired(trial, others).p_loss
        shown = _spelled(tokens, words)
        found.append(Giveaway(place, form, balanced(trial), balanced(others), p, shown))
    if len(found) == 1 and _added(found[0], tokens):
        found = [replace(found[0], form="added")]
    return found or words_apart(sample, tokens)


def _added(giveaway: Giveaway, tokens: TokenRows) -> bool:
    """Whether the one telling place holds a name although the rest of the rows tells as much.

    Bare ids have no spelling: of them, what ends a row counts, where a label is appended.
    """
    spelled = bool(tokens.vocabulary) or giveaway.name.endswith("from the end")
    return spelled and giveaway.form == "name" and giveaway.rest >= NEARLY


def places(tokens: TokenRows) -> Iterator[tuple[str, npt.NDArray[np.int64]]]:
    """The token at each of the first and last places; -1 where a row is too short."""
    lengths = tokens.lengths
    for at in range(min(ENDS, int(lengths.max(initial=0)))):
        long = lengths > at
        for name, index in (
            (f"place {at} from the start", tokens.offsets[:-1] + at),
            (f"place {at} from the end", tokens.offsets[1:] - 1 - at),
        ):
            codes = np.full(len(tokens), -1, dtype=np.int64)
            codes[long] = tokens.ids[index[long]]
            yield name, codes


def _without_place(tokens: TokenRows, place: str) -> TokenRows:
    """The rows without their first or last few tokens, up to and with `place`."""
    at = int(place.split()[1])
    if place.endswith("start"):
        return tokens.where(tokens.place > at)
    from_end = np.repeat(tokens.lengths, tokens.lengths) - tokens.place
    return tokens.where(from_end > at + 1)


def words_apart(sample: Sample, tokens: TokenRows) -> list[Giveaway]:
    """One word a class that stands in nearly all of its rows and in hardly any other."""
    labels, held, classes = sample.labels, sample.held, sample.classes
    distinct, codes = np.unique(tokens.ids, return_inverse=True)
    cells = np.unique(tokens.owner * len(distinct) + codes)
    rows, codes = cells // len(distinct), cells % len(distinct)
    taught = ~held[rows]
    table = np.bincount(
        codes[taught] * classes + labels[rows[taught]], minlength=len(distinct) * classes
    ).reshape(-1, classes) / np.maximum(np.bincount(labels[~held], minlength=classes), 1)
    telling = np.zeros(len(labels), dtype=np.int64)
    chosen: dict[int, int] = {}
    for k in range(classes):
        lead = table[:, k] - np.delete(table, k, axis=1).max(axis=1)
        best = int(lead.argmax())
        if lead[best] >= NEARLY - 0.01:
            chosen[k] = best
            telling[rows[codes == best]] = k + 1
    if len(chosen) < classes - 1:
        return []
    trial = looked_up("one word a class", telling, labels, held)
    if balanced(trial) < NEARLY:
        return []
    ids = distinct[list(chosen.values())]
    others = linear("", bag(tokens.where(~np.isin(tokens.ids, ids))), labels, held)
    words = _spelled(tokens, ids)
    form = "name" if named_after(words, tuple(sample.names[k] for k in chosen)) else "word"
    p = paired(trial, others).p_loss
    return [Giveaway("one word a class", form, balanced(trial), balanced(others), p, words)]


def named_after(words: Sequence[str], names: Sequence[str], *, alone: bool = True) -> bool:
    """Whether each class's word is its name, or all are one pattern with a number in it.

    Args:
        alone: whether the words hardly stand elsewhere; a pattern that also belongs to other
            words (w0 among w1, w2, ...) is no mark.
    """
    if all(w.lower() == n.lower() for w, n in zip(words, names, strict=True)):
        return True
    patterns = {re.sub(r"\d+", "#", word.lower()) for word in words}
    return alone and len(set(words)) > 1 and len(patterns) == 1 and "#" in patterns.pop()


def _spelled(tokens: TokenRows, ids: npt.NDArray[np.int64]) -> tuple[str, ...]:
    known = tokens.vocabulary
    return tuple(known[i] if known and i >= 0 else str(i) for i in ids.tolist())
