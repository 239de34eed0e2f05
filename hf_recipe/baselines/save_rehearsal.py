"""A rehearsal of saving: the first checkpoint is written before the first step.

The model is saved as the Trainer saves it, next to where the run will, read back, and compared;
then everything is removed. And the disk is asked whether it holds what the run will keep. A large
model is not written, only measured.
"""

from __future__ import annotations

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
from transformers import PreTrainedModel

from hf_recipe.core.check import Check, Measurement, Probe, Skip, private
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.checkpoints import checkpoint_in
from hf_recipe.instruments.heads import bare
from hf_recipe.instruments.overrides import overrides
from hf_recipe.instruments.reloading import (
    difference_of_outputs,
    hushed,
    is_half,
    lost_tensors,
)
from hf_recipe.instruments.subject import Subject

BESIDE = ("optimizer", "scheduler", "scaler", "rng_state", "training_args")  # no weights
WRITTEN_BYTES = 512 * 2**20  # larger models are not written for a rehearsal


@dataclass(frozen=True)
class CheckpointRehearsal(Measurement):
    """A checkpoint written, read back and removed; and the room that the run's will take.

    Attributes:
        checkpoint_bytes: one checkpoint, with the optimizer's state where it is saved.
        kept: checkpoints that stand on the disk at once, at most.
        free_bytes: free where they will stand.
        written: whether a rehearsal was written (not for large models or a saving of one's own).
        failed_in: "write", "read" (the file), "load" (`from_pretrained`) or "".
        error: type of the exception; text: its message.
        lost: names in the model's state that the file lacks or holds differently.
        difference: largest difference of the reloaded model's outputs, over their spread;
            None where they were not compared.
        half: whether the model computes in half precision.
        obstacles: what of the model's state a file cannot hold, in words.
        saves: whether the run saves by itself.
    """

    checkpoint_bytes: int
    kept: int
    free_bytes: int
    written: bool = False
    failed_in: str = ""
    error: str = ""
    text: str = private(default="")
    lost: tuple[str, ...] = ()
    difference: float | None = None
    half: bool = False
    obstacles: tuple[str, ...] = ()
    saves: bool = True


# ---------------------------------------------------------------- the probe


def rehearse_saving(subject: Subject) -> Iterator[CheckpointRehearsal]:
    """Write, read back, compare and remove a checkpoint; ask for the disk's free space."""
    args, trainer = subject.args, subject.trainer
    saves = str(getattr(args.save_strategy, "value", args.save_strategy)) != "no"
    if not args.should_save and saves:
        raise Skip("another process saves")
    if trainer is None:
        raise Skip("without the Trainer its way of saving cannot be rehearsed")
    folder = _nearest_folder(Path(args.output_dir))
    own_way = any(overrides(trainer, n) for n in ("save_model", "_save", "_save_checkpoint"))
    if not saves:
        found = () if own_way else obstacles_of(subject.model)
        if not found:
            raise Skip("save_strategy is 'no': the run saves nothing")
        yield CheckpointRehearsal(0, 0, 0, obstacles=found, saves=False)
        return
    state = [t for t in subject.model.state_dict().values() if isinstance(t, torch.Tensor)]
    size = sum(t.numel() * t.element_size() for t in state)
    room = CheckpointRehearsal(
        checkpoint_bytes=_checkpoint_bytes(subject),
        kept=_checkpoints_kept(subject),
        free_bytes=shutil.disk_usage(folder).free,
        half=is_half(subject.model),
    )
    if own_way or size > WRITTEN_BYTES or size > room.free_bytes or trainer.is_deepspeed_enabled:
        yield room
        return
    yield _written_and_read(subject, folder, room)


def _nearest_folder(path: Path) -> Path:
    """The output folder, or the nearest folder above it that exists already."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.is_dir())


def _checkpoint_bytes(subject: Subject) -> int:
    """Bytes of one checkpoint; of adapters only what is saved of them."""
    adapters = hasattr(subject.model, "peft_config")
    saved = [
        p
        for p in ([*subject.model.parameters(), *subject.model.buffers()])
        if p.requires_grad or not adapters
    ]
    model = sum(p.numel() * p.element_size() for p in saved)
    if subject.args.save_only_model:
        return model
    trained = [p for p in subject.model.parameters() if p.requires_grad]
    copies = _state_copies(subject.optimizer, str(subject.args.optim))
    return model + int(copies * sum(p.numel() * p.element_size() for p in trained))


def _state_copies(optimizer: Any, named: str) -> float:
    """Numbers that the optimizer keeps for each trained one."""
    if "8bit" in named or "8bit" in type(getattr(optimizer, "optimizer", optimizer)).__name__:
        return 0.5
    if optimizer is None:
        return 2.0 if "adam" in named.lower() else 1.0
    defaults = getattr(optimizer, "optimizer", optimizer).defaults
    if "betas" in defaults:
        return 2.0
    return 1.0 if defaults.get("momentum") else 0.0


def _checkpoints_kept(subject: Subject) -> int:
    """How many checkpoints stand on the disk at once."""
    args, plan = subject.args, subject.plan
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    planned = 1
    if plan is not None and strategy == "steps":
        every = args.save_steps
        every = math.ceil(plan.total_steps * every) if every < 1 else int(every)
        planned = max(1, math.ceil(plan.total_steps / every))
    elif plan is not None and strategy == "epoch":
        planned = max(1, math.ceil(plan.total_steps / plan.steps_per_epoch))
    if not args.save_total_limit:
        return planned if strategy != "best" else 1
    # A new one is complete before the oldest is removed, and the best one stays.
    return min(planned, int(args.save_total_limit) + 1 + int(args.load_best_model_at_end))


def _written_and_read(
    subject: Subject, folder: Path, room: CheckpointRehearsal
) -> CheckpointRehearsal:
    room = replace(room, written=True)
    output = Path(subject.args.output_dir).absolute()
    if output.exists() and not output.is_dir():
        return _failed(room, "write", NotADirectoryError(str(output)))
    try:
        target = tempfile.mkdtemp(prefix=".rehearsal-", dir=folder)
    except OSError as error:
        return _failed(room, "write", error)
    try:
        with hushed():
            try:
                subject.trainer._save(target)
            except Exception as error:  # whatever saving raises is what is measured
                found = obstacles_of(subject.model)
                return replace(_failed(room, "write", error), obstacles=found)
            return _read_back(subject, Path(target), room)
    finally:
        shutil.rmtree(target, ignore_errors=True)


def obstacles_of(model: torch.nn.Module) -> tuple[str, ...]:
    """What of a model's state a safetensors file cannot hold; transformers' own models see to it.

    Values that are no tensors, tensors that are not contiguous, and tensors that share memory.
    """
    if isinstance(model, PreTrainedModel) or hasattr(model, "peft_config"):
        return ()
    found: list[str] = []
    places: dict[int, list[tuple[int, int, str]]] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            found.append(f"{name} is no tensor but a {type(value).__name__}")
            continue
        if not value.is_contiguous():
            found.append(f"{name} is not contiguous")
        elif value.numel() and value.device.type != "meta":
            start = value.data_ptr()
            end = start + value.numel() * value.element_size()
            others = places.setdefault(value.untyped_storage().data_ptr(), [])
            shared = next((other for a, b, other in others if start < b and a < end), None)
            if shared is not None:
                found.append(f"{name} shares its memory with {shared}")
            others.append((start, end, name))
    return tuple(found)


def _failed(room: CheckpointRehearsal, stage: str, error: BaseException) -> CheckpointRehearsal:
    return replace(room, failed_in=stage, error=type(error).__name__, text=str(error)[:500])


def _read_back(subject: Subject, target: Path, room: CheckpointRehearsal) -> CheckpointRehearsal:
    try:
        stored: dict[str, torch.Tensor] = {}
        for file in sorted(target.glob("*.safetensors")):
            stored.update(load_file(file))
    except (OSError, SafetensorError) as error:
        return _failed(room, "read", error)
    if not isinstance(subject.model, PreTrainedModel):
        if hasattr(subject.model, "peft_config"):
            return replace(room, lost=_unsaved(subject.model, stored) if stored else ("adapters",))
        return replace(room, lost=lost_tensors(subject.model, stored))
    try:
        again = type(subject.model).from_pretrained(target, local_files_only=True)
    except Exception as error:  # a constructor with arguments of its own, a shape that differs
        return _failed(room, "load", error)
    return replace(room, difference=_compared(subject, again))


def _unsaved(model: Any, stored: dict[str, torch.Tensor]) -> tuple[str, ...]:
    """Trained tensors beside the adapters, which a saved adapter does not hold."""
    adapters = set(model.peft_config)
    return tuple(
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and not adapters & set(name.split("."))
        and name.replace(".base_layer.", ".") not in stored
    )


def look_at_saved(
    trainer: Any, step: int, seen: Mapping[str, Measurement]
) -> CheckpointRehearsal | None:
    """The first checkpoint that a way of saving of the user's own has written; read, not loaded.

    Trained tensors and buffers are looked for by name, or by a longer or shorter one. None where
    it was rehearsed or looked at already, or where weights may stand in another file.
    """
    room = seen.get(CheckpointRehearsal.kind())
    if not isinstance(room, CheckpointRehearsal) or room.written or trainer is None:
        return None
    folder = Path(trainer.args.output_dir) / f"checkpoint-{step}"
    checkpoint = checkpoint_in(folder)
    others = {f.name for end in ("*.bin", "*.pt", "*.pth") for f in folder.glob(end)}
    if checkpoint is None or any(not name.startswith(BESIDE) for name in others):
        return None
    keys = [f".{key}" for key in checkpoint.shapes]
    model = bare(trainer.accelerator.unwrap_model(trainer.model))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    state = {n: t for n, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    held = {
        (t.data_ptr(), t.shape)
        for n, t in state.items()
        if any(k.endswith(f".{n}") or f".{n}".endswith(k) for k in keys)
    }
    frozen = {n for n, p in model.named_parameters()} - trained
    lost = [
        n
        for n, t in state.items()
        if n not in frozen and t.numel() and (t.data_ptr(), t.shape) not in held
    ]
    return replace(room, written=True, lost=tuple(lost))


def _compared(subject: Subject, again: PreTrainedModel) -> float | None:
    try:
        inputs = subject.batch(size=2).inputs
    except Skip:
        return None
    return difference_of_outputs(subject, subject.model, again, inputs)


# ---------------------------------------------------------------- the check


def saving_fails(
    rehearsal: CheckpointRehearsal,
    *,
    tolerance: Annotated[
        float, "same weights, same rows: other kernels differ by 1e-6 (float32); our choice"
    ] = 1e-3,
    half_tolerance: Annotated[
        float, "bfloat16 keeps 8 bits, so other kernels differ by some 2**-8 a layer; our choice"
    ] = 0.1,
) -> Iterator[Fault]:
    """A checkpoint cannot be written or read, comes back different, or finds no room."""
    allowed = half_tolerance if rehearsal.half else tolerance
    if not rehearsal.saves:
        yield from _cannot_be_saved(rehearsal)
        return
    if rehearsal.failed_in:
        does = {
            "write": "cannot be written",
            "read": "is written and cannot be read",
            "load": "is written, and from_pretrained cannot read it back",
        }[rehearsal.failed_in]
        yield Fault(
            f"a checkpoint {does}: {'; '.join([rehearsal.error, *rehearsal.obstacles[:3]])}",
            subject=rehearsal.failed_in,
            # Training and resuming do without from_pretrained; handing the model on does not.
            severity="warning" if rehearsal.failed_in == "load" else "error",
            evidence={"seen": rehearsal.error, "expected": "a checkpoint"},
            quotes=(rehearsal.text,) if rehearsal.text else (),
            fix=_mended(rehearsal.obstacles),
        )
    elif rehearsal.lost:
        yield Fault(
            f"{len(rehearsal.lost)} tensors are not in the checkpoint as they are in the model: "
            f"{', '.join(rehearsal.lost[:5])}",
            subject="read",
            evidence={"seen": f"{len(rehearsal.lost)} lost", "expected": "none lost"},
        )
    elif rehearsal.difference is not None and not rehearsal.difference <= allowed:
        yield Fault(
            "a checkpoint, read back, gives other outputs: they differ by "
            f"{rehearsal.difference:.3g} of their size",
            subject="read",
            evidence={
                "seen": f"{rehearsal.difference:.3g}",
                "expected": f"<= {allowed:g}",
            },
        )
    needed = rehearsal.checkpoint_bytes * rehearsal.kept
    if needed > rehearsal.free_bytes:
        yield Fault(
            f"{rehearsal.kept} checkpoints of {_size(rehearsal.checkpoint_bytes)} need "
            f"{_size(needed)}; {_size(rehearsal.free_bytes)} are free",
            subject="disk",
            evidence={
                "seen": f"{_size(rehearsal.free_bytes)} free",
                "expected": _size(needed),
                "checkpoint_bytes": rehearsal.checkpoint_bytes,
                "kept": rehearsal.kept,
            },
            fix="TrainingArguments(..., save_total_limit=1, save_only_model=True)",
        )


def _cannot_be_saved(rehearsal: CheckpointRehearsal) -> Iterator[Fault]:
    """The run saves nothing: whoever saves at its end is told what will stop them."""
    if rehearsal.obstacles:
        yield Fault(
            "the run itself saves nothing, and trainer.save_model() would fail at its end: "
            f"{'; '.join(rehearsal.obstacles[:3])}",
            subject="write",
            severity="note",
            evidence={"seen": rehearsal.obstacles[0], "expected": "a state that a file can hold"},
            fix=_mended(rehearsal.obstacles),
        )


def _mended(obstacles: tuple[str, ...]) -> str | None:
    """The line that mends the first obstacle."""
    if not obstacles:
        return None
    name = obstacles[0].partition(" ")[0]
    if obstacles[0].endswith("not contiguous"):
        return f"model.{name} = model.{name}.contiguous()  # when it is registered"
    if "shares its memory" in obstacles[0]:
        return f"save {name} once: a PreTrainedModel that names it in _tied_weights_keys, or a copy"
    return f"keep {name} out of the model's state_dict"


def _size(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


REHEARSE_SAVING = Probe(
    name="rehearse a checkpoint",
    moment="probe",
    measures=(CheckpointRehearsal,),
    take=rehearse_saving,
    needs=("unsharded",),
)

SAVE_FAILS = Check(
    name="save-fails",
    stage="baselines",
    severity="error",
    moments=("probe", "run"),
    why="The first checkpoint comes hours in: what stops it then loses all of them.",
    fix="trainer.save_model(folder)  # until it passes",
    source="Trainer._save, transformers 5.23 (2026); safetensors: shared tensors (2022)",
    unsure="The room for checkpoints is an upper bound: old ones that a limit removes, and a run "
    "that is stopped early, need less. A model too large to write is only measured.",
    judges=(saving_fails,),
)
