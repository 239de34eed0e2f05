"""Are the ids the text's own?

Ids that were made by another tokenizer (an old cache, a changed vocabulary) are legal numbers that
mean something else: nothing raises, and the model reads noise. Only the text beside them tells.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import numpy as np

from hf_recipe.core.check import Check, Located, Measurement, Probe, Skip, private
from hf_recipe.core.finding import Fault
from hf_recipe.data.text_rows import TextRow, of_every_split
from hf_recipe.data.tokenizer import Splitter, special_ids, splitting, tokenizer_of
from hf_recipe.instruments.subject import Subject

LONGEST = 20_000  # characters of a text that are compared
GRAM = 5


@dataclass(frozen=True)
class TextMatch(Measurement):
    """Whether ids decode back to the text beside them.

    Attributes:
        rows: rows with ids and a text; alike: those whose ids are, or decode to, that text.
        kinship: correlation between the length of the text and the number of ids, NaN where
            either does not vary: whether the ids come from this text at all.
        follows: of pairs of rows whose texts begin with the same word, the share that begin with
            the same id; 0 where most rows do so anyway, or there are too few pairs.
        column: the text.
        quotes: what the worst row's ids decode to, and its text.
        examples: rows that do not decode back.
    """

    rows: int
    alike: int
    kinship: float
    column: str
    follows: float = 0.0
    quotes: tuple[str, ...] = private(default=())
    examples: tuple[int, ...] = ()


def take_match(subject: Subject) -> Iterator[Located]:
    """Compare the ids of every split with the texts beside them."""
    tokenizer = tokenizer_of(subject)
    if tokenizer is None:
        raise Skip("there is no tokenizer: give the Trainer a processing_class")
    found = False
    for split, rows in of_every_split(subject):
        with splitting(tokenizer) as splitter:
            match = text_match(rows, splitter, frozenset(special_ids(subject).every))
        if match is not None:
            found = True
            yield Located(match, split)
    if not found:
        raise Skip("no text stands beside the token ids")


def text_match(
    rows: Sequence[TextRow], splitter: Splitter, special: frozenset[int]
) -> TextMatch | None:
    """How many rows' ids are those of a text beside them; None where no row has a text."""
    counted, alike = 0, 0
    sizes: dict[str, list[tuple[int, int]]] = {}
    begins: dict[str, list[tuple[str, list[int]]]] = {}
    odd: list[tuple[int, str, str]] = []
    for row in rows:
        texts = {k: v[:LONGEST] for k, v in row.texts.items()}
        texts |= {k: " ".join(v)[:LONGEST] for k, v in row.words.items()}
        parts = [[i for i in part if i not in special] for part in (row.ids, row.target or [])]
        if not texts or len(parts[0]) < 4 or max(map(len, texts.values())) < 2 * GRAM:
            continue
        counted += 1
        for column, text in texts.items():
            sizes.setdefault(column, []).append((len(text), len(parts[0])))
            begins.setdefault(column, []).append((text.split()[0] if text.split() else "", row.ids))
        if any(_alike(part, text, splitter) for part in parts for text in texts.values()):
            alike += 1
        else:
            said = _decoded(parts[0], splitter)
            odd.append((row.number, said, max(texts.values(), key=len)))
    if not counted:
        return None
    column = max(sizes, key=lambda c: np.nan_to_num(_correlation(sizes[c]), nan=-1.0))
    return TextMatch(
        counted,
        alike,
        _correlation(sizes[column]),
        column,
        max(_follows(pairs) for pairs in begins.values()),
        quotes=tuple(f"{said[:120]!r} for {text[:120]!r}" for _, said, text in odd[:1]),
        examples=tuple(number for number, _, _ in odd[:20]),
    )


def _alike(ids: Sequence[int], text: str, splitter: Splitter) -> bool:
    """Whether ids share their pairs with a text's ids, or decode to its characters."""
    if len(ids) < 2 or len(text) < 2:
        return False
    own = splitter.ids(text)
    if _overlap(list(pairwise(ids)), list(pairwise(own))) >= 0.5:
        return True
    said, meant = _plain(_decoded(ids, splitter)), _plain(text)
    if _overlap(_grams(said), _grams(meant)) >= 0.5:
        return True
    if re.search(r"\s", text.strip()):
        return False
    pieces = [p for p in re.split(r"\s+", _decoded(ids, splitter).lower()) if len(p) >= 3]
    return bool(pieces) and sum(p in meant for p in pieces) >= 0.5 * len(pieces)


def _overlap(one: Sequence[Any], two: Sequence[Any]) -> float:
    """Shared items over the items of the shorter."""
    shared = (Counter(one) & Counter(two)).total()
    return shared / min(len(one), len(two)) if one and two else 0.0


def _decoded(ids: Sequence[int], splitter: Splitter) -> str:
    known = [i for i in ids if 0 <= i < len(splitter.tokenizer)]
    return str(splitter.tokenizer.decode(known, skip_special_tokens=True))


def _plain(text: str) -> str:
    """Without case, accents and white space, which tokenizers may drop."""
    bare = unicodedata.normalize("NFKD", text).casefold()
    return "".join(c for c in bare if not c.isspace() and not unicodedata.combining(c))


def _grams(text: str) -> list[str]:
    return [text[i : i + GRAM] for i in range(len(text) - GRAM + 1)]


def _correlation(pairs: Sequence[tuple[int, int]]) -> float:
    """Between texts' lengths and ids' numbers, rows at the greatest length (cut) left out."""
    most = max(count for _, count in pairs)
    kept = np.array([p for p in pairs if p[1] < most], dtype=float)
    if len(kept) < 10 or kept[:, 0].std() == 0 or kept[:, 1].std() == 0:
        return float("nan")
    return float(np.corrcoef(kept[:, 0], kept[:, 1])[0, 1])


def _follows(rows: Sequence[tuple[str, Sequence[int]]]) -> float:
    """Share of pairs with the same first word that have the same id in front."""
    best = 0.0
    for place in range(3):  # marks may stand before the text
        words = Counter(word for word, _ in rows)
        both = Counter((word, ids[place]) for word, ids in rows)
        every = Counter(ids[place] for _, ids in rows)
        pairs, same, total = (
            sum(n * (n - 1) for n in counts.values()) for counts in (words, both, every)
        )
        if pairs >= 40 and total < 0.5 * len(rows) * (len(rows) - 1):
            best = max(best, same / pairs)
    return best


# ---------------------------------------------------------------- verdict


def stale_tokens(
    seen: TextMatch,
    *,
    share: Annotated[float, "of rows that do not decode back; cleaning leaves fewer"] = 0.2,
    kinship: Annotated[float, "correlation of lengths that shows the ids' source"] = 0.8,
    follows: Annotated[float, "of rows that begin with the same word; unrelated ids vary"] = 0.9,
    enough: Annotated[int, "rows compared; judged"] = 10,
) -> Iterator[Fault]:
    """Ids that follow their text in length, or in other rows, and decode to something else."""
    odd = seen.rows - seen.alike
    if seen.rows < enough or odd <= share * seen.rows:
        return
    related = seen.kinship >= kinship or seen.follows >= follows
    if related or seen.alike > share * seen.rows:
        yield Fault(
            message=f"in {odd:,} of {seen.rows:,} rows the token ids decode to something else than "
            f"the text beside them ({seen.column}): another tokenizer made them",
            subject=seen.column,
            evidence={
                "seen": f"{seen.alike:,} of {seen.rows:,} rows decode back",
                "expected": "all but a few",
                "kinship": seen.kinship,
            },
            examples=seen.examples,
            quotes=seen.quotes,
        )


MATCH = Probe("decode the token ids", "dataset", (TextMatch,), take_match)

STALE_TOKENS = Check(
    name="stale-tokens",
    stage="data",
    severity="warning",
    moments=("dataset",),
    why="Ids of another tokenizer are legal numbers with another meaning: nothing raises, and the "
    "model reads noise.",
    fix="dataset.map(tokenize, batched=True, load_from_cache_file=False)",
    source="LMFlow issue 394, 2023; open-instruct issues 1509 and 1518, 2026",
    judges=(stale_tokens,),
    unsure="Ids made on purpose from another form of the text (phonemes, a translation).",
    explains=("unknown-token", "truncated-example", "eos-missing"),
)
