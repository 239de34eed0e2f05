"""Do labels that were given to words stand on the tokens of these words?

A word that is split into pieces moves every label behind it by one, unless the labels are moved
too. Nothing raises: the labels are padded to the length of the tokens.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

from hf_recipe.core.check import Check, Located, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.data.masks import shifts_labels
from hf_recipe.data.text_rows import IGNORED, TextRow, of_every_split
from hf_recipe.data.tokenizer import Special, Splitter, special_ids, splitting, tokenizer_of
from hf_recipe.instruments.subject import Subject


@dataclass(frozen=True)
class WordLabels(Measurement):
    """Where labels of single tokens stand.

    Attributes:
        rows: rows looked at.
        stored: rows that the data set holds with a list of labels; shorter: of these, rows with
            fewer labels than ids, which the collator filled up.
        broken: rows with a word in pieces, as the tokenizer marks them; early: of these, rows whose
            labels lie side by side from the start and end before the last words do.
        filled: of the rows with a word in pieces, those whose last labels, as many as there are
            pieces beyond the first of each word, are all one and the same class.
        inner: labelled pieces inside a word; unlike: of these, with another label than mostly goes
            with that of the word's first piece.
        differ: tokens that begin a word, where the word's label and the label at the token's own
            place in the list of words differ; by_word, by_place: which of the two stands there.
        examples: rows whose labels stand in the wrong place.
    """

    rows: int = 0
    stored: int = 0
    shorter: int = 0
    broken: int = 0
    early: int = 0
    filled: int = 0
    inner: int = 0
    unlike: int = 0
    differ: int = 0
    by_word: int = 0
    by_place: int = 0
    examples: tuple[int, ...] = ()


def take_word_labels(subject: Subject) -> Iterator[Located]:
    """Measure every split of a model that labels tokens."""
    config = subject.config
    if (
        shifts_labels(subject.model)
        or "MaskedLM" in type(subject.model).__name__
        or bool(getattr(config, "is_encoder_decoder", False))
    ):
        raise Skip("the labels are tokens themselves, not labels of words")
    tokenizer, special = tokenizer_of(subject), special_ids(subject)
    found = False
    for split, rows in of_every_split(subject):
        labelled = [r for r in rows if r.labels is not None and len(r.labels) == len(r.ids) > 0]
        if len(labelled) >= 2:
            found = True
            yield Located(word_labels(labelled, tokenizer, special), split)
    if not found:
        raise Skip("the labels are not those of single tokens")


def word_labels(rows: Sequence[TextRow], tokenizer: Any, special: Special) -> WordLabels:
    """The counts over rows with a label for every id."""
    counts = {f.name: 0 for f in fields(WordLabels) if f.type == "int"}
    wrong: list[int] = []
    marks = None if tokenizer is None else word_starts(tokenizer)
    ended: defaultdict[int, list[int]] = defaultdict(list)
    after: defaultdict[int, Counter[int]] = defaultdict(Counter)
    for row in rows:
        own = row.integers.get("labels", row.integers.get("label", []))
        shorter = row.stored is not None and 1 < len(own) < len(row.stored)
        split = None if marks is None else _in_pieces(row, tokenizer, marks, special)
        early = None if split is None else _ends_early(row, split)
        if split is not None:
            for label in _filler(row, split):
                ended[label].append(row.number)
            for first, inside in _inside(row, split):
                after[first][inside] += 1
        counts["rows"] += 1
        counts["stored"] += len(own) > 1
        counts["shorter"] += shorter
        counts["broken"] += early is not None
        counts["early"] += bool(early)
        if shorter or early:
            wrong.append(row.number)
    if tokenizer is not None and tokenizer.is_fast:
        with splitting(tokenizer) as splitter:
            seen = _against_words(rows, splitter, special)
        counts |= dict(zip(("differ", "by_word", "by_place"), seen, strict=True))
    filled = max(ended.values(), key=len, default=[])
    counts["filled"] = len(filled)
    counts["inner"] = sum(c.total() for c in after.values())
    counts["unlike"] = counts["inner"] - sum(max(c.values()) for c in after.values())
    return WordLabels(**counts, examples=tuple(dict.fromkeys(wrong or filled))[:20])


def word_starts(tokenizer: Any) -> str | None:
    """How the tokenizer marks pieces: "##" (inside a word), "▁" or "Ġ" (at its beginning)."""
    vocabulary = tokenizer.get_vocab()
    for mark in ("##", "▁", "Ġ"):
        if any(piece.startswith(mark) and piece != mark for piece in vocabulary):
            return mark
    return None


@dataclass(frozen=True)
class _Split:
    """A row's pieces: positions of its own tokens, of those that begin a word, and of those that
    go on with letters or digits where such stood before."""

    own: list[int]
    starts: set[int]
    inside: list[int]


def _in_pieces(row: TextRow, tokenizer: Any, mark: str, special: Special) -> _Split | None:
    """How the row's words are split; None: none of them is, so that nothing can be told."""
    pieces = tokenizer.convert_ids_to_tokens(row.ids)
    inner = [i for i, token in enumerate(row.ids) if token not in special.every]
    if not inner or row.labels is None:
        return None
    starts = {i for i in inner if pieces[i].startswith(mark) != (mark == "##")} | {inner[0]}
    if len(starts) == len(inner):
        return None
    spelt = [pieces[i].removeprefix(mark).isalnum() for i in range(len(pieces))]
    inside = [i for i in inner if i not in starts and spelt[i] and spelt[i - 1]]
    return _Split(inner, starts, inside)


def _filler(row: TextRow, split: _Split) -> set[int]:
    """The one class that all labels behind the number of words hold, if they do."""
    behind = [i for i in split.own if i >= split.own[0] + len(split.starts)]
    classes = {(row.labels or [])[i] for i in behind}
    return classes - {IGNORED} if len(classes) == 1 else set()


def _inside(row: TextRow, split: _Split) -> Iterator[tuple[int, int]]:
    """For each labelled piece inside a word, the label of the word's first piece and its own."""
    labels, first = row.labels or [], split.own[0]
    for i in split.own:
        first = i if i in split.starts else first
        if i in split.inside and IGNORED not in (labels[first], labels[i]):
            yield labels[first], labels[i]


def _ends_early(row: TextRow, split: _Split) -> bool:
    """Whether labels lie side by side and stop before the last words do."""
    inner, starts = split.own, split.starts
    given = [i for i, label in enumerate(row.labels or []) if label != IGNORED]
    if not given or given != list(range(given[0], given[-1] + 1)) or given[0] > inner[0]:
        return False
    on_pieces = any(i in given and i not in starts for i in inner)
    return on_pieces and any(i > given[-1] for i in starts)


def _against_words(
    rows: Sequence[TextRow], splitter: Splitter, special: Special
) -> tuple[int, int, int]:
    """(tokens where word and place disagree, labelled as the word, labelled as the place).

    Of all columns of tags, with and without a shift by the special tokens in front: the one that
    fits a layout by position best. Labels that moved with their words fit none.
    """
    totals: dict[tuple[str, int], list[int]] = {}
    for row in rows:
        for words in row.words.values():
            numbers = _word_numbers(row, words, splitter, special)
            if numbers is None:
                continue
            lead = next(i for i, number in enumerate(numbers) if number >= 0)
            for name, tags in row.integers.items():
                if len(tags) != len(words) or len(words) < 2:
                    continue
                for shift in {0, lead}:
                    total = totals.setdefault((name, shift), [0, 0, 0])
                    for k, value in enumerate(_compared(row.labels or [], numbers, tags, shift)):
                        total[k] += value
    best = max(totals.values(), key=lambda t: (t[2] / max(t[0], 1), t[0]), default=[0, 0, 0])
    return best[0], best[1], best[2]


def _compared(
    labels: Sequence[int], numbers: Sequence[int], tags: Sequence[int], shift: int
) -> tuple[int, int, int]:
    differ = by_word = by_place = 0
    for i, word in enumerate(numbers):
        first = word >= 0 and (i == 0 or numbers[i - 1] != word)
        if not first or not 0 <= i - shift < len(tags) or labels[i] == IGNORED:
            continue
        if tags[word] != tags[i - shift]:
            differ += 1
            by_word += labels[i] == tags[word]
            by_place += labels[i] == tags[i - shift]
    return differ, by_word, by_place


def _word_numbers(
    row: TextRow, words: Sequence[str], splitter: Splitter, special: Special
) -> list[int] | None:
    """The number of the word that each id belongs to, -1 for none; None: other words."""
    lead = next((i for i, token in enumerate(row.ids) if token not in special.every), None)
    if lead is None:
        return None
    for ids, numbers in (splitter.words(words), _joined(words, splitter)):
        there = row.ids[lead : lead + len(ids)]
        kept = len(there)
        while kept and there[kept - 1] in special.every:  # cut: a special id stands at the end
            kept -= 1
        if kept > 1 and there[:kept] == ids[:kept]:
            rest = len(row.ids) - lead - kept
            return [-1] * lead + numbers[:kept] + [-1] * rest
    return None


def _joined(words: Sequence[str], splitter: Splitter) -> tuple[list[int], list[int]]:
    """The ids of the words joined by spaces, and the word of each."""
    encoded = splitter.backend.encode(" ".join(words), add_special_tokens=False)
    owner = [n for n, word in enumerate(words) for _ in range(len(word) + 1)]
    return list(encoded.ids), [
        owner[min(max(begin, end - 1), len(owner) - 1)] for begin, end in encoded.offsets
    ]


# ---------------------------------------------------------------- verdict


def word_labels_misaligned(
    seen: WordLabels,
    *,
    place: Annotated[float, "of tokens that can tell; laid by position all do, else few"] = 0.8,
    share: Annotated[float, "of rows that can tell; labels moved with their words give none"] = 0.5,
    enough: Annotated[int, "tokens or rows that can tell; judged"] = 8,
    unlike: Annotated[
        float, "of pieces inside words: labelled by word none, by characters few; by place 14 %"
    ] = 0.05,
    filled: Annotated[
        float, "of rows that can tell; labelled by word, rows end in any class"
    ] = 0.9,
) -> Iterator[Fault]:
    """Labels that stand at their word's number instead of on their word."""
    by_place = seen.by_place > place * seen.differ and seen.by_word <= (1 - place) * seen.differ
    if seen.differ >= enough and by_place:
        message = (
            f"{seen.by_place:,} of {seen.differ:,} tokens that can tell carry the label of another "
            "word: labels were laid by position, over words that are split"
        )
        told = seen.by_place / seen.differ
    elif seen.rows >= enough and seen.shorter > share * seen.rows:
        message = (
            f"{seen.shorter:,} of {seen.rows:,} rows have fewer labels than tokens: they were "
            "given to words, and are laid over the tokens by position"
        )
        told = seen.shorter / seen.rows
    elif seen.broken >= enough and seen.early > share * seen.broken:
        message = (
            f"in {seen.early:,} of {seen.broken:,} rows with a word in pieces the labels end "
            "before the last words do: they were laid by position"
        )
        told = seen.early / seen.broken
    elif (
        seen.unlike >= max(enough, unlike * seen.inner)
        and seen.broken >= enough
        and seen.filled > filled * seen.broken
    ):
        message = (
            f"{seen.unlike:,} of {seen.inner:,} pieces inside words carry another class than their "
            f"word, and in {seen.filled:,} of {seen.broken:,} rows one class fills the end: labels "
            "were laid by position, over words that are split"
        )
        told = seen.filled / seen.broken
    else:
        return
    yield Fault(
        message=message,
        evidence={
            "seen": f"{told:.1%} by position",
            "expected": "each label on the first token of its word",
            "fraction": told,
        },
        examples=seen.examples,
    )


WORD_LABELS = Probe("compare labels with words", "batch", (WordLabels,), take_word_labels)

WORD_LABELS_MISALIGNED = Check(
    name="word-labels-misaligned",
    stage="data",
    severity="warning",
    moments=("batch",),
    why="Every word in pieces moves the labels behind it to a wrong word; the model learns noise.",
    fix="labels = [-100 if w is None else tags[w] for w in encoding.word_ids(i)]",
    source="Hugging Face course, token classification, 2022",
    judges=(word_labels_misaligned,),
    unsure="Words that the text column holds in another form than the one that was split.",
    explains=("input-ignored", "loss-not-decreasing", "one-batch-not-overfit"),
)
