"""Which columns never reach the model?

The Trainer removes every column that the model's forward does not name. A forward that takes
``**kwargs``, or a loss that reads a weight out of the batch, gets nothing, without a word.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.data.source import IDENTIFIER
from hf_recipe.instruments.heads import bare
from hf_recipe.instruments.overrides import strings
from hf_recipe.instruments.subject import Subject

WEIGHTS = frozenset(
    {"sample_weight", "sample_weights", "example_weight", "example_weights", "loss_weight",
     "loss_weights", "loss_mask", "instance_weight"}
)  # fmt: skip


@dataclass(frozen=True)
class DroppedColumns(Measurement):
    """Columns of the training set that the Trainer removes.

    Attributes:
        dropped: their names.
        named_by: dropped column -> the code that names it.
        weights: those whose name says that the loss needs them.
        numeric: those that hold numbers, and are no row numbers.
    """

    dropped: tuple[str, ...]
    named_by: dict[str, str]
    weights: tuple[str, ...]
    numeric: tuple[str, ...]


def measure_dropped(subject: Subject) -> Iterator[DroppedColumns]:
    """Compare the columns with what is left, and look for them in the user's code."""
    import datasets

    rows = subject.rows("train")
    if not isinstance(rows.dataset, datasets.Dataset):
        raise Skip("the training data has no columns that the Trainer removes")
    if subject.overridden("train"):
        raise Skip("get_train_dataloader is overridden: what it removes is not known")
    kept = set(rows.read.column_names)
    dropped = [name for name in rows.dataset.column_names if name not in kept]
    code = list(_user_code(subject)) if dropped else []
    features = rows.dataset.features
    yield DroppedColumns(
        dropped=tuple(dropped),
        named_by={
            name: next(where for where, found in code if name in found)
            for name in dropped
            if any(name in found for _, found in code)
        },
        weights=tuple(name for name in dropped if name.lower() in WEIGHTS),
        numeric=tuple(n for n in dropped if _numeric(features[n]) and not IDENTIFIER.search(n)),
    )


def _numeric(feature: Any) -> bool:
    inner = getattr(feature, "feature", feature)
    return "int" in str(getattr(inner, "dtype", "")) or "float" in str(getattr(inner, "dtype", ""))


def _user_code(subject: Subject) -> Iterator[tuple[str, set[str]]]:
    """Where, and which strings and parameters, code that is not the libraries' own names."""
    model, trainer = bare(subject.model), subject.trainer
    places: list[tuple[str, Any]] = [("the model's forward", model.forward)]
    if trainer is not None:
        places += [
            ("compute_loss", trainer.compute_loss),
            ("compute_loss_func", trainer.compute_loss_func),
            ("the collator", trainer.data_collator),
        ]
    for where, function in places:
        if function is not None and not _libraries(function):
            yield where, _strings(function)
    if not _libraries(model.forward) and _takes_anything(model.forward):
        for name, child in model.named_children():
            yield f"{name}'s forward", _parameters(child)


def _plain(function: Any) -> Any:
    if not isinstance(function, (types.FunctionType, types.MethodType)):
        function = getattr(type(function), "__call__", function)  # noqa: B004 (its code is read)
    return inspect.unwrap(getattr(function, "__func__", function))


def _libraries(function: Any) -> bool:
    code = getattr(_plain(function), "__code__", None)
    module = str(getattr(_plain(function), "__module__", ""))
    return code is None or "site-packages" in code.co_filename or module.startswith("hf_recipe.")


def _strings(function: Any) -> set[str]:
    code = getattr(_plain(function), "__code__", None)
    return strings(code) if code is not None else set()


def _takes_anything(function: Any) -> bool:
    kinds = (p.kind for p in inspect.signature(function).parameters.values())
    return inspect.Parameter.VAR_KEYWORD in kinds


def _parameters(module: nn.Module) -> set[str]:
    return set(inspect.signature(module.forward).parameters) - {"input", "x"}


def column_dropped(columns: DroppedColumns) -> Iterator[Fault]:
    """Columns that some code waits for; a note for other columns of numbers."""
    wanted = dict.fromkeys(columns.weights, "its name") | columns.named_by
    for name, where in wanted.items():
        needed = "by its name the loss needs it" if where == "its name" else f"{where} names it"
        yield Fault(
            f"column {name} is removed before batching: the forward has no argument of that name, "
            f"yet {needed}",
            subject=name,
            evidence={"seen": "removed", "expected": "in the batch"},
        )
    others = [name for name in columns.numeric if name not in wanted]
    if others:
        yield Fault(
            f"{len(others)} columns of numbers never reach the model: {', '.join(others[:5])}",
            subject="columns",
            severity="note",
            evidence={"seen": f"{len(others)} removed", "expected": "as meant"},
        )


DROPPED = Probe("compare columns with the forward", "static", (DroppedColumns,), measure_dropped)

COLUMN_DROPPED = Check(
    name="column-dropped",
    stage="data",
    severity="warning",
    moments=("static",),
    why="Columns that the forward does not name are removed in silence: weights are not applied, "
    "inputs are missing.",
    fix="remove_unused_columns=False  # or name the column in forward(...)",
    source="transformers issues 19599 (2022) and 38091 (2025)",
    unsure="Code is searched for the column's name as a string, not run.",
    judges=(column_dropped,),
)
