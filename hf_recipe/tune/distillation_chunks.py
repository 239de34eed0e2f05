"""The Trainer's loss from hidden states and heads, so that no (batch, length, vocabulary) is built.

The model runs as ever, but its head is let see one position only; what the head would have been
given goes to the chunked loss. That this gives the model's own logits is verified on the first
batch (scales and caps as the config declares them); where it does not, the loss is dense.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_recipe.tune import distillation_heads as heads
from hf_recipe.tune import distillation_models as models
from hf_recipe.tune.distillation_loss import Objective, chunked_loss

logger = logging.getLogger(__name__)

# Below this many classes the dense logits are no burden, and one pass less is made. Judgement.
CHUNKED_FROM = 4096


def can_chunk(trainer: Any, model: nn.Module, inputs: Mapping[str, Any], task: heads.Task) -> bool:
    """Whether the loss can be had from hidden states and heads; the reason goes to the log."""
    wanted = trainer.args.distill_chunked
    if wanted is False:
        return False
    reason = _dense_reason(trainer, task)
    head = models.output_head(trainer.student)
    if reason is None and head is not None and head.weight.shape[0] < CHUNKED_FROM:
        reason = None if wanted else "the vocabulary is small"
    if reason is None:
        known = {k: v for k, v in trainer.own_inputs(inputs).items() if k != "labels"}
        taught = models.moved(trainer.teachers[0], inputs)
        with trainer.teaching(trainer.teachers[0]):
            sound = models.rebuilds(trainer.teachers[0], taught)
        with trainer.compute_loss_context_manager():
            sound = sound and models.rebuilds(trainer.student, known)
        reason = None if sound else "logits rebuilt from the head differ from the model's own"
    if reason is not None:
        level = logging.WARNING if wanted else logging.INFO
        logger.log(level, "distilling on dense logits: %s", reason)
    return reason is None


def _dense_reason(trainer: Any, task: heads.Task) -> str | None:
    config = getattr(trainer.student, "config", None)
    plain = [models.output_head(m) for m in (trainer.student, *trainer.teachers)]
    reasons = {
        "the head is not over a vocabulary": task.kind != "classes" or not task.per_position,
        "several teachers are averaged": len(trainer.teachers) > 1,
        "logits are standardized": trainer.args.standardize_logits,
        "layers are matched too": trainer.args.transfers,
        "the loss function is the user's": trainer.compute_loss_func is not None,
        "the model adds a router loss": bool(getattr(config, "output_router_logits", False)),
        "a head is no plain linear layer": any(head is None for head in plain),
        "parameters are sharded": trainer.is_fsdp_enabled
        or trainer.is_deepspeed_enabled
        or any(models.is_sharded(m) for m in (trainer.student, *trainer.teachers)),
        "the model is compiled": bool(trainer.args.torch_compile),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def chunked_terms(
    trainer: Any,
    model: nn.Module,
    inputs: Mapping[str, Any],
    task: heads.Task,
    divisor: Tensor | int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the soft and the hard term of one micro-batch, without its logits."""
    labels = task.labels(inputs)
    mask = task.mask(inputs)
    assert mask is not None  # per_position
    teacher = trainer.teachers[0]
    own, other = models.output_head(trainer.student), models.output_head(teacher)
    if own is None or other is None:
        raise ValueError("the chunked loss needs plain linear heads")
    with models.head_input(own, 1) as states:
        model(**{k: v for k, v in trainer.own_inputs(inputs).items() if k != "labels"})
    with models.head_input(other, 1) as targets, trainer.teaching(teacher):
        teacher(**models.moved(teacher, inputs))
    # Where there are no labels, any valid index marks an attended position.
    marks = torch.where(mask, 0, heads.IGNORED) if labels is None else labels
    total, soft, hard = chunked_loss(
        task.align(states[0], inputs),
        own.weight,
        task.align(targets[0], inputs),
        other.weight,
        marks,
        objective=Objective(
            kind=trainer.args.divergence,
            temperature=trainer.args.distill_temperature,
            beta=trainer.args.divergence_beta,
            skew=trainer.args.divergence_skew,
            soft=trainer.args.alpha,
            hard=0.0 if labels is None else 1 - trainer.args.alpha,
            smoothing=trainer.label_smoother.epsilon if trainer.label_smoother else 0.0,
        ),
        student_bias=own.bias,
        teacher_bias=other.bias,
        student_head=models.declared_head(trainer.student),
        teacher_head=models.declared_head(teacher),
        num_items=divisor,
        vocabulary=trainer.args.distill_vocabulary,
    )
    return total, soft, hard


def shard(teacher: nn.Module, device: str, processes: int) -> None:
    """Split a teacher's weights over all processes; each of its blocks is gathered when asked.

    All processes must then ask it alike, as they do in training.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (processes,))
    for module in reversed(list(teacher.modules())):  # what lies inside comes first
        for block in module if isinstance(module, nn.ModuleList) else ():
            fully_shard(block, mesh=mesh)
    # The outermost part would wait, whole, for a backward pass that never comes.
    fully_shard(teacher, mesh=mesh, reshard_after_forward=True)
