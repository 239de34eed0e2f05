"""The networks of the main job: the simplest one, small ones from papers' configs, or the user's.

Everything is built fresh from a config unless ``--model_name_or_path`` names a checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_recipe.complexify.architectures import Design, ladder
from hf_recipe.regularize.dropout import set_dropout, set_stochastic_depth
from hf_recipe.runner.data import Data
from hf_recipe.runner.feed import Feed
from hf_recipe.runner.options import Options, UsageError


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
    """The simplest model of a task: no place, no order, ``width`` 0: linear."""

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
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
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
        if labels is not None and self.config.problem_type == "regression":
            loss = F.mse_loss(logits.squeeze(-1), labels.float())
        elif labels is not None:
            loss = F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def given_config(options: Options) -> Any:
    """The config of the user's model, or None where none was named."""
    name = options.model.model_name_or_path or options.model.config_name
    if name is None:
        return None
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        flag = "--model_name_or_path" if options.model.model_name_or_path else "--config_name"
        raise UsageError(f"{flag} {name}: {str(error).splitlines()[0]}") from None


def build(
    data: Data,
    feed: Feed,
    options: Options,
    size: str,
    dropout: float,
    *,
    depth_drop: float = 0.0,
) -> Any:
    """A model for `data`; draw it right after the seed was set.

    Args:
        data: the task; its classes name the outputs.
        feed: knows the inputs' shape.
        options: may name a checkpoint or a config.
        size: "simplest", "student", "base", "large" or "larger".
        dropout: rate of every dropout that the config knows.
        depth_drop: rate at which its deepest residual path is dropped; needs the user's config.
    """
    head = _head(data)
    if size == "simplest":
        return SimpleModel(SimpleConfig(data.kind, _flat(feed), 0, **head))
    config = given_config(options)
    if config is not None and depth_drop:
        set_stochastic_depth(config, depth_drop)
    if config is None:
        model = _from_scratch(data, feed, design_of(data, options, size), dropout, head)
    else:
        model = _given(data, options, config, size, dropout, head)
    # The head's mean over its own micro-batch is the loss: without this, heads that swallow
    # keyword arguments are inflated by the number of processes and of micro-batches.
    model.accepts_loss_kwargs = False
    return model


def _head(data: Data) -> dict[str, Any]:
    if not data.classes:
        return {"num_labels": 1, "problem_type": "regression"}
    names = dict(enumerate(data.classes))
    return {
        "num_labels": len(names),
        "id2label": names,
        "label2id": {name: k for k, name in names.items()},
        "problem_type": "single_label_classification",
    }


def _flat(feed: Feed) -> int:
    size = 1
    for axis in feed.shape:
        size *= axis
    return size


def design_of(data: Data, options: Options, size: str) -> Design:
    """The rung of the ladder that `size` names; raises UsageError for an unknown architecture."""
    try:
        return ladder(data.kind, len(data.splits["train"]), options.model.architecture)[size]
    except ValueError as error:
        raise UsageError(f"--architecture: {error}") from None


def _from_scratch(
    data: Data, feed: Feed, design: Design, dropout: float, head: dict[str, Any]
) -> Any:
    width, depth, heads = design.width, design.depth, design.heads
    if data.kind == "numbers":
        return SimpleModel(SimpleConfig("numbers", feed.shape[0], width, depth, dropout, **head))
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }
    if data.kind == "image":
        channels, side, _ = feed.shape
        config: Any = ViTConfig(
            image_size=side,
            patch_size=4 if side <= 32 else 8,
            num_channels=channels,
            **sizes,
            **rates,
            **head,
        )
        return AutoModelForImageClassification.from_config(config)
    config = BertConfig(
        vocab_size=feed.shape[0],
        max_position_embeddings=max(16, feed.max_length),
        pad_token_id=feed.processing_class.pad_token_id,
        **sizes,
        **rates,
        **head,
    )
    return AutoModelForSequenceClassification.from_config(config)


def _given(
    data: Data, options: Options, config: Any, size: str, dropout: float, head: dict[str, Any]
) -> Any:
    image = data.kind == "image"
    auto = AutoModelForImageClassification if image else AutoModelForSequenceClassification
    for name, value in head.items():
        if name != "num_labels":  # follows from id2label, or stands for a regression's one output
            setattr(config, name, value)
    if "id2label" not in head:
        config.num_labels = 1
    set_dropout(config, dropout)
    depth = getattr(config, "num_hidden_layers", None)
    path = options.model.model_name_or_path
    try:
        if path is not None and size != "student":
            return auto.from_pretrained(path, config=config, ignore_mismatched_sizes=True)
        if depth is not None and size in ("student", "large", "larger"):
            factor = {"student": 0.5, "large": 2, "larger": 4}[size]
            config.num_hidden_layers = max(1, int(depth * factor))
        return auto.from_config(config)
    except (OSError, ValueError) as error:
        raise UsageError(f"the model cannot be built: {str(error).splitlines()[0]}") from None


def load_saved(path: str | Path) -> Any:
    """A model that this job has saved, of whatever kind."""
    config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") == SimpleConfig.model_type:
        return SimpleModel.from_pretrained(path)
    (architecture,) = config["architectures"]
    auto = (
        AutoModelForImageClassification
        if architecture.endswith("ForImageClassification")
        else AutoModelForSequenceClassification
    )
    model = auto.from_pretrained(path)
    model.accepts_loss_kwargs = False
    return model
