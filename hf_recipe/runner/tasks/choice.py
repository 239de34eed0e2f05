"""One of several texts that goes with another text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from transformers import AutoModelForMultipleChoice, DataCollatorForMultipleChoice

from hf_recipe.runner import columns
from hf_recipe.runner.columns import Parts
from hf_recipe.runner.feed import Feed, TextFeed
from hf_recipe.runner.simple import SimpleConfig, SimpleForMultipleChoice
from hf_recipe.runner.tasks.base import Looked, Read
from hf_recipe.runner.tasks.rows import Classification
from hf_recipe.runner.usage import UsageError

if TYPE_CHECKING:
    from hf_recipe.runner.data import Data
    from hf_recipe.runner.options import DataOptions

PROMPTS = ("prompt", "question", "context", "sent1", "startphrase", "premise", "text")
CHOICES = ("choices", "options", "endings", "answers")
ANSWERS = ("label", "answer", "correct", "target")
ENDINGS = ("ending", "choice", "option", "answer")


class ChoiceFeed(TextFeed):
    """The prompt with each of its choices; a row is (choices, tokens)."""

    sizes = ()
    fixed = "a prompt and its choices are read as they are"

    def texts(self, part: str) -> list[str]:
        rows = self.data.splits[part]
        return [*rows["prompt"], *(text for row in rows["choices"] for text in row)]

    def encode(self, part: str, limit: int | None) -> dict[str, Any]:
        rows = self.data.splits[part]
        count = len(self.data.classes)
        prompts = [text for text in rows["prompt"] for _ in range(count)]
        choices = [text for row in rows["choices"] for text in row]
        encoded = self.processing_class(
            prompts, choices, truncation=limit is not None, max_length=limit
        )
        names = [k for k in encoded if k in self.processing_class.model_input_names]
        return {
            k: [encoded[k][at : at + count] for at in range(0, len(prompts), count)] for k in names
        }

    def _prepare(self, folder: Any, config: Any) -> None:
        super()._prepare(folder, config)
        rows = [max(map(len, row)) for row in self.encode("train", None)["input_ids"]]
        limit = int(getattr(config, "max_position_embeddings", 512) or 512)
        needed = max(8, int(np.quantile(rows, 0.99)))
        self.max_length = min(self.options.data.max_length or needed, limit)

    def _collator(self) -> Any:
        return DataCollatorForMultipleChoice(self.processing_class)

    def _changes(self) -> tuple[Any, ...]:
        return ()


class MultipleChoice(Classification):
    """Which of as many choices in each row goes with its prompt.

    Columns: a prompt, a list of choices (or `ending0`, `ending1`, ...), and the number of the right
    one, its letter, or its text.
    """

    name = "multiple-choice"
    feeds = {"text": ChoiceFeed}
    patience = 2.0

    def fits(self, rows: datasets.Dataset, chosen: DataOptions) -> bool:
        found = _choices(rows)
        listed = len(found) > 1 or (bool(found) and columns.is_list(rows.features[found[0]]))
        return bool(listed and columns.find(rows, PROMPTS) and columns.find(rows, ANSWERS))

    def read(self, parts: Parts, chosen: DataOptions, what: str) -> Read:
        first = parts["train"]
        asked = chosen.text_column
        prompt = (
            columns.require(first, asked, "--text_column")
            if asked
            else columns.need(first, PROMPTS, self.name, "prompts")
        )
        choices = _choices(first)
        if not choices:
            raise UsageError(
                f"--task {self.name} needs a column of lists ({' or '.join(CHOICES)}) or columns "
                f"ending0, ending1, ...; the columns are {', '.join(first.column_names)}"
            )
        answer = (
            columns.require(first, chosen.label_column, "--label_column")
            if chosen.label_column
            else columns.need(first, ANSWERS, self.name, "answers")
        )
        made = {
            name: _settled(
                columns.selected(part, (prompt, *choices, answer), f"{what}, {name}"),
                prompt, choices, answer, f"{what}, {name}",
            )
            for name, part in parts.items()
        }  # fmt: skip
        counts = {len(row) for part in made.values() for row in part["choices"]}
        if len(counts) != 1 or counts == {1}:
            raise UsageError(f"{what}: every row needs as many choices; there are {sorted(counts)}")
        classes = tuple(f"choice {k}" for k in range(*counts))
        return Read("text", made, ("prompt", "choices"), classes=classes)

    def looked_at(self, data: Data) -> Looked:
        parts = {
            name: datasets.Dataset.from_dict(
                {
                    "text": [f"{r['prompt']} {' / '.join(r['choices'])}" for r in part],
                    "label": part["label"],
                }
            )
            for name, part in data.splits.items()
        }
        return Looked(parts, "label", {"text": "text"})

    def auto(self, kind: str) -> Any:
        return AutoModelForMultipleChoice

    def head(self, data: Data) -> dict[str, Any]:
        return {}

    def simplest(self, feed: Feed, head: Mapping[str, Any]) -> Any:
        return SimpleForMultipleChoice(SimpleConfig("text", feed.shape[0], 0, num_labels=1))


def _choices(rows: datasets.Dataset) -> list[str]:
    """The column of lists, or the numbered columns."""
    listed = columns.find(rows, CHOICES)
    if listed is not None and columns.is_list(rows.features[listed]):
        return [listed]
    for word in ENDINGS:
        found = [n for n in rows.column_names if n.lower().removeprefix(word).strip("_").isdigit()]
        if len(found) > 1:
            return found
    return []


def _settled(
    rows: datasets.Dataset, prompt: str, choices: list[str], answer: str, what: str
) -> datasets.Dataset:
    """The columns "prompt", "choices" and "label"."""
    if len(choices) == 1:
        texts = [[str(text) for text in row] for row in rows[choices[0]]]
    else:
        texts = [list(map(str, row)) for row in zip(*(rows[c] for c in choices), strict=True)]
    labels = []
    for place, (given, row) in enumerate(zip(rows[answer], texts, strict=True)):
        number = _number(given, row)
        if number is None:
            raise UsageError(f"{what}, row {place}: {given!r} is none of its {len(row)} choices")
        labels.append(number)
    return datasets.Dataset.from_dict(
        {"prompt": list(map(str, rows[prompt])), "choices": texts, "label": labels}
    )


def _number(given: Any, row: list[str]) -> int | None:
    """Which choice is meant: by its number from 0, its text, or its letter."""
    if isinstance(given, str) and given in row:
        return row.index(given)
    if isinstance(given, str) and len(given) == 1 and given.isalpha():
        given = "abcdefghijklmnopqrstuvwxyz".find(given.lower())
    try:
        number = int(given)
    except ValueError:
        return None
    return number if 0 <= number < len(row) else None
