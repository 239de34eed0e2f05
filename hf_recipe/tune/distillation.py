"""Distil a teacher into a student with the Trainer, for any head.

    trainer = DistillationTrainer(
        model=student, teacher=teacher, args=DistillationTrainingArguments(alpha=0.5), ...
    )

    loss = alpha * soft + (1 - alpha) * hard                              (Hinton et al. 2015)

*hard* is the model's own loss with the labels, *soft* the divergence from the teacher, times T^2.
Both are means over the same supervised items (rows, positions, pixels) of the whole accumulated
batch, over all processes: 8 rows at once, 2 x 4 or 8 x 1 rows with accumulation are one loss and
one gradient. A row without a label (-100, NaN for numbers, or no labels at all) has its soft part
alone, so unlabelled data can be distilled on. Positions with -100 are not learnt from.

This is off-policy distillation: the student sees the data set's rows. To let a language model
learn on text that it generates itself, use TRL, whose class has the same name:

    from trl import DistillationConfig, DistillationTrainer   # on-policy, causal language models
    DistillationTrainer(student, teacher, DistillationConfig(), train_dataset=prompts).train()

A teacher that takes long is asked once, and its answers are kept: `tune.teacher_cache`.

Evaluation reports the hard loss, comparable with that of a plain Trainer. To evaluate by generated
text, join the two Trainers of the Hugging Face library and of this one:

    class Distiller(DistillationTrainer, Seq2SeqTrainer): ...
    @dataclass
    class Arguments(DistillationTrainingArguments, Seq2SeqTrainingArguments): ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_recipe.tune import distillation_heads as heads
from hf_recipe.tune import distillation_models as models
from hf_recipe.tune.distillation_arguments import DistillationTrainingArguments
from hf_recipe.tune.distillation_chunks import can_chunk, chunked_terms, shard
from hf_recipe.tune.distillation_transfer import attention_transfer, relation_transfer
from hf_recipe.tune.teacher_cache import CachedTeacher

__all__ = ["DistillationTrainer", "DistillationTrainingArguments", "Terms"]


@dataclass
class Terms:
    """The terms of one micro-batch's loss, each a mean over the step's items; graphs are live."""

    soft: Tensor
    hard: Tensor
    total: Tensor
    outputs: Any = None


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose student learns from its labels and from one or several teachers.

    The teachers are kept outside of the student: in evaluation mode, without gradients, in their
    own dtype, never in its optimizer or checkpoints; a whole copy on every process, whatever
    strategy the student is trained by, or split over the processes (`distill_shard_teacher`, or
    sharded by ``fully_shard`` before). Several teachers are averaged in probability.

    Args:
        args: DistillationTrainingArguments (plain TrainingArguments take its defaults).
        teacher: the teacher; or
        teachers: several of them.
        teacher_weights: their shares in the average; default: equal.
        teacher_processing_class: the teacher's tokenizer, compared with the student's.

    Raises:
        ValueError: no teacher, a teacher that shares parameters with the student, or label spaces
            or vocabularies that differ (before the first step).
    """

    args: DistillationTrainingArguments

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *arguments: Any,
        teacher: nn.Module | None = None,
        teachers: Sequence[nn.Module] | None = None,
        teacher_weights: Sequence[float] | None = None,
        teacher_processing_class: Any = None,
        **options: Any,
    ) -> None:
        given = [*([teacher] if teacher is not None else []), *(teachers or ())]
        if not given:
            raise ValueError("DistillationTrainer needs teacher=... or teachers=[...]")
        if teacher_weights is not None and len(teacher_weights) != len(given):
            raise ValueError(f"{len(given)} teachers, but {len(teacher_weights)} teacher_weights")
        super().__init__(model, DistillationTrainingArguments.of(args), *arguments, **options)
        if self.args.n_gpu > 1:
            raise ValueError("start one process per device (torchrun, accelerate launch)")
        self.teachers = tuple(given)
        self.teacher_weights = list(teacher_weights) if teacher_weights is not None else None
        self.teacher_processing_class = teacher_processing_class
        for each in self.teachers:
            self._place(each)
        # The Trainer then counts items and leaves the division by them to compute_loss.
        self.model_accepts_loss_kwargs = True
        self._task: heads.Task | None = None
        self._chunked: bool | None = None
        self._logged = {"soft_loss": torch.zeros(()), "hard_loss": torch.zeros(())}
        self._logged_steps = 0

    def _place(self, teacher: nn.Module) -> None:
        own = {id(parameter) for parameter in self.model.parameters()}
        if any(id(parameter) in own for parameter in teacher.parameters()):
            raise ValueError("the teacher shares parameters with the student; copy.deepcopy it")
        if isinstance(teacher, CachedTeacher):
            teacher.check(self.args.distill_temperature, self.args.divergence)
        teacher.requires_grad_(False).eval()
        if getattr(teacher, "hf_device_map", None) is None and not models.is_sharded(teacher):
            teacher.to(self.args.device)
            if self.args.distill_shard_teacher and self.args.world_size > 1:
                shard(teacher, self.args.device.type, self.args.world_size)

    # ---------------------------------------------------------------- what a batch is

    @property
    def student(self) -> nn.Module:
        """The student, unwrapped of what distributes or adapts it."""
        model = self.accelerator.unwrap_model(self.model)
        base = getattr(model, "get_base_model", None)
        return base() if base is not None else model  # type: ignore[no-any-return]

    def task(self, inputs: Mapping[str, Any]) -> heads.Task:
        """What this student is trained to do; found on the first batch that is asked about."""
        if self._task is None:
            self._task = heads.task_of(self.student, inputs)
        return self._task

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        for teacher in self.teachers:
            for name in sorted(models.forward_names(teacher) - set(self._signature_columns)):
                self._signature_columns.append(name)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Supervised items of the accumulated batch, over all processes."""
        if not batch_samples:
            return None
        count = sum(int(self.task(batch).items(batch)) for batch in batch_samples)
        items = torch.tensor(count, device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            items = self.accelerator.gather(items).sum()
        return items

    # ---------------------------------------------------------------- the loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The distillation loss while training; the hard loss alone in evaluation mode."""
        terms = self.terms(
            model, inputs, num_items_in_batch, dense=return_outputs, soft=model.training
        )
        loss = terms.total if model.training else terms.hard
        if model.training and torch.is_grad_enabled() and self.is_in_train:
            for name, term in (("soft_loss", terms.soft), ("hard_loss", terms.hard)):
                self._logged[name] = self._logged[name].to(term.device) + term.detach()
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            scale = self.accelerator.num_processes // self.get_tp_size()
            loss = loss * scale  # gradients are averaged over processes
        return (loss, terms.outputs) if return_outputs else loss

    def terms(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        num_items: Tensor | int | None = None,
        *,
        dense: bool = False,
        soft: bool = True,
    ) -> Terms:
        """The terms of the loss of one micro-batch.

        Args:
            num_items: what sums are divided by; default: this batch's own items.
            dense: build the logits even where the loss could do without.
            soft: whether to ask the teachers at all.
        """
        inputs, task = models.with_decoder(self.student, inputs), self.task(inputs)
        own = int(task.items(inputs))
        divisor = max(own, 1) if num_items is None else num_items
        if soft and self._chunked is None:
            self._check_spaces(task)
            self._chunked = can_chunk(self, model, inputs, task)
        if soft and self._chunked and not dense:
            total, softs, hard = chunked_terms(self, model, inputs, task, divisor)
            return Terms(softs, hard, total)
        labels = inputs.get("labels")
        apart = self.label_smoother is not None or self.compute_loss_func is not None
        passed = {k: v for k, v in inputs.items() if not (apart and k == "labels")}
        layers = soft and self.args.transfers
        outputs = model(**self.own_inputs(passed), **(self.args.layer_outputs if layers else {}))
        hard = self._hard(task, outputs, labels, inputs, divisor)
        if not soft:
            return Terms(torch.zeros_like(hard), hard, hard, outputs)
        taught = [self._ask(teacher, inputs, layers) for teacher in self.teachers]
        logits = self._soft_target(task, taught)
        student = heads.logits_of(outputs, task.kind)
        softs = heads.soft_loss(
            task,
            student,
            logits,
            inputs,
            num_items=divisor,
            standardize=self.args.standardize_logits,
            **self.args.soft_options,
        )
        total = self.args.alpha * softs + (1 - self.args.alpha) * hard
        if layers:
            total = total + self._transfer(task, outputs, taught[0], inputs, divisor)
        return Terms(softs, hard, total, outputs)

    def own_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The student's part of the inputs: without columns that only a teacher takes."""
        names = models.forward_names(self.student)
        others = set().union(*(models.forward_names(t) for t in self.teachers)) - names
        if not names:  # a forward(*inputs, **options) takes what it is given
            return dict(inputs)
        return {k: v for k, v in inputs.items() if k not in others}

    def _hard(
        self,
        task: heads.Task,
        outputs: Any,
        labels: Tensor | None,
        inputs: Mapping[str, Any],
        divisor: Tensor | int,
    ) -> Tensor:
        """The labels' loss: summed over what is labelled, divided as the soft loss is.

        The model's own loss is a mean over its labelled items; multiplied by their number it is
        a sum again, which may be divided by the whole step's items, also by heads that ignore
        ``num_items_in_batch``.
        """
        labelled = int(task.labelled(inputs))
        logits = heads.logits_of(outputs, task.kind)
        if not labelled:
            return sum(x.float().sum() for x in logits.values()) * 0.0  # type: ignore[return-value]
        whole = labels is None or not labels.is_floating_point() or labelled == len(labels)
        if not whole:
            mean = heads.labelled_loss(task, logits["logits"], labels)  # type: ignore[arg-type]
        elif self.compute_loss_func is not None:
            count = torch.tensor(labelled, device=next(iter(logits.values())).device)
            return self.compute_loss_func(outputs, labels, num_items_in_batch=count) * (  # type: ignore[no-any-return]
                labelled / divisor
            )
        elif self.label_smoother is not None and labels is not None:
            smoothing = self.label_smoother.epsilon
            mean = heads.smoothed_loss(task, logits["logits"], inputs, smoothing)
        else:
            mean = outputs["loss"]
        return mean * (labelled / divisor)

    # ---------------------------------------------------------------- the teachers

    @contextmanager
    def teaching(self, teacher: nn.Module) -> Iterator[None]:
        """In evaluation mode, without gradients, in the teacher's own dtype."""
        teacher.eval()
        with torch.no_grad(), torch.autocast(self.args.device.type, enabled=False):
            yield

    def _ask(self, teacher: nn.Module, inputs: Mapping[str, Any], layers: bool = False) -> Any:
        """What the teacher says to this batch."""
        extra = self.args.layer_outputs if layers else {}
        with self.teaching(teacher):
            return teacher(**models.moved(teacher, inputs), **extra)

    def _soft_target(self, task: heads.Task, taught: Sequence[Any]) -> dict[str, Tensor]:
        device = self.args.device
        each = [
            {k: v.to(device) for k, v in heads.logits_of(outputs, task.kind).items()}
            for outputs in taught
        ]
        return heads.merged(task.kind, each, self.teacher_weights)

    def teacher_logits(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The (averaged) teachers' logits for a batch, by name: what the student is to match."""
        full = models.with_decoder(self.student, inputs)
        return self._soft_target(self.task(inputs), [self._ask(t, full) for t in self.teachers])

    def _transfer(
        self,
        task: heads.Task,
        student: Any,
        teacher: Any,
        inputs: Mapping[str, Any],
        divisor: Tensor | int,
    ) -> Tensor:
        """What is matched inside the networks, each row weighing as many items as it supervises."""
        mask = task.mask(inputs)
        rows = heads.batch_rows(inputs)
        weights = torch.ones(rows) if mask is None else mask.reshape(rows, -1).sum(-1).float()
        weights = weights.to(self.args.device) / divisor
        pairs = self.args.transfer_layers or [[-1, -1]]
        attended = None if "decoder_input_ids" in inputs else inputs.get("attention_mask")
        if attended is not None:  # several choices of one row are sequences of their own
            attended = attended.reshape(-1, attended.shape[-1])
        total = weights.new_zeros(())
        if self.args.relation_weight:
            terms = relation_transfer(student, teacher, pairs, attended).reshape(rows, -1).mean(-1)
            total = total + self.args.relation_weight * (terms * weights).sum()
        if self.args.attention_weight:
            terms = attention_transfer(student, teacher, pairs, attended).reshape(rows, -1).mean(-1)
            total = total + self.args.attention_weight * (terms * weights).sum()
        return total

    def _check_spaces(self, task: heads.Task) -> None:
        """Raise before the first step where teacher and student mean different things."""
        ours = models.space_of(self.student, task)
        for teacher in self.teachers:
            theirs = models.space_of(teacher, task)
            if ours is None or theirs is None:
                continue
            if ours.size != theirs.size and self.args.distill_vocabulary == "error":
                raise models.SpacesDiffer(
                    f"teacher-mismatch: the student has {ours.size} classes, its teacher "
                    f"{theirs.size}; distill_vocabulary='cut' keeps the first "
                    f"{min(ours.size, theirs.size)} of both"
                )
            at = models.first_difference(ours.names, theirs.names)
            if at is not None:
                raise models.SpacesDiffer(
                    f"teacher-mismatch: class {at} is {ours.names[at]!r} for the student and "
                    f"{theirs.names[at]!r} for its teacher"
                )

    # ---------------------------------------------------------------- the log

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """The Trainer's log, with the mean soft and hard loss of this process's share beside it."""
        steps = self.state.global_step - self._logged_steps
        if "loss" in logs and steps > 0:
            for name, value in self._logged.items():
                scale = self.accelerator.num_processes
                logs[name] = float(value) * scale / steps
                self._logged[name] = torch.zeros(())
            self._logged_steps = self.state.global_step
        super().log(logs, *arguments, **options)
