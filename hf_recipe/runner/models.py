"""The networks of the main job: the simplest one, small ones from papers' configs, or the user's.

Everything is built fresh from a config unless ``--model_name_or_path`` names a checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig

from hf_recipe.complexify.architectures import Design, ladder
from hf_recipe.regularize.dropout import set_dropout, set_stochastic_depth
from hf_recipe.runner.data import Data
from hf_recipe.runner.feed import Feed
from hf_recipe.runner.options import Options
from hf_recipe.runner.simple import SimpleConfig, SimpleModel
from hf_recipe.runner.usage import UsageError


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
    task, head = data.task, data.task.head(data)
    if size == "simplest":
        return task.simplest(feed, head)
    config = given_config(options)
    if config is not None and depth_drop:
        set_stochastic_depth(config, depth_drop)
    if config is None:
        config = task.config(feed, design_of(data, options, size), dropout, head)
        own = isinstance(config, SimpleConfig)
        model = SimpleModel(config) if own else task.auto(data.kind).from_config(config)
    else:
        model = _given(data, options, config, size, dropout, head)
    # The head's mean over its own micro-batch is the loss: without this, heads that swallow
    # keyword arguments are inflated by the number of processes and of micro-batches.
    model.accepts_loss_kwargs = False
    return model


def design_of(data: Data, options: Options, size: str) -> Design:
    """The rung of the ladder that `size` names; raises UsageError for an unknown architecture."""
    try:
        kind = data.task.ladder(data.kind)
        return ladder(kind, len(data.splits["train"]), options.model.architecture)[size]
    except ValueError as error:
        raise UsageError(f"--architecture: {error}") from None


def _given(
    data: Data, options: Options, config: Any, size: str, dropout: float, head: dict[str, Any]
) -> Any:
    auto = data.task.auto(data.kind)
    for name, value in head.items():
        if name != "num_labels":  # follows from id2label, or stands for a regression's one output
            setattr(config, name, value)
    if "num_labels" in head and "id2label" not in head:
        config.num_labels = head["num_labels"]
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
    model = getattr(transformers, architecture).from_pretrained(path)
    model.accepts_loss_kwargs = False
    return model
