"""Does a saved checkpoint, loaded again, give the same outputs?

A checkpoint can be complete to the eye and not be the model: a head that no adapter's file holds
is drawn anew at every load, weights that were untied in memory are tied again by the config, a
shard is cut off. Nothing says so until somebody uses it. So it is loaded as its user will load
it, and run on the same rows: against the model as it stands, where these are the weights that
were saved, and else against a second load.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from hf_recipe.core.check import Check, Measurement, Skip, private
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.distributed import from_rank_0, rank
from hf_recipe.instruments.overrides import overrides
from hf_recipe.instruments.reloading import (
    difference_of_outputs,
    hushed,
    is_half,
    lost_tensors,
    same_values,
)
from hf_recipe.instruments.subject import Subject

LIVE, TWICE, FILE = "the model as it stands", "a second load", "the model's tensors"


@dataclass(frozen=True)
class CheckpointReload(Measurement):
    """A checkpoint, loaded again.

    Attributes:
        against: what it was compared with: the model as it stands, a second load under another
            seed (its weights are of another step), or the model's tensors one by one.
        failed_in: "read" (a file), "load" (`from_pretrained`) or "".
        error: type of the exception; text: its message.
        missing: tensors that the model has and the checkpoint lacks; what trains, of adapters.
        differing: tensors that are not what they were in the model.
        tensors: in the model.
        tied: whether the config ties the output layer to the input embedding and the model that
            was saved did not.
        difference: largest difference of the outputs over their mean size; None: not compared.
        half: whether either model computes in half precision.
    """

    against: str
    failed_in: str = ""
    error: str = ""
    text: str = private(default="")
    missing: tuple[str, ...] = ()
    differing: tuple[str, ...] = ()
    tensors: int = 0
    tied: bool = False
    difference: float | None = None
    half: bool = False


def check_checkpoint(
    subject: Subject, path: str | Path | None = None
) -> Iterator[CheckpointReload]:
    """Load a checkpoint again and compare its outputs. Call it quietly; all processes call it.

    Args:
        path: a folder that was saved; None: the model is saved to a temporary one, as the
            Trainer saves it.

    Raises:
        Skip: there is no Trainer, or the folder's weights are those of another model.
        FileNotFoundError: there is no such folder.
    """
    trainer = subject.trainer
    if trainer is None:
        raise Skip("without the Trainer its way of saving is not known")
    if path is not None:
        if not Path(path).is_dir():
            raise FileNotFoundError(f"check_checkpoint: there is no folder {str(path)!r}")
        if rank() == 0:
            yield _reload(subject, Path(path), same_step(trainer, Path(path)))
        return
    target = Path(from_rank_0(tempfile.mkdtemp(prefix="reload-") if rank() == 0 else ""))
    try:
        with hushed():
            if overrides(trainer, "save_model"):
                trainer.save_model(str(target))
            else:
                trainer.save_model(str(target), _internal_call=True)  # never to the hub
        if rank() == 0:
            yield _reload(subject, target, True)
    finally:
        if rank() == 0:
            shutil.rmtree(target, ignore_errors=True)


def same_step(trainer: Any, path: Path) -> bool | None:
    """Whether `path` holds the weights as they stand; None where it does not say."""
    state = path / "trainer_state.json"
    if str(path) == str(trainer.state.best_model_checkpoint or ""):
        return bool(trainer.args.load_best_model_at_end) or None
    if not state.is_file():
        return None
    saved = json.loads(state.read_text(encoding="utf-8")).get("global_step")
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
        return False  # another one was loaded at the end
    return bool(saved == trainer.state.global_step)


# ---------------------------------------------------------------- loading


def _reload(subject: Subject, path: Path, current: bool | None) -> CheckpointReload:
    found = CheckpointReload(LIVE, half=is_half(subject.model))
    try:
        stored = _stored(path)
    except (OSError, SafetensorError, ValueError) as error:
        return _failed(found, "read", error)
    if not stored:
        raise Skip("no safetensors stand in the folder")
    found = replace(found, half=found.half or any(t.dtype in HALF for t in stored.values()))
    with hushed():
        if hasattr(subject.model, "peft_config"):
            return _adapters(subject, stored, found, current)
        if not isinstance(subject.model, PreTrainedModel):
            return _tensors(subject.model, stored, found, current)
        return _pretrained(subject, path, stored, found, current)


HALF = (torch.float16, torch.bfloat16)


def _stored(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the folder's safetensors; shards that the index names must be there."""
    index = next(iter(path.glob("*.safetensors.index.json")), None)
    if index is not None:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        lacking = sorted(name for name in shards if not (path / name).is_file())
        if lacking:
            raise FileNotFoundError(f"shards that the index names are not there: {lacking}")
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        stored.update(load_file(file))
    return stored


def _failed(found: CheckpointReload, stage: str, error: BaseException) -> CheckpointReload:
    return replace(found, failed_in=stage, error=type(error).__name__, text=str(error)[:500])


def _pretrained(
    subject: Subject,
    path: Path,
    stored: Mapping[str, torch.Tensor],
    found: CheckpointReload,
    current: bool | None,
) -> CheckpointReload:
    model = subject.model
    try:
        again, missing = _load(type(model), path)
    except Exception as error:  # a constructor with arguments of its own, a shape that differs
        lost = _tensors(model, stored, found, current)
        return _failed(replace(lost, against=FILE), "load", error)
    ours, theirs = model.state_dict(), again.state_dict()
    differing = tuple(
        name for name, t in ours.items() if name in theirs and not same_values(t, theirs[name])
    )
    found = replace(found, missing=missing, tensors=len(ours), differing=differing)
    if not _is_current(model, differing, missing, current):
        torch.manual_seed(torch.initial_seed() + 1)
        second, _ = _load(type(model), path)
        found = replace(found, against=TWICE, differing=())
        return replace(found, difference=_outputs(subject, again, second))
    return replace(
        found, tied=_is_untied(model), difference=_outputs(subject, subject.model, again)
    )


def _load(kind: Any, path: Path) -> tuple[PreTrainedModel, tuple[str, ...]]:
    model, told = kind.from_pretrained(path, local_files_only=True, output_loading_info=True)
    return model, tuple(sorted(told["missing_keys"]))


def _is_current(
    model: nn.Module, differing: tuple[str, ...], missing: tuple[str, ...], current: bool | None
) -> bool:
    """Whether the checkpoint is of the weights as they stand.

    Where nothing says so, it is if any tensor that trains is the same: a step changes them all.
    """
    if current is not None:
        return current
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    comparable = trained - set(missing)
    return not comparable or bool(comparable - set(differing))


def _is_untied(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return False
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    weights = [getattr(end, "weight", None) for end in ends]
    return None not in weights and weights[0] is not weights[1]


def _outputs(subject: Subject, first: nn.Module, second: nn.Module) -> float | None:
    try:
        inputs = subject.batch(size=2).inputs
    except Skip:
        return None
    return difference_of_outputs(subject, first, second, inputs)


def _tensors(
    model: nn.Module,
    stored: Mapping[str, torch.Tensor],
    found: CheckpointReload,
    current: bool | None,
) -> CheckpointReload:
    """Of a module that no class can load: is every tensor in the file?"""
    lost = lost_tensors(model, stored)
    missing = tuple(name for name in lost if name not in stored)
    differing = tuple(name for name in lost if name in stored)
    if not _is_current(model, differing, missing, current):
        differing = ()
    return replace(
        found,
        against=FILE,
        missing=missing,
        differing=differing,
        tensors=len(model.state_dict()),
    )


def _adapters(
    subject: Subject,
    stored: Mapping[str, torch.Tensor],
    found: CheckpointReload,
    current: bool | None,
) -> CheckpointReload:
    """Is everything that trains in the adapters' file?"""
    model = subject.model
    adapter = str(getattr(model, "active_adapter", "default"))
    trained = {
        n: p
        for n, p in model.named_parameters()
        if p.requires_grad and ".original_module." not in n  # its copy is what runs
    }
    kept = {name: stored.get(_adapter_key(name, adapter, stored)) for name in trained}
    missing = tuple(name for name, tensor in kept.items() if tensor is None)
    differing = tuple(
        name
        for name, tensor in kept.items()
        if tensor is not None and not same_values(trained[name], tensor)
    )
    if current is False or (current is None and len(differing) + len(missing) == len(trained)):
        differing = ()  # weights of another step
    return replace(found, against=FILE, missing=missing, differing=differing, tensors=len(trained))


def _adapter_key(name: str, adapter: str, stored: Mapping[str, torch.Tensor]) -> str:
    """The name under which PEFT stores a parameter."""
    short = name.replace(f".modules_to_save.{adapter}.", ".").replace(f".{adapter}.", ".")
    short = short.removesuffix(f".{adapter}")
    forms = (name, short, short.replace(".base_layer.", "."))
    return next((form for form in forms if form in stored), name)


# ---------------------------------------------------------------- judging


def checkpoint_differs(
    reload: CheckpointReload,
    *,
    tolerance: Annotated[
        float, "same weights, same rows: other kernels differ by 1e-6 (float32); our choice"
    ] = 1e-3,
    half_tolerance: Annotated[
        float, "bfloat16 keeps 8 bits, so other kernels differ by some 2**-8 a layer; our choice"
    ] = 0.1,
) -> Iterator[Fault]:
    """A checkpoint cannot be read, lacks tensors, or gives other outputs."""
    evidence: dict[str, Any] = {
        "missing": len(reload.missing),
        "differing": len(reload.differing),
        "tensors": reload.tensors,
        "difference": reload.difference,
    }
    quotes = (reload.text,) if reload.text else ()
    if reload.failed_in == "read":
        yield Fault(
            f"the checkpoint cannot be read: {reload.error}",
            subject="read",
            evidence={"seen": reload.error, "expected": "whole files", **evidence},
            quotes=quotes,
            fix="save it again, to a disk with room; copy checkpoints whole",
        )
    elif reload.missing:
        where = "adapters' file" if reload.against == FILE else "checkpoint"
        yield Fault(
            f"{_names(reload.missing)} of the model not in the {where}: drawn anew at every load",
            subject="missing",
            evidence={"seen": f"{len(reload.missing)} missing", "expected": "none", **evidence},
            fix='LoraConfig(..., modules_to_save=["classifier"])'
            if any("lora" in n or "base_model" in n for n in reload.missing)
            else "save the whole model: trainer.save_model(folder)",
        )
    elif reload.failed_in == "load":
        yield Fault(
            f"from_pretrained cannot load the checkpoint: {reload.error}",
            subject="load",
            severity="warning",  # a constructor of one's own may be called by hand
            evidence={"seen": reload.error, "expected": "a model", **evidence},
            quotes=quotes,
            fix="let __init__ take the config alone, and keep what it needs in the config",
        )
    elif reload.difference is None:
        if reload.differing:
            yield _differs(reload, "", evidence)
    else:
        allowed = half_tolerance if reload.half else tolerance
        if not reload.difference <= allowed:
            share = _share(reload.difference)
            text = f"its outputs differ by {share} of their size from {_whom(reload)}"
            yield _differs(reload, text, evidence)


def _differs(reload: CheckpointReload, text: str, evidence: Mapping[str, Any]) -> Fault:
    parts = [text] if text else []
    if reload.differing:
        parts.append(f"{_names(reload.differing)} other than in the model")
    fix = "load it as it was saved, and compare the tensors by name"
    if reload.tied:
        parts.append("the config ties the embeddings, the model had them apart")
        fix = "model.config.tie_word_embeddings = False  # before saving, or tie them in training"
    return Fault(
        "the checkpoint, loaded again, is another model: " + "; ".join(parts),
        subject="outputs",
        evidence={
            "seen": text or f"{len(reload.differing)} tensors differ",
            "expected": "the same outputs",
            **evidence,
        },
        fix=fix,
    )


def _names(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown})"


def _share(difference: float) -> str:
    return f"{difference:.3g}" if math.isfinite(difference) else "all"


def _whom(reload: CheckpointReload) -> str:
    return "those of a second load" if reload.against == TWICE else "the saved model's"


CHECKPOINT_DIFFERS = Check(
    name="checkpoint-differs",
    stage="complexify",
    severity="error",
    moments=("end",),
    why="What is handed on is the checkpoint, not the model in memory: it must be the same.",
    fix="recipe.check_checkpoint()  # after saving is mended",
    source="peft issues 334 (2023) and 2898 (2025); qlora issue 214 (2023)",
    unsure="Of adapters the file is compared, not the outputs. Python attributes that a forward "
    "reads and no file holds are seen by the outputs alone.",
    judges=(checkpoint_differs,),
    call="recipe.check_checkpoint()",
)
