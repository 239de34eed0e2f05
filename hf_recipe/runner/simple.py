"""The simplest models of the tasks: no place, no order, no context beyond what is told.

They are built as any other network is, and trained by the same Trainer, so that what they reach
is compared row by row.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import (
    QuestionAnsweringModelOutput,
    SemanticSegmenterOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

Tensor = torch.Tensor


class SimpleConfig(PreTrainedConfig):  # type: ignore[misc]
    """A linear model or an MLP over pixels, numbers or averaged words."""

    model_type = "hf_recipe_simple"

    def __init__(
        self,
        kind: str = "numbers",
        size: int = 1,
        width: int = 0,
        depth: int = 1,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.kind, self.size, self.width = kind, size, width
        self.depth, self.dropout = depth, dropout


class SimpleModel(PreTrainedModel):  # type: ignore[misc]
    """The simplest model of a row: no place, no order, ``width`` 0: linear."""

    config_class = SimpleConfig
    accepts_loss_kwargs = False

    def __init__(self, config: SimpleConfig) -> None:
        super().__init__(config)
        size = config.size
        self.words = None
        if config.kind == "text":
            size = config.width or 64
            self.words = nn.Embedding(config.size, size, padding_idx=0)
        layers: list[nn.Module] = []
        for _ in range(config.depth if config.width else 0):
            layers += [nn.Linear(size, config.width), nn.GELU(), nn.Dropout(config.dropout)]
            size = config.width
        self.body = nn.Sequential(*layers)
        self.classifier = nn.Linear(size, config.num_labels)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        features: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Logits (rows, classes), and the mean loss where `labels` are given."""
        if self.words is not None and input_ids is not None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            weight = mask.unsqueeze(-1).to(self.words.weight.dtype)
            x = (self.words(input_ids) * weight).sum(1) / weight.sum(1).clamp(min=1)
        elif pixel_values is not None:
            x = pixel_values.flatten(1)
        elif features is not None:
            x = features
        else:
            raise ValueError("SimpleModel got none of pixel_values, input_ids, features")
        logits = self.classifier(self.body(x))
        loss = None
        if labels is not None:
            loss = _loss(self.config.problem_type, logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def _loss(problem: str | None, logits: Tensor, labels: Tensor) -> Tensor:
    if problem == "regression":
        return F.mse_loss(logits.squeeze(-1), labels.float())
    if problem == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels.float())
    return F.cross_entropy(logits, labels)


class _OfTokens(PreTrainedModel):  # type: ignore[misc]
    """Logits of each position out of an embedding of what is seen there."""

    config_class = SimpleConfig
    accepts_loss_kwargs = False

    def __init__(self, config: SimpleConfig) -> None:
        super().__init__(config)
        width = config.width or 64
        self.words = nn.Embedding(config.size, width)
        self.classifier = nn.Linear(width, config.num_labels)
        self.post_init()

    def seen(self, input_ids: Tensor) -> Tensor:
        """What a position knows, (rows, positions, width)."""
        return cast(Tensor, self.words(input_ids))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> TokenClassifierOutput:
        """Logits (rows, positions, classes), and the mean loss where `labels` are given."""
        logits = self.classifier(self.seen(input_ids))
        loss = None if labels is None else self.loss_of(logits, labels)
        return TokenClassifierOutput(loss=loss, logits=logits)

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean over supervised positions."""
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class SimpleForTokenClassification(_OfTokens):
    """A tag out of the word it stands at."""


class SimpleForCausalLM(_OfTokens):
    """The next word out of the one before it: a bigram model of low rank."""

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().loss_of(logits[:, :-1], labels[:, 1:])


class SimpleForMaskedLM(_OfTokens):
    """A word out of the mean of two words on each side (Mikolov et al. 2013)."""

    def seen(self, input_ids: Tensor) -> Tensor:
        words = self.words(input_ids)
        around = torch.zeros_like(words)
        for step in (1, 2):
            around[:, step:] += words[:, :-step]
            around[:, :-step] += words[:, step:]
        return around / 4


class SimpleSeq2Seq(_OfTokens):
    """The next word of the target out of the one before it and the mean of the source's words."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
    ) -> TokenClassifierOutput:
        """Logits (rows, target positions, words), and the mean loss where `labels` are given."""
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("SimpleSeq2Seq needs labels or decoder_input_ids")
            decoder_input_ids = F.pad(labels.clamp(min=0)[:, :-1], (1, 0))
        words = self.words(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        weight = mask.unsqueeze(-1).to(words.dtype)
        source = (words * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
        logits = self.classifier(self.words(decoder_input_ids) + source)
        loss = None if labels is None else self.loss_of(logits, labels)
        return TokenClassifierOutput(loss=loss, logits=logits)


class SimpleForQuestionAnswering(_OfTokens):
    """Whether an answer begins or ends at a word, out of that word alone."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
    ) -> QuestionAnsweringModelOutput:
        """Logits (rows, positions) of the start and of the end, and their mean loss."""
        logits = self.classifier(self.words(input_ids))
        if attention_mask is not None:
            logits = logits.masked_fill(attention_mask.unsqueeze(-1) == 0, -1e4)
        first, last = logits.unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = F.cross_entropy(first, start_positions) + F.cross_entropy(last, end_positions)
            loss = loss / 2
        return QuestionAnsweringModelOutput(loss=loss, start_logits=first, end_logits=last)


class SimpleForMultipleChoice(_OfTokens):
    """A score for each choice, out of the mean of its words and the prompt's."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> TokenClassifierOutput:
        """Logits (rows, choices), and the mean loss where `labels` are given."""
        words = self.words(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        weight = mask.unsqueeze(-1).to(words.dtype)
        mean = (words * weight).sum(2) / weight.sum(2).clamp(min=1)
        logits = self.classifier(mean).squeeze(-1)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return TokenClassifierOutput(loss=loss, logits=logits)


class SimpleForSemanticSegmentation(PreTrainedModel):  # type: ignore[misc]
    """A pixel's class out of its colour."""

    config_class = SimpleConfig
    accepts_loss_kwargs = False

    def __init__(self, config: SimpleConfig) -> None:
        super().__init__(config)
        self.classifier = nn.Conv2d(config.size, config.num_labels, 1)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None
    ) -> SemanticSegmenterOutput:
        """Logits (rows, classes, height, width), and the mean loss where `labels` are given."""
        logits = self.classifier(pixel_values)
        loss = None
        if labels is not None:
            ignored = self.config.semantic_loss_ignore_index
            loss = F.cross_entropy(logits, labels, ignore_index=ignored)
        return SemanticSegmenterOutput(loss=loss, logits=logits)
