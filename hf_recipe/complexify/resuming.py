"""Was everything that a resumed run needs restored?

`resume_from_checkpoint` loads what it finds. Without the optimizer's file Adam starts from
nothing, without the scheduler's the rate begins again at its warm-up, without the random state
the rows come in another order; none of it is an error to the Trainer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.checkpoints import checkpoint_in
from hf_recipe.instruments.layers import is_sharded
from hf_recipe.instruments.subject import Subject

CHECKPOINT, SAVED = "resumed_checkpoint", "resumed_state"  # keys of a subject's cache
OPTIMIZER = ("optimizer*", "rank*optimizer*", "global_step*")
COMPARED, VALUES = 16, 1_024  # tensors, and numbers of each, that are compared with the file
RANDOM = ("rng_state.pth", "rng_state_*.pth")


@dataclass(frozen=True)
class Resumed(Measurement):
    """A resumed run at its first step.

    Attributes:
        step: optimizer steps done before.
        missing: of "optimizer", "scheduler", "random state": files not in the checkpoint.
        files_known: whether the checkpoint's folder is known.
        optimizer_steps: the optimizer's own count; None: it keeps none.
        rate, saved_rate: learning rate now, and when the checkpoint was saved; None: unknown.
        skips_data: whether the rows already seen are passed over.
        keeps_state: whether an optimizer of this kind keeps a state for each parameter.
        scheduler_steps: the scheduler's own count; None: it keeps none.
        compared, unlike: tensors of the model compared with the checkpoint's file, and those of
            them that hold other values.
        batch_size, saved_batch_size: rows a step on one device, now and then; None: unknown.
    """

    step: int
    missing: tuple[str, ...]
    files_known: bool
    optimizer_steps: int | None
    optimizer_states: int
    rate: float | None
    saved_rate: float | None
    skips_data: bool
    keeps_state: bool = False
    scheduler_steps: int | None = None
    compared: int = 0
    unlike: int = 0
    batch_size: int | None = None
    saved_batch_size: int | None = None


def take_resumed(subject: Subject) -> Iterator[Resumed]:
    """Compare what is there with what was saved; at train begin."""
    if not subject.resumed:
        raise Skip("the run was not resumed")
    if subject.optimizer is None:
        raise Skip("there is no optimizer yet")
    optimizer = getattr(subject.optimizer, "optimizer", subject.optimizer)
    folder: Path | None = subject.cache.get(CHECKPOINT)
    saved: Mapping[str, Any] = subject.cache.get(SAVED) or {}
    counts = [
        int(float(state["step"]))
        for state in optimizer.state.values()
        if isinstance(state, Mapping) and isinstance(state.get("step"), (int, float, torch.Tensor))
    ]
    same_step = saved.get("step") == subject.step
    defaults = getattr(optimizer, "defaults", {})
    compared, unlike = _against_file(subject, folder)
    yield Resumed(
        step=subject.step,
        missing=_missing(folder) if folder is not None else (),
        files_known=folder is not None,
        optimizer_steps=max(counts) if counts else None,
        optimizer_states=len(optimizer.state),
        rate=float(optimizer.param_groups[0]["lr"]),
        saved_rate=float(saved["rate"]) if same_step and saved.get("rate") is not None else None,
        skips_data=not bool(subject.args.ignore_data_skip),
        keeps_state="betas" in defaults or bool(defaults.get("momentum")),
        scheduler_steps=_count_of(subject.scheduler),
        compared=compared,
        unlike=unlike,
        batch_size=int(subject.args.train_batch_size),
        saved_batch_size=_saved_batch_size(folder),
    )


def _against_file(subject: Subject, folder: Path | None) -> tuple[int, int]:
    """(tensors compared, those with other values than the checkpoint's own file)."""
    checkpoint = checkpoint_in(folder) if folder is not None else None
    if checkpoint is None:
        return 0, 0
    named = {n: p for n, p in subject.model.named_parameters() if n in checkpoint.shapes}
    chosen = list(named)[:: max(1, -(-len(named) // COMPARED))]
    compared = unlike = 0
    for name in chosen:
        theirs, ours = checkpoint.values(name, VALUES), named[name].detach().reshape(-1)
        if tuple(named[name].shape) != checkpoint.shapes[name] or is_sharded(named[name]):
            continue
        compared += 1
        ours = ours[: len(theirs)].cpu().to(theirs.dtype)
        unlike += not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-6, equal_nan=True)
    return compared, unlike


def _count_of(scheduler: Any) -> int | None:
    """How often a scheduler that goes by steps was stepped."""
    inner = getattr(scheduler, "scheduler", scheduler)
    if not isinstance(inner, torch.optim.lr_scheduler.LambdaLR):
        return None
    return int(inner.last_epoch)


def _saved_batch_size(folder: Path | None) -> int | None:
    file = folder / "trainer_state.json" if folder is not None else None
    if file is None or not file.is_file():
        return None
    size = json.loads(file.read_text(encoding="utf-8")).get("train_batch_size")
    return int(size) if isinstance(size, int) else None


def _missing(folder: Path) -> tuple[str, ...]:
    wanted = {"optimizer": OPTIMIZER, "scheduler": ("scheduler.pt",), "random state": RANDOM}
    return tuple(
        what for what, names in wanted.items() if not any(any(folder.glob(n)) for n in names)
    )


def state_of(optimizer: Any, step: int) -> dict[str, Any]:
    """What `take_resumed` compares with; JSON, it rides in the checkpoint."""
    rate = float(optimizer.param_groups[0]["lr"])
    return {"step": step, "rate": rate if math.isfinite(rate) else None}


def incomplete(
    resumed: Resumed,
    *,
    apart: Annotated[float, "relative; the same schedule gives the same rate to rounding"] = 1e-3,
) -> Iterator[Fault]:
    """Files that are missing, counters that begin again, a rate that jumps."""
    wrong = list(resumed.missing)
    if resumed.optimizer_states and resumed.optimizer_steps is not None:
        if resumed.optimizer_steps < resumed.step // 2 and "optimizer" not in wrong:
            wrong.append(f"optimizer (its count is {resumed.optimizer_steps})")
    elif not resumed.optimizer_states and not resumed.files_known:
        return
    elif not resumed.optimizer_states and resumed.keeps_state and "optimizer" not in wrong:
        wrong.append("optimizer (it holds no state)")
    count = resumed.scheduler_steps
    if count is not None and count < resumed.step // 2 and "scheduler" not in wrong:
        wrong.append(f"scheduler (its count is {count})")
    if resumed.unlike > 0.5 * resumed.compared:
        wrong.append(f"weights ({resumed.unlike} of {resumed.compared} tensors are not the file's)")
    now, then = resumed.rate, resumed.saved_rate
    jumped = now is not None and then is not None and not abs(now - then) <= apart * max(now, then)
    evidence = {
        "seen": f"without {', '.join(wrong)}" if wrong else f"rate {now}",
        "expected": "everything restored" if wrong else f"rate {then}",
        "step": resumed.step,
    }
    if wrong:
        rate = f"; the rate is {now:.3g} and was {then:.3g}" if jumped else ""
        yield Fault(
            f"the run was resumed at step {resumed.step} without its {', '.join(wrong)}{rate}",
            evidence=evidence,
        )
    elif jumped:
        yield Fault(
            f"the learning rate is {now:.3g} after resuming at step {resumed.step}, and was "
            f"{then:.3g} when the checkpoint was saved",
            subject="learning rate",
            severity="warning",  # another rate may be what the second run is for
            evidence=evidence,
        )
    now_size, then_size = resumed.batch_size, resumed.saved_batch_size
    if now_size is not None and then_size is not None and now_size != then_size:
        yield Fault(
            f"a step takes {now_size} rows after resuming at step {resumed.step}, and took "
            f"{then_size} before: the place in the epoch and the schedule's end are counted in "
            "steps, so rows are seen twice or left out",
            subject="batch size",
            severity="warning",
            evidence={"seen": f"{now_size} rows a step", "expected": f"{then_size}"},
            fix=f"TrainingArguments(..., per_device_train_batch_size={then_size})",
        )
    if not resumed.skips_data:
        yield Fault(
            f"the run was resumed at step {resumed.step}, and ignore_data_skip=True begins the "
            "epoch anew: some rows are seen twice and others not",
            subject="position",
            severity="note",
            evidence={"seen": "from the first row", "expected": "from the next row"},
            fix="TrainingArguments(..., ignore_data_skip=False)",
        )


MEASURE_RESUMED = Probe(
    name="compare with the checkpoint",
    moment="resume",
    measures=(Resumed,),
    take=take_resumed,
    needs=("optimizer",),
)

RESUME_INCOMPLETE = Check(
    name="resume-incomplete",
    stage="complexify",
    severity="error",
    moments=("resume",),
    why="A resumed run that lost its optimizer or schedule is another run under the same name.",
    fix="TrainingArguments(..., save_only_model=False)  # and copy the whole checkpoint folder",
    source="transformers issues 33336 (2024) and 17032 (2022); Trainer resumes without a word",
    unsure="A second run that is meant to begin with a new optimizer should not resume but load.",
    judges=(incomplete,),
)

__all__ = ["RESUME_INCOMPLETE", "Resumed", "state_of"]
