"""What a generating model is taught to say: where it stops, and where it begins.

A model that sees no end never stops. A model that is trained on its prompts as on its answers
spends its loss on repeating the question.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from hf_recipe.core.check import Check, Located, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.data.masks import shifts_labels
from hf_recipe.data.text_places import Places, text_places
from hf_recipe.data.text_rows import IGNORED, TextRow, is_answer, is_prompt, of_every_split
from hf_recipe.data.tokens import TokenFacts
from hf_recipe.instruments.subject import Subject

MASK = re.compile(
    r"^(completion|assistant|answer|response|output|target|label|labels|loss)s?_?(tokens?_)?masks?$"
)
PROMPT_MASK = re.compile(r"^(prompt|instruction|input|source|question)s?_?(tokens?_)?masks?$")
PROMPT_LENGTH = re.compile(
    r"(prompt|instruction|source|question|query).*(len|length|size|tokens|end)$"
)
PROMPT_IDS = re.compile(r"^(prompt|instruction|source|question|query).*ids$")


@dataclass(frozen=True)
class PromptLabels(Measurement):
    """Whether the prompt, where the data set says which part it is, counts in the loss.

    Attributes:
        rows: rows whose prompt is known.
        told_by: how: "labels", "mask", "length", "ids" or "texts".
        column: the column that tells.
        prompt: positions of prompts; supervised: those that count in the loss.
        answer, answer_supervised: the same of the positions behind them.
        turns: whether the rows are conversations.
    """

    rows: int
    told_by: str
    column: str
    prompt: int
    supervised: int
    answer: int
    answer_supervised: int
    turns: bool = False


def take_prompts(subject: Subject) -> Iterator[Located]:
    """Look for a prompt in every split of a model that continues text."""
    if not shifts_labels(subject.model):
        raise Skip("the model does not learn to continue a text")
    found = False
    for split, rows in of_every_split(subject):
        seen = prompt_labels(rows, text_places(subject, split))
        if seen is not None:
            found = True
            yield Located(seen, split)
    if not found:
        raise Skip("nothing in the data set tells a prompt from its answer")


def prompt_labels(rows: Sequence[TextRow], places: Places) -> PromptLabels | None:
    """Count over the first source that tells prompts in most rows; None where none does."""
    for told_by, column in _sources(rows):
        parts = {row.number: _by_column(row, told_by, column) for row in rows}
        seen = _counted(rows, parts, told_by, column)
        if seen is not None:
            return seen
    return _by_texts(rows, places)


def _sources(rows: Sequence[TextRow]) -> Iterator[tuple[str, str]]:
    names = dict.fromkeys(name for row in rows for name in row.integers)
    for told_by, pattern in (
        ("mask", MASK),
        ("prompt mask", PROMPT_MASK),
        ("length", PROMPT_LENGTH),
        ("ids", PROMPT_IDS),
    ):
        yield from ((told_by, name) for name in names if pattern.search(name.lower()))
    if "labels" in names:
        yield "labels", "labels"


Parts = tuple[list[int], list[int]]  # positions of a prompt, and of its answer


def _by_column(row: TextRow, told_by: str, column: str) -> Parts | None:
    """The positions of a row's prompt and answer, as an integer column tells them."""
    values, size = row.integers.get(column, []), len(row.ids)
    positions = range(size)
    if told_by in ("mask", "prompt mask"):
        if len(values) != size or set(values) != {0, 1}:
            return None
        prompt = 1 if told_by == "prompt mask" else 0
        return [i for i in positions if values[i] == prompt], [
            i for i in positions if values[i] != prompt
        ]
    if told_by == "labels":
        masked = [i for i in positions if i < len(values) and values[i] == IGNORED]
        if len(values) != size or not masked:
            return None
        return masked, [i for i in positions if values[i] != IGNORED]
    if told_by == "length":
        cut = values[0] if len(values) == 1 else 0
    else:
        lead = next((k for k in (0, 1) if row.ids[k : k + len(values)] == values), None)
        cut = 0 if lead is None else lead + len(values)
    return (list(positions[:cut]), list(positions[cut:])) if 0 < cut < size else None


def _by_texts(rows: Sequence[TextRow], places: Places) -> PromptLabels | None:
    """A text column that is a prompt by its name and stands before one that is an answer."""
    for answer in filter(is_answer, places):
        prompts = [c for c in places if is_prompt(c) and c != answer]
        parts = {row.number: _before(places, prompts, answer, i) for i, row in enumerate(rows)}
        seen = _counted(rows, parts, "texts", " and ".join((*prompts, answer)))
        if seen is not None:
            return seen
    return None


def _before(places: Places, prompts: Sequence[str], answer: str, row: int) -> Parts | None:
    said = places[answer][row]
    if said is None:
        return None
    ahead = [at for at in (places[c][row] for c in prompts) if at is not None]
    ahead = [at for at in ahead if at.end <= said.start + 1 and at.whole > 1]
    if not ahead:
        return None
    positions = [i for at in ahead for i in range(at.start, min(at.end, said.start))]
    return positions, list(range(said.start, said.end))


def _counted(
    rows: Sequence[TextRow],
    parts: Mapping[int, Parts | None],
    told_by: str,
    column: str,
) -> PromptLabels | None:
    known = [
        (row, parts[row.number])
        for row in rows
        if parts[row.number] is not None
        and row.labels is not None and len(row.labels) == len(row.ids)
    ]  # fmt: skip
    if len(known) < max(2, 0.5 * len(rows)):
        return None
    positions, counted = [0, 0], [0, 0]
    for row, both in known:
        for k, part in enumerate(both or ()):
            inner = [i for i in part if i > 0]  # the first token is never predicted
            positions[k] += len(inner)
            counted[k] += sum((row.labels or [])[i] != IGNORED for i in inner)
    return PromptLabels(
        len(known),
        told_by,
        column,
        prompt=positions[0],
        supervised=counted[0],
        answer=positions[1],
        answer_supervised=counted[1],
        turns="." in column,
    )


# ---------------------------------------------------------------- verdicts


def prompt_supervised(
    seen: PromptLabels,
    *,
    share: Annotated[float, "of prompt positions that count; masks that work leave none"] = 0.5,
) -> Iterator[Fault]:
    """Prompts that count in the loss like the answers behind them."""
    if not seen.prompt or not seen.answer_supervised:
        return
    counted = seen.supervised / seen.prompt
    if counted <= share:
        return
    how = {
        "labels": "the data set's own labels leave them out, and the collator writes new ones",
        "texts": f"columns {seen.column} tell them apart",
    }.get(seen.told_by, f"column {seen.column} tells them apart")
    total = seen.supervised + seen.answer_supervised
    yield Fault(
        message=f"{counted:.1%} of {seen.prompt:,} prompt tokens in {seen.rows:,} rows count in "
        f"the loss, {seen.supervised / total:.1%} of all that does; {how}",
        subject=seen.column,
        severity="note" if seen.turns else None,
        evidence={
            "seen": f"{counted:.1%} of the prompt supervised",
            "expected": "labels of -100 on the prompt",
            "fraction": counted,
            "of_the_loss": seen.supervised / total,
        },
    )


def eos_missing(
    seen: TokenFacts,
    *,
    enough: Annotated[int, "rows looked at; judged"] = 4,
    other: Annotated[float, "rows that end with the same other special token"] = 0.5,
) -> Iterator[Fault]:
    """No end token anywhere: not in the sequences, not in the labels."""
    if not seen.generates or not seen.end_known or seen.rows < enough:
        return
    if seen.ends or seen.ends_labelled or seen.other_end >= other:
        return
    yield Fault(
        message=f"none of {seen.rows:,} rows holds the end token: the model is never taught to "
        "stop",
        evidence={"seen": f"0 of {seen.rows:,} rows", "expected": "one behind every text"},
    )


PROMPTS = Probe("look for prompts", "batch", (PromptLabels,), take_prompts)

PROMPT_SUPERVISED = Check(
    name="prompt-supervised",
    stage="data",
    severity="warning",
    moments=("batch",),
    why="A loss that is mostly the prompt's teaches to write questions, and hides how the answers "
    "fare.",
    fix="labels[:, :prompt_length] = -100",
    source="trl issues 784 and 2187, 2023-2024",
    judges=(prompt_supervised,),
    unsure="Training on the whole text may be meant; conversations get a note alone.",
)

EOS_MISSING = Check(
    name="eos-missing",
    stage="data",
    severity="note",
    moments=("batch",),
    why="A model that never sees its end token in training never writes it.",
    fix="text + tokenizer.eos_token  # before it is split",
    source="transformers issue 22794, 2023",
    judges=(eos_missing,),
    unsure="Pretraining on blocks cut from one long text, where nothing ends.",
)
