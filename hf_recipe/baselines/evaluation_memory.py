"""How many bytes will evaluation gather before it computes the metrics?

Without `preprocess_logits_for_metrics` the Trainer keeps every logit of the whole evaluation set:
on the device until `eval_accumulation_steps` moves them, then in main memory, twice while parts
are joined. For a language model that is rows x length x vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch

from hf_recipe.baselines.loss_units import local_count
from hf_recipe.core.check import Check, Located, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.batches import Rows
from hf_recipe.instruments.overrides import own_method, replaces
from hf_recipe.instruments.subject import Subject

ROWS = 2  # rows of the batch whose predictions are weighed


@dataclass(frozen=True)
class GatheredBytes(Measurement):
    """What one evaluation will hold at its end, in bytes.

    Attributes:
        rows: of the evaluation set.
        per_row: bytes of a row's predictions, as gathered.
        on_device: most bytes on the device at once.
        in_memory: bytes in main memory on this machine, all its processes together.
        device_free: free bytes of the device's own memory; None: it has none (a CPU).
        memory_free: free bytes of main memory; None: not known.
        preprocessed: whether `preprocess_logits_for_metrics` was given.
        scheduled: whether an evaluation is scheduled.
    """

    rows: int
    per_row: int
    on_device: int
    in_memory: int
    device_free: int | None
    memory_free: int | None
    preprocessed: bool
    scheduled: bool


def measure_gathered(subject: Subject) -> Iterator[Located]:
    """Weigh the predictions of two rows of every evaluation set."""
    trainer, args = subject.trainer, subject.args
    if trainer.compute_metrics is None or args.prediction_loss_only:
        raise Skip("evaluation gathers losses alone")
    if args.batch_eval_metrics:
        raise Skip("metrics are computed batch by batch")
    if replaces(trainer, "evaluation_loop") or replaces(trainer, "evaluate"):
        raise Skip("the evaluation loop is replaced: what it gathers is not known")
    if getattr(args, "predict_with_generate", False):
        raise Skip("generated tokens are gathered, which are small")
    if reason := subject.overridden("evaluation"):
        raise Skip(reason)
    sets = [rows for rows in subject.evaluation.values() if not rows.is_stream and len(rows)]
    if not sets:
        raise Skip("there is no evaluation set whose rows can be read ahead")
    subject.model.eval()
    for rows in sets:
        with local_count(args):
            yield Located(_weigh(subject, rows), rows.name)


def _weigh(subject: Subject, rows: Rows) -> GatheredBytes:
    trainer, args = subject.trainer, subject.args
    inputs = rows.batch(rows.evenly_spaced(ROWS)).to(subject.device).inputs
    _, logits, labels = own_method(trainer, "prediction_step")(subject.model, inputs, False)
    preprocess = trainer.preprocess_logits_for_metrics
    if preprocess is not None and logits is not None:
        logits = preprocess(logits, labels)
    per_row = _bytes(logits) // max(1, min(ROWS, len(rows)))
    whole = per_row * len(rows)
    here = whole
    if args.eval_accumulation_steps:
        batch = int(args.per_device_eval_batch_size) * int(args.world_size)
        here = min(whole, per_row * batch * int(args.eval_accumulation_steps))
    device = subject.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    return GatheredBytes(
        rows=len(rows),
        per_row=per_row,
        on_device=here,
        in_memory=whole * max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))),
        device_free=free,
        memory_free=free_memory(),
        preprocessed=preprocess is not None,
        scheduled=str(getattr(args.eval_strategy, "value", "no")) != "no",
    )


def _bytes(value: Any) -> int:
    """Bytes of nested tensors as they are gathered: bfloat16 becomes float32 in main memory."""
    if isinstance(value, torch.Tensor):
        size = 4 if value.dtype == torch.bfloat16 else value.element_size()
        return value.numel() * size
    if isinstance(value, Mapping):
        return sum(_bytes(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_bytes(item) for item in value)
    return 0


def free_memory() -> int | None:
    """Main memory that is free, in bytes; None where the system does not say."""
    try:
        import psutil
    except ImportError:
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):  # not a POSIX system
            return None
    return int(psutil.virtual_memory().available)


def eval_memory(
    gathered: GatheredBytes,
    *,
    device_share: Annotated[float, "of what is free; the rest is the forward's own"] = 0.8,
    memory_share: Annotated[
        float, "of what is free: parts and whole are both there while they are joined"
    ] = 0.5,
) -> Iterator[Fault]:
    """More than fits, on the device or in main memory."""
    places = (
        ("the device", gathered.on_device, gathered.device_free, device_share),
        ("main memory", gathered.in_memory, gathered.memory_free, memory_share),
    )
    for place, needed, free, share in places:
        if free is None or needed <= share * free:
            continue
        yield Fault(
            f"evaluation will gather {needed / 2**30:.1f} GiB of predictions in {place} "
            f"({gathered.rows:,} rows of {gathered.per_row / 2**20:.2f} MiB), where "
            f"{free / 2**30:.1f} GiB are free",
            subject=place,
            severity=None if gathered.scheduled else "note",
            fix="eval_accumulation_steps=16"
            if place == "the device" and gathered.preprocessed
            else None,
            evidence={
                "seen": f"{needed / 2**30:.1f} GiB",
                "expected": f"at most {share:.0%} of {free / 2**30:.1f} GiB",
                "bytes": needed,
                "free": free,
            },
        )


GATHERED = Probe(
    "weigh the predictions",
    "probe",
    (GatheredBytes,),
    measure_gathered,
    needs=("trainer", "unsharded"),
)

EVAL_MEMORY = Check(
    name="eval-memory",
    stage="baselines",
    severity="warning",
    moments=("probe",),
    why="Evaluation keeps every logit of the whole set until its end: the first fails, after an "
    "epoch of training.",
    fix="Trainer(..., preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1))",
    source="transformers documentation, eval_accumulation_steps (2026); issue 7232 (2020)",
    unsure="Two rows stand for all; sequences longer than theirs need more.",
    judges=(eval_memory,),
)
