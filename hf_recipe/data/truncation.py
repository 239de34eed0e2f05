"""What does truncation throw away, and is the answer among it?

A limit on the length cuts in silence. For a classifier that is often meant, and worth a number;
where the model is to say something, the cut end is the answer: it trains on prompts alone.

Where the text and the tokenizer can be reached, every text is split again without a limit and
looked for in its row. Otherwise rows that pile up at one greatest length are the trace.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from hf_recipe.core.check import Check, Located, Measurement, Probe
from hf_recipe.core.finding import Fault, Severity
from hf_recipe.data.masks import shifts_labels
from hf_recipe.data.text_places import Places, seen_in, text_places
from hf_recipe.data.text_rows import (
    IGNORED,
    TextRow,
    is_answer,
    is_prompt,
    of_every_split,
    read_columns,
)
from hf_recipe.data.tokenizer import Special, last_limit, special_ids, tokenizer_of
from hf_recipe.instruments.subject import Subject

ASIDE = "tokenizer(text_target=..., max_length=...)  # raise this limit, that of the labels"
TEMPLATE = 16  # ids that a template may put between a prompt and its answer


@dataclass(frozen=True)
class ColumnCut:
    """What is left of one text column.

    Attributes:
        column: its name; target: whether it is what the model is to say; aside: whether it stands
            in labels of its own, rather than behind its prompt.
        rows: rows whose text was found, whole or in part; cut: of these, in part.
        tokens, lost: tokens of these texts without a limit, and those that are missing.
    """

    column: str
    target: bool = False
    rows: int = 0
    cut: int = 0
    tokens: int = 0
    lost: int = 0
    aside: bool = False


@dataclass(frozen=True)
class Truncation(Measurement):
    """What is missing at the end of a split's rows.

    Attributes:
        rows: rows looked at; longest: most attended ids of a row.
        full: rows of exactly that length; near: rows of 90 % of that length and more, but less.
        lengths: different lengths.
        told: whether the tokenizer was last told to cut at that length.
        closed_full, closed_short: of the full and of the shorter rows, those that end with an end
            token.
        mute_full, mute_short: of the full and of the shorter rows, those in which no label counts.
        collated_short: rows that the collator made shorter than they stand in the data set.
        windows: whether rows are windows over longer texts, so that nothing is lost.
        columns: text columns found in the rows.
        cut_rows: rows in which some text is cut.
        answers, answers_gone: rows with a text to answer with, and those without a token of it.
        answer: the column that these texts stand in.
        examples: rows that are cut, those without their answer first.
    """

    rows: int
    longest: int
    full: int = 0
    near: int = 0
    lengths: int = 1
    told: bool = False
    closed_full: int = 0
    closed_short: int = 0
    mute_full: int = 0
    mute_short: int = 0
    collated_short: int = 0
    windows: bool = False
    columns: tuple[ColumnCut, ...] = ()
    cut_rows: int = 0
    answers: int = 0
    answers_gone: int = 0
    answer: str = ""
    examples: tuple[int, ...] = ()


# ---------------------------------------------------------------- measuring


def take_truncation(subject: Subject) -> Iterator[Located]:
    """Measure every split that holds token ids."""
    tokenizer, special = tokenizer_of(subject), special_ids(subject)
    for split, rows in of_every_split(subject):
        seen = lengths(rows, special, last_limit(tokenizer))
        places = text_places(subject, split)
        if places and _are_windows(subject, split, rows, places):
            seen = replace(seen, windows=True)
        elif places:
            seen = with_texts(seen, rows, places, continues=shifts_labels(subject.model))
        yield Located(seen, split)


def lengths(rows: Sequence[TextRow], special: Special, limit: int | None) -> Truncation:
    """How rows stand against the longest of them."""
    longest = max(len(row.ids) for row in rows)
    full = [row for row in rows if len(row.ids) == longest]
    short = [row for row in rows if len(row.ids) < longest]

    def closed(some: Sequence[TextRow]) -> int:
        return sum(bool(row.ids) and row.ids[-1] in special.ends for row in some)

    def mute(some: Sequence[TextRow]) -> int:
        return sum(row.labels is not None and set(row.labels[1:]) <= {IGNORED} for row in some)

    cut = [row for row in rows if row.stored is not None and len(row.stored) > len(row.ids)]
    return Truncation(
        rows=len(rows),
        longest=longest,
        full=len(full),
        near=sum(len(row.ids) >= 0.9 * longest for row in short),
        lengths=len({len(row.ids) for row in rows}),
        told=limit == longest,
        closed_full=closed(full),
        closed_short=closed(short),
        mute_full=mute(full),
        mute_short=mute(short),
        collated_short=len(cut),
        examples=tuple(row.number for row in (cut or full)[:20]),
    )


def _are_windows(subject: Subject, split: str, rows: Sequence[TextRow], places: Places) -> bool:
    """Whether what a row lacks stands in the row beside it: windows over one long text."""
    dataset = subject.rows(split).dataset
    cut = [
        (row, column)
        for column, found in places.items()
        for row, at in zip(rows, found, strict=True)
        if at is not None and at.is_cut
    ][:16]
    again = 0
    for row, column in cut:
        beside = [n for n in (row.number - 1, row.number + 1) if 0 <= n < len(dataset)]
        columns = read_columns(dataset, beside)
        again += any(columns[n].get(column) == row.texts[column] for n in beside)
    return again > len(cut) / 2


def with_texts(
    seen: Truncation, rows: Sequence[TextRow], places: Places, *, continues: bool
) -> Truncation:
    """`seen` with what is left of each text column, and of the answers."""
    columns = []
    cut: set[int] = set()
    for column, found in places.items():
        there = [(row, at) for row, at in zip(rows, found, strict=True) if at is not None]
        if len(there) < len(rows) / 2:
            continue
        short = [(row, at) for row, at in there if at.is_cut]
        cut |= {row.number for row, _ in short}
        aside = 2 * sum(at.target for _, at in there) > len(there)
        columns.append(
            ColumnCut(
                column,
                aside or (continues and is_answer(column)),
                len(there),
                len(short),
                sum(at.whole for _, at in there),
                sum(at.whole - at.kept for _, at in short),
                aside,
            )
        )
    seen = replace(
        seen, columns=tuple(columns), cut_rows=len(cut), examples=tuple(sorted(cut)[:20])
    )
    return _with_answers(seen, rows, places) if continues else seen


def _with_answers(seen: Truncation, rows: Sequence[TextRow], places: Places) -> Truncation:
    """Count the rows in which nothing is left of the answer, behind a prompt that is there."""
    prompts = [c for c, found in places.items() if is_prompt(c) and seen_in(found) > len(rows) / 2]
    answers = [c for c in places if is_answer(c)]
    if not prompts or not answers:
        return seen
    answer = max(answers, key=lambda c: seen_in(places[c]))
    pile = seen.full >= 0.2 * seen.rows
    gone, there = [], 0
    for i, row in enumerate(rows):
        if not row.texts.get(answer, "").strip():
            continue
        ahead = [at for at in (places[c][i] for c in prompts) if at is not None]
        if not ahead:
            continue
        there += 1
        rest = len(row.ids) - max(at.end for at in ahead)
        at_limit = pile and len(row.ids) == seen.longest
        is_short = at_limit or any(at.is_cut for at in ahead)
        left = _still_labelled(row, max(at.end for at in ahead))
        if places[answer][i] is None and rest <= TEMPLATE and is_short and not left:
            gone.append(row.number)
    examples = (*gone, *(n for n in seen.examples if n not in set(gone)))
    return replace(
        seen, answer=answer, answers=there, answers_gone=len(gone), examples=examples[:20]
    )


def _still_labelled(row: TextRow, end: int) -> bool:
    """Whether labels that leave the prompt out still count behind it."""
    labels = row.labels or []
    return IGNORED in labels[1:end] and any(label != IGNORED for label in labels[end:])


# ---------------------------------------------------------------- verdict


def truncated_example(
    seen: Truncation,
    *,
    few: Annotated[float, "share of rows cut that is not worth a line; judged"] = 0.02,
    gone: Annotated[float, "rows without their answer: most of them is no accident"] = 0.5,
    warn: Annotated[float, "rows without their answer; as labels-masked"] = 0.2,
    lost: Annotated[float, "share of the label side's tokens: more is cut off than is left"] = 0.5,
    ends: Annotated[float, "the same, where most rows lack their end; as for answers gone"] = 0.2,
) -> Iterator[Fault]:
    """A note on what is cut; an error where it is the answer."""
    share = seen.answers_gone / seen.answers if seen.answers else 0.0
    target = max((c for c in seen.columns if c.target), key=lambda c: c.lost, default=None)
    target_lost = target.lost / target.tokens if target is not None and target.tokens else 0.0
    if share > warn:
        yield _fault(
            seen,
            f"nothing is left of the answer (column {seen.answer}) in {seen.answers_gone:,} of "
            f"{seen.answers:,} rows ({share:.1%}): they are cut at {seen.longest:,} tokens",
            "error" if share > gone else "warning",
            seen.answer,
            fraction=share,
        )
    elif target is not None and (
        target_lost >= lost or (target_lost >= ends and target.cut > gone * target.rows)
    ):
        yield _fault(
            seen,
            f"{target_lost:.1%} of the tokens of {target.column}, which the model is to say, are "
            f"cut off, in {target.cut:,} of {target.rows:,} rows",
            "error" if target_lost >= lost else "warning",
            target.column,
            fix=ASIDE if target.aside else None,
            fraction=target_lost,
        )
    elif seen.columns or seen.windows:
        if seen.cut_rows > few * seen.rows:
            yield _cut(seen)
    else:
        yield from _pile(seen, few=few, gone=gone, warn=warn)


def _cut(seen: Truncation) -> Fault:
    short = [c for c in seen.columns if c.cut]
    tokens, missing = sum(c.tokens for c in short), sum(c.lost for c in short)
    names = ", ".join(c.column for c in short)
    return _fault(
        seen,
        f"{seen.cut_rows:,} of {seen.rows:,} rows ({seen.cut_rows / seen.rows:.1%}) are cut: "
        f"{missing / tokens:.1%} of the tokens of {names} are lost; the longest row has "
        f"{seen.longest:,} tokens",
        None,
        names,
        fraction=seen.cut_rows / seen.rows,
        tokens_lost=missing / tokens,
    )


def _pile(seen: Truncation, *, few: float, gone: float, warn: float) -> Iterator[Fault]:
    """Without the texts: rows cut by the collator, or piled up at one greatest length."""
    short = seen.rows - seen.full
    expected = seen.near / max(1.0, 0.1 * seen.longest - 1)
    piled = seen.full >= 5 and seen.full > 5 * (expected + 1) and short >= 0.05 * seen.rows
    opened = seen.closed_short >= 0.9 * short > 0 and seen.closed_full <= 0.1 * seen.full
    cut = max(seen.full if piled or opened or seen.told else 0, seen.collated_short)
    if cut <= few * seen.rows or cut < 2:
        return
    mute = seen.mute_full if seen.mute_short <= 0.05 * short and short else 0
    share = mute / seen.rows
    if seen.collated_short == cut:
        message = f"the collator cuts {cut:,} of {seen.rows:,} rows ({cut / seen.rows:.1%})"
    else:
        message = (
            f"{cut:,} of {seen.rows:,} rows ({cut / seen.rows:.1%}) stand at exactly "
            f"{seen.longest:,} tokens, the greatest length: they look cut"
        )
    severity: Severity | None = None
    if share > warn:
        message += f", and in {mute:,} of them no label is left"
        severity = "error" if share > gone else "warning"
    yield _fault(seen, message, severity, "", fraction=cut / seen.rows)


def _fault(
    seen: Truncation,
    message: str,
    severity: Severity | None,
    subject: str,
    *,
    fix: str | None = None,
    **numbers: float,
) -> Fault:
    return Fault(
        message=message,
        subject=subject,
        severity=severity,
        fix=fix,
        evidence={
            "seen": f"{numbers['fraction']:.1%} cut at {seen.longest} tokens",
            "expected": "the answer within the limit" if severity else "few rows cut",
            "longest": seen.longest,
            **numbers,
        },
        examples=seen.examples,
    )


TRUNCATION = Probe("measure truncation", "batch", (Truncation,), take_truncation)

TRUNCATED_EXAMPLE = Check(
    name="truncated-example",
    stage="data",
    severity="note",
    moments=("batch",),
    why="What is cut is never learnt; where the answer stands at the end, the model trains on "
    "prompts alone.",
    fix="tokenizer.truncation_side = 'left'  # or raise max_length, or cut the prompt alone",
    source="trl issue 6548, 2025; MiniCPM-V issue 662, 2024; LLaMA-Factory PR 3449, 2024",
    judges=(truncated_example,),
    unsure="Cutting may be meant. Without the text only rows that pile up at one length are seen.",
    explains=("labels-masked", "eos-missing"),
)
