"""What the user asks of the main job: flags, a YAML of flags, and one-line answers to mistakes.

The flags are those of `TrainingArguments` and of the Hugging Face example scripts, and a few of
the recipe's own. ``--config file.yaml`` holds the same names; flags win over it.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from hf_recipe import __version__
from hf_recipe.core.finding import SEVERITIES, STAGES, Stage
from hf_recipe.runner.examples import EXAMPLES
from hf_recipe.runner.regularizers import NAMES, USUAL
from hf_recipe.runner.regularizers import chosen as chosen_regularizers
from hf_recipe.runner.tasks import TASKS
from hf_recipe.runner.usage import UsageError as UsageError
from hf_recipe.runner.usage import first_line as _first_line
from hf_recipe.runner.usage import nearest

RENAMED: Mapping[str, str] = {
    "evaluation_strategy": "--eval_strategy",
    "overwrite_output_dir": "nothing: a folder is continued, or begun anew with --restart",
    "tokenizer": "--tokenizer_name",
    "no_cuda": "--use_cpu",
    "use_mps_device": "nothing: the device is found",
    "warmup_ratio": "--warmup_steps with a share below 1, for example --warmup_steps 0.1",
    "group_by_length": "--train_sampling_strategy group_by_length",
    "logging_dir": "the environment variable TENSORBOARD_LOGGING_DIR",
    "per_gpu_train_batch_size": "--per_device_train_batch_size",
    "per_gpu_eval_batch_size": "--per_device_eval_batch_size",
    "include_inputs_for_metrics": "--include_for_metrics inputs",
    "push_to_hub_token": "--hub_token",
    "fp16_backend": "nothing: torch's own is used",
    "half_precision_backend": "nothing: torch's own is used",
    "adafactor": "--optim adafactor",
    "save_safetensors": "nothing: safetensors is the only format",
    "torchdynamo": "--torch_compile",
    "max_seq_length": "--max_length",
    "task_name": "--dataset_name and --task",
    "do_train": "nothing: choose with --stages",
    "do_eval": "nothing: choose with --stages",
    "do_predict": "nothing: the test set is read once, at the end",
}


@dataclass
class ModelOptions:
    """The network. With none of these a small one is built from a config."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A pretrained model: hub name or folder."}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "A config to draw a fresh model from: hub name or folder."}
    )
    architecture: str | None = field(
        default=None,
        metadata={"help": "Where a fresh model begins on its ladder, e.g. vit-64x2, bert-mini."},
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "A tokenizer, if it is not the model's own."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Every dropout that the config knows."})


@dataclass
class DataOptions:
    """The data. With none of these the bundled digits are used."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": f"A data set on the hub, or a bundled one: {', '.join(EXAMPLES)}."},
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Its configuration, where it has several."}
    )
    train_file: str | None = field(
        default=None, metadata={"help": "csv, json, jsonl, parquet or txt; or a folder of images."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Without it a part of the training rows is kept apart."}
    )
    test_file: str | None = field(
        default=None, metadata={"help": "Read once, at the end. Without it a part is kept apart."}
    )
    task: str | None = field(
        default=None, metadata={"help": f"{', '.join(TASKS)}. Default: told from the columns."}
    )
    label_column: str | None = field(
        default=None,
        metadata={"help": "Default: label, labels, target, class or y; tags of words."},
    )
    text_column: str | None = field(default=None, metadata={"help": "Default: the longest text."})
    image_column: str | None = field(default=None, metadata={"help": "Default: the images."})
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens per text. Default: what nearly all texts need."}
    )


@dataclass
class RecipeOptions:
    """The recipe's own choices."""

    stages: str = field(
        default=",".join(STAGES), metadata={"help": "Which stages to run, comma separated."}
    )
    keep_going: bool = field(
        default=False, metadata={"help": "Go on to the next stage when a gate is shut."}
    )
    fail_on: str = field(
        default="error",
        metadata={"help": "Exit code 1 from which severity on: error, warning, note or never."},
    )
    target_metric: str | None = field(
        default=None, metadata={"help": "What counts as state of the art: accuracy=0.98."}
    )
    seeds: int = field(
        default=0,
        metadata={"help": "Trainings per comparison, at least 2. Default: 2, and 4 of few rows."},
    )
    regularizers: str = field(
        default="usual",
        metadata={
            "help": "What the regularize stage tries, comma separated: 'usual' ("
            f"{', '.join(USUAL)}), 'all', or names; the others are "
            f"{', '.join(name for name in NAMES if name not in USUAL)}."
        },
    )
    trials: int = field(default=4, metadata={"help": "Trials of the quasi-random search."})
    restart: bool = field(
        default=False, metadata={"help": "Forget what the output folder already holds."}
    )
    trial: bool = field(
        default=False,
        metadata={"help": "Train once with these flags, as a sweep does; no stages."},
    )
    select: str | None = field(
        default=None, metadata={"help": "Checks or stages to run, comma separated."}
    )
    ignore: str | None = field(
        default=None, metadata={"help": "Checks or stages to leave out, comma separated."}
    )
    wandb_project: str = field(
        default="hf_recipe", metadata={"help": "W&B project of the experiments."}
    )
    log_samples: bool = field(
        default=False, metadata={"help": "Rows of the data may leave this machine (W&B)."}
    )


@dataclass
class Options:
    """Everything the main job was asked for.

    Attributes:
        given: names that were set on the command line or in the YAML.
        command: the command line as it was typed.
    """

    model: ModelOptions
    data: DataOptions
    recipe: RecipeOptions
    training: TrainingArguments
    given: frozenset[str]
    command: tuple[str, ...]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The chosen stages, in the recipe's order."""
        chosen = split_list(self.recipe.stages)
        return tuple(stage for stage in STAGES if stage in chosen)

    @property
    def target(self) -> tuple[str, float] | None:
        """The metric's name and the value that counts as state of the art."""
        if self.recipe.target_metric is None:
            return None
        name, _, value = self.recipe.target_metric.partition("=")
        return name.strip(), float(value)


class Parser(HfArgumentParser):  # type: ignore[misc]
    """Raises `UsageError` instead of printing three hundred lines of usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


SECTIONS = (ModelOptions, DataOptions, RecipeOptions, TrainingArguments)


def parse(arguments: Sequence[str]) -> Options:
    """The options that a command line and its ``--config`` ask for.

    Raises:
        UsageError: an unknown or outdated name, or a value that cannot work.
    """
    parser = Parser(
        SECTIONS,
        prog="recipe.py",
        allow_abbrev=False,
        description="The recipe for training neural networks: five stages, a gate after each.",
    )
    parser.add_argument("--config", help="A YAML of these names; flags win over it.")
    known = {a.dest for a in parser._actions} | {"help"}
    flags = _names(arguments)
    _refuse_unknown(flags, known, "--")
    config = _value_of(arguments, "--config")
    from_file = _read_config(config, known) if config else []
    namespace, rest = parser.parse_known_args([*from_file, *arguments])
    if rest:
        raise UsageError(f"not understood: {rest[0]!r} (every value follows its --name)")
    values = vars(namespace)
    if values.get("output_dir") is None:
        values["output_dir"] = "recipe_output"
    parts: list[Any] = []
    for section in SECTIONS:
        names = {f.name for f in dataclasses.fields(section) if f.init}
        try:
            parts.append(section(**{k: v for k, v in values.items() if k in names}))
        except (ValueError, TypeError, ImportError) as error:
            raise UsageError(_first_line(error)) from None
    given = frozenset(flags) | frozenset(_names(from_file))
    model, data, recipe, training = parts
    options = Options(model, data, recipe, training, given - {"config"}, tuple(arguments))
    _validate(options)
    return options


def context_of(options: Options, fingerprint: str) -> str:
    """What all outcomes rest on: data, and the flags that are not the job's own affair.

    Args:
        fingerprint: of the data.
    """
    own = {"output_dir", "stages", "keep_going", "fail_on", "target_metric", "restart"}
    own |= {"wandb_project", "report_to", "trials", "seeds", "config", "run_name", "use_cpu"}
    own |= {"project"}
    shared: dict[str, str] = {}
    for section in (options.model, options.data, options.training):
        shared |= {k: str(v) for k, v in vars(section).items() if k in options.given - own}
    text = json.dumps([__version__, fingerprint, shared], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def split_list(text: str | None) -> tuple[str, ...]:
    """The parts of a comma separated list."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def _validate(options: Options) -> None:
    data, recipe = options.data, options.recipe
    for stage in split_list(recipe.stages):
        _require(stage, STAGES, "--stages")
    try:
        chosen_regularizers(recipe.regularizers)
    except ValueError as error:
        _require(str(error), ("usual", "all", *NAMES), "--regularizers")
    _require(recipe.fail_on, (*SEVERITIES, "never"), "--fail_on")
    if data.task is not None:
        _require(data.task, tuple(TASKS), "--task")
    if "seeds" in options.given and recipe.seeds < 2:
        raise UsageError(
            f"--seeds must be at least 2, or nothing can be decided; got {recipe.seeds}"
        )
    if recipe.trials < 2:
        raise UsageError(f"--trials must be at least 2; got {recipe.trials}")
    if recipe.target_metric is not None:
        name, sign, value = recipe.target_metric.partition("=")
        if not sign or not name or not _is_number(value):
            raise UsageError(
                f"--target_metric must look like accuracy=0.98; got {recipe.target_metric!r}"
            )
    if not 0 <= options.model.dropout < 1:
        raise UsageError(f"--dropout must lie in [0, 1); got {options.model.dropout}")
    if data.dataset_name and data.train_file:
        raise UsageError("--dataset_name and --train_file exclude each other")
    for name in ("validation_file", "test_file"):
        if getattr(data, name) and not data.train_file:
            raise UsageError(f"--{name} needs --train_file")
    if options.model.model_name_or_path and options.model.config_name:
        raise UsageError("--model_name_or_path and --config_name exclude each other")


def _require(value: str, known: Sequence[str], flag: str) -> None:
    if value not in known:
        raise UsageError(f"{flag}: unknown value {value!r}{nearest(value, known)}")


def _refuse_unknown(names: Sequence[str], known: set[str], prefix: str) -> None:
    for name in names:
        if name in known:
            continue
        if name in RENAMED:
            raise UsageError(f"{prefix}{name} is gone since transformers 5; write {RENAMED[name]}")
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {prefix}{near[0]}?" if near else ""
        raise UsageError(f"unknown option {prefix}{name}{hint}")


def _names(arguments: Sequence[str]) -> list[str]:
    return [
        a[2:].partition("=")[0].replace("-", "_")
        if a[2:].partition("=")[0] not in ("", None) and not a.startswith("--no-")
        else a[2:]
        for a in arguments
        if a.startswith("--")
    ]


def _value_of(arguments: Sequence[str], flag: str) -> str | None:
    for place, argument in enumerate(arguments):
        if argument == flag:
            if place + 1 == len(arguments):
                raise UsageError(f"{flag} needs a value")
            return arguments[place + 1]
        if argument.startswith(flag + "="):
            return argument.partition("=")[2]
    return None


def _read_config(path: str, known: set[str]) -> list[str]:
    import yaml

    if not Path(path).is_file():
        raise UsageError(f"--config: no such file: {path}")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config: {path} is not valid YAML: {_first_line(error)}") from None
    if not isinstance(content, Mapping):
        raise UsageError(f"--config: {path} must hold `name: value` lines")
    _refuse_unknown([str(name) for name in content], known, f"{path}: ")
    arguments: list[str] = []
    for name, value in content.items():
        if value is None:
            continue
        arguments.append(f"--{name}")
        if isinstance(value, list):
            joined = ",".join(map(str, value))
            arguments += (
                [joined]
                if name in ("stages", "select", "ignore", "regularizers")
                else map(str, value)
            )
        else:
            arguments.append(json.dumps(value) if isinstance(value, Mapping) else str(value))
    return arguments


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
