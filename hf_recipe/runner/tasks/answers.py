"""Where in a text the answer to a question stands."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForQuestionAnswering

from hf_recipe.complexify.architectures import Design
from hf_recipe.core.exhibit import Answer, Cell, Table
from hf_recipe.runner import columns
from hf_recipe.runner.columns import Parts
from hf_recipe.runner.feed import Feed, TextFeed
from hf_recipe.runner.simple import SimpleConfig, SimpleForQuestionAnswering
from hf_recipe.runner.tasks.base import PARTS, QUESTION, Read, Task, bert_config
from hf_recipe.runner.usage import UsageError
from hf_recipe.trainer.span_metrics import SpanMatch

if TYPE_CHECKING:
    from hf_recipe.runner.data import Data
    from hf_recipe.runner.options import DataOptions

LONGEST_ANSWER = 30  # tokens


class SpanFeed(TextFeed):
    """Question and context in one row; the answer's first and last token.

    A context that is too long is cut; an answer that is cut away, or that there is none of, stands
    at the first token.
    """

    sizes = ()
    fixed = "a shorter context would cut answers away"

    def texts(self, part: str) -> list[str]:
        rows = self.data.splits[part]
        return [*rows["question"], *rows["context"]]

    def encode(self, part: str, limit: int | None) -> dict[str, Any]:
        encoded = self._pairs(part, limit)
        return {k: encoded[k] for k in encoded if k in self.processing_class.model_input_names}

    def _pairs(self, part: str, limit: int | None) -> Any:
        rows = self.data.splits[part]
        return self.processing_class(
            list(rows["question"]),
            list(rows["context"]),
            truncation="only_second" if limit is not None else False,
            max_length=limit,
        )

    def _tokenizer(self, folder: Any) -> Any:
        tokenizer = super()._tokenizer(folder)
        if not tokenizer.is_fast:
            raise UsageError("--task question-answering needs a fast tokenizer")
        return tokenizer

    def _make(self, part: str) -> datasets.Dataset:
        encoded, rows = self._pairs(part, self.max_length), self.data.splits[part]
        starts, ends = [], []
        for place, (begin, text) in enumerate(zip(rows["start"], rows["answer"], strict=True)):
            first = encoded.char_to_token(place, begin, 1) if text else None
            last = encoded.char_to_token(place, begin + len(text) - 1, 1) if text else None
            whole = first is not None and last is not None
            starts.append(first if whole else 0)
            ends.append(last if whole else 0)
        names = [k for k in encoded if k in self.processing_class.model_input_names]
        return datasets.Dataset.from_dict(
            {**{k: encoded[k] for k in names}, "start_positions": starts, "end_positions": ends}
        )


class QuestionAnswering(Task):
    """The answer's place in the context: `answers` as in SQuAD, or `answer` and `answer_start`."""

    name = "question-answering"
    metric = "f1"
    feeds = {"text": SpanFeed}
    patience = 2.0

    def fits(self, rows: datasets.Dataset, chosen: DataOptions) -> bool:
        names = set(rows.column_names)
        return {"question", "context"} <= names and bool(names & {"answers", "answer"})

    def read(self, parts: Parts, chosen: DataOptions, what: str) -> Read:
        first = parts["train"]
        question = columns.need(first, ("question",), self.name, "questions")
        context = columns.need(first, ("context", "passage"), self.name, "contexts")
        answer = columns.need(first, ("answers", "answer"), self.name, "answers")
        start = columns.find(first, ("answer_start", "start"))
        made = {}
        for name, part in parts.items():
            chosen_ = [question, context, answer, *([start] if start else [])]
            part = columns.selected(part, chosen_, f"{what}, {name}")
            spans = [
                _span(row[answer], row[start] if start else None, row[context], place, what, name)
                for place, row in enumerate(part)
            ]
            made[name] = datasets.Dataset.from_dict(
                {
                    "question": list(map(str, part[question])),
                    "context": list(map(str, part[context])),
                    "answer": [text for text, _ in spans],
                    "start": [begin for _, begin in spans],
                }
            )
        return Read("text", made, ("question", "context"), ("answer", "start"))

    def auto(self, kind: str) -> Any:
        return AutoModelForQuestionAnswering

    def head(self, data: Data) -> dict[str, Any]:
        return {}

    def config(self, feed: Feed, design: Design, dropout: float, head: Mapping[str, Any]) -> Any:
        return bert_config(feed, design, dropout, head)

    def simplest(self, feed: Feed, head: Mapping[str, Any]) -> Any:
        return SimpleForQuestionAnswering(SimpleConfig("text", feed.shape[0], 0, num_labels=2))

    @property
    def condense(self) -> Callable[[Any, Any], Any]:
        def keep(logits: Any, labels: Any) -> tuple[torch.Tensor, torch.Tensor]:
            each = [
                F.cross_entropy(z.float(), y.clamp(0, z.shape[1] - 1), reduction="none")
                for z, y in zip(logits[:2], labels, strict=True)
            ]
            return (each[0] + each[1]) / 2, best_span(*logits[:2])

        return keep

    def row_losses(self, predictions: Any, labels: Any) -> tuple[float, ...]:
        return tuple(float(loss) for loss in np.asarray(predictions[0], dtype=np.float64))

    def metrics_of(self, data: Data) -> Callable[[Any], dict[str, float]]:
        metric = SpanMatch()

        def compute(prediction: Any) -> dict[str, float]:
            true = np.stack([np.asarray(y) for y in prediction.label_ids], axis=1)
            return metric.of(np.asarray(prediction.predictions[1]), true)

        return compute

    def _shares(self, feed: Feed) -> list[np.ndarray[Any, Any]]:
        rows = feed.rows("train")
        counts = [
            np.bincount(rows[name], minlength=feed.max_length) + 0.5  # type: ignore[attr-defined]
            for name in ("start_positions", "end_positions")
        ]
        return [each / each.sum() for each in counts]

    def blind_losses(self, feed: Feed) -> tuple[float, ...]:
        (first, last), rows = self._shares(feed), feed.rows("validation")
        starts, ends = rows["start_positions"], rows["end_positions"]
        return tuple(
            float(-(math.log(first[a]) + math.log(last[b])) / 2)
            for a, b in zip(starts, ends, strict=True)
        )

    def table(self, feed: Feed) -> Table:
        rows: list[tuple[Cell, ...]] = []
        for part in PARTS:
            made = feed.rows(part)
            starts, ends = np.asarray(made["start_positions"]), np.asarray(made["end_positions"])
            lost = int((starts == 0).sum())
            rows.append((part, len(starts), lost, float((ends - starts + 1)[starts > 0].mean())))
        names = ("part", "rows", "without an answer in reach", "tokens of an answer")
        return Table("The three parts", "data", names, tuple(rows))

    def prior(self, feed: Feed) -> Answer:
        entropy = float(np.mean([-(p * np.log(p)).sum() for p in self._shares(feed)]))
        told = f"loss {entropy:.4f}, from where answers mostly stand; {self.uniform(feed)}"
        return Answer(QUESTION, "data", told, {"loss": entropy})

    def uniform(self, feed: Feed) -> str:
        lengths = [len(ids) for ids in feed.rows("train")["input_ids"]]
        even = float(np.mean(np.log(lengths)))
        return f"-log(1/length) = {even:.4f}, in the mean over rows"


def best_span(starts: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """First and last token of the likeliest answer, (rows, 2); at most 30 tokens."""
    length = starts.shape[1]
    both = starts.float()[:, :, None] + ends.float()[:, None, :]
    may = torch.ones(length, length, dtype=torch.bool, device=starts.device)
    may = may.triu() & ~may.triu(LONGEST_ANSWER)
    flat = both.masked_fill(~may, -math.inf).flatten(1).argmax(1)
    return torch.stack([flat // length, flat % length], 1)


def _span(
    answer: Any, start: Any, context: Any, place: int, what: str, part: str
) -> tuple[str, int]:
    """The first answer's text and where it begins; ("", 0) where there is none."""
    if isinstance(answer, Mapping):
        texts, starts = answer["text"], answer["answer_start"]
        text, begin = (str(texts[0]), int(starts[0])) if len(texts) else ("", 0)
    else:
        text = str(answer[0] if isinstance(answer, list) and answer else answer or "")
        begin = int(start) if start is not None else str(context).find(text)
    if text and str(context)[max(begin, 0) : begin + len(text)] != text:
        raise UsageError(
            f"{what}, {part}, row {place}: the answer {text!r} does not stand in its context "
            f"at character {begin}"
        )
    return text, max(begin, 0)
