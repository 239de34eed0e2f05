"""Preflight: the probes before step 1, on a Trainer or on what a lone callback can reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from hf_recipe.catalogue import PROBES
from hf_recipe.core.check import Probe
from hf_recipe.core.finding import MOMENTS
from hf_recipe.data.remembered import recalling
from hf_recipe.examiner import Examiner
from hf_recipe.instruments.batches import rows_of_dataloader, rows_of_trainer
from hf_recipe.instruments.distributed import rank
from hf_recipe.instruments.held import held_generators, held_objects, kept
from hf_recipe.instruments.layers import epsilon_of
from hf_recipe.instruments.quiet import quiet
from hf_recipe.instruments.subject import Plan, Subject, trainer_loss
from hf_recipe.trainer.progress import shown

BEFORE_STEP_1 = ("dataset", "batch", "static", "probe")
HELD = "held"  # key of a subject's cache


def subject_of_trainer(trainer: Any, *, fresh: bool, dataloader: Any = None) -> Subject:
    """What probes may look at on `trainer`.

    Args:
        fresh: whether no step has moved these weights yet.
        dataloader: the training dataloader, where it exists already.
    """
    evaluation = trainer.eval_dataset
    if evaluation is None:
        sets: Mapping[str, Any] = {}
    elif isinstance(evaluation, dict) and not hasattr(evaluation, "column_names"):
        sets = evaluation
    else:
        sets = {"validation": evaluation}
    rows = {name: rows_of_trainer(trainer, each, name) for name, each in sets.items()}
    state = trainer.state
    return Subject(
        model=trainer.accelerator.unwrap_model(trainer.model_wrapped),
        args=trainer.args,
        train=rows_of_trainer(trainer, trainer.train_dataset, "train"),
        evaluation={name: each for name, each in rows.items() if each is not None},
        trainer=trainer,
        processing_class=trainer.processing_class,
        optimizer=trainer.optimizer,
        scheduler=trainer.lr_scheduler,
        plan=plan_of_trainer(trainer, dataloader),
        step=state.global_step,
        resumed=state.global_step > 0,
        fresh=fresh,
        loss_function=trainer_loss(trainer),
    )


def subject_of_callback(args: Any, state: Any, fresh: bool, seen: Mapping[str, Any]) -> Subject:
    """What a callback alone can reach: the model, both dataloaders' data, the optimizer."""
    train = rows_of_dataloader(seen.get("train_dataloader"), "train")
    evaluation = rows_of_dataloader(seen.get("eval_dataloader"), "validation")
    steps = int(state.max_steps or 0)
    epochs = float(state.num_train_epochs or 1)
    plan = None
    if steps > 0:
        per_step = int(state.train_batch_size or args.per_device_train_batch_size)
        per_step *= args.gradient_accumulation_steps * max(1, args.world_size)
        per_epoch = max(1, -(-len(train) // per_step)) if train is not None and len(train) else 0
        plan = Plan(steps, per_epoch or max(1, round(steps / epochs)), per_step)
    return Subject(
        model=seen["model"],
        args=args,
        train=train,
        evaluation={} if evaluation is None else {"validation": evaluation},
        processing_class=seen.get("processing_class"),
        optimizer=seen.get("optimizer"),
        scheduler=seen.get("lr_scheduler"),
        plan=plan,
        step=state.global_step,
        resumed=state.global_step > 0,
        fresh=fresh,
    )


def plan_of_trainer(trainer: Any, dataloader: Any = None) -> Plan | None:
    """The run's steps, as the Trainer will count them."""
    if dataloader is None:
        if trainer.train_dataset is None:
            return None
        dataloader = trainer.get_train_dataloader()
    try:
        values = trainer.set_initial_training_values(trainer.args, dataloader)
    except ValueError:  # a stream without max_steps: train() will say so itself
        return None
    _, per_epoch, _, _, rows_per_step, _, max_steps = values
    return Plan(int(max_steps or 0), int(per_epoch), int(rows_per_step))


@contextmanager
def borrowed(trainer: Any) -> Iterator[None]:
    """Before ``train()``: create optimizer and scheduler, look at them, put everything back."""
    names = ("optimizer", "lr_scheduler", "_created_lr_scheduler", "model_wrapped")
    kept = {name: getattr(trainer, name) for name in names}
    signature = trainer._signature_columns
    loaders = list(trainer.accelerator._dataloaders)
    try:
        if not sharded(trainer) and not _quantised(trainer):
            plan = plan_of_trainer(trainer)
            trainer.create_optimizer_and_scheduler(plan.total_steps if plan else 1)
        yield
    finally:
        for name, value in kept.items():
            setattr(trainer, name, value)
        trainer._signature_columns = signature
        trainer.accelerator._dataloaders[:] = loaders


@contextmanager
def before_training(trainer: Any, *, fresh: bool) -> Iterator[Subject]:
    """The subject as it will be at train begin; nothing of it is left in the run."""
    bare = Subject(trainer.model, trainer.args, None, {}, trainer=trainer)
    with guard_of(bare), borrowed(trainer):
        yield subject_of_trainer(trainer, fresh=fresh)


def sharded(trainer: Any) -> bool:
    """Whether parameters are spread over processes, so that no rank holds them whole."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def compiled(trainer: Any) -> bool:
    """Whether hooks that are set now never fire, or have the model compiled anew."""
    return bool(trainer is not None and trainer.args.torch_compile)


def _quantised(trainer: Any) -> bool:
    return "bnb" in str(trainer.args.optim) or "8bit" in str(trainer.args.optim)


def seen_only_while_training(trainer: Any) -> bool:
    """Whether rows cannot be drawn beforehand: a stream, or a dataloader of the user's own."""
    train = trainer.train_dataset
    subject = Subject(trainer.model, trainer.args, None, {}, trainer=trainer)
    stream = not (hasattr(train, "__getitem__") and hasattr(train, "__len__"))
    return stream or subject.overridden("train") is not None


def with_update(subject: Subject) -> Plan | None:
    """The subject's plan, with what is known of clipping and of the optimizer."""
    plan, optimizer = subject.plan, subject.optimizer
    if plan is None or optimizer is None:
        return plan
    optimizer = getattr(optimizer, "optimizer", optimizer)  # AcceleratedOptimizer
    return replace(
        plan,
        max_grad_norm=float(subject.args.max_grad_norm or 0.0),
        parameters=sum(p.numel() for p in subject.model.parameters() if p.requires_grad),
        scale_free="sgd" not in type(optimizer).__name__.lower(),
        epsilon=epsilon_of(optimizer),
    )


def run_probes(
    examiner: Examiner,
    subject: Subject,
    *,
    again: Callable[[Probe], bool] = lambda probe: True,
) -> None:
    """Run every probe of the catalogue whose moment is before step 1, in the stages' order.

    Args:
        again: which probes to run; all by default.
    """
    probes = [p for p in PROBES.values() if p.moment in BEFORE_STEP_1 and again(p)]
    probes.sort(key=lambda p: MOMENTS.index(p.moment))
    speaks = rank() == 0 and not getattr(subject.args, "disable_tqdm", False)
    for probe in shown(probes, enabled=speaks):
        reason = _missing(probe, subject)
        if reason:
            examiner.skip(probe.measures, reason)
            continue
        examiner.examine(recalling(probe), subject, guard=lambda: guard_of(subject))


@contextmanager
def guard_of(subject: Subject) -> Iterator[None]:
    """The quiet guard over everything that a probe of `subject` may touch."""
    trainer = subject.trainer
    wrapped: nn.Module | None = getattr(trainer, "model_wrapped", None)
    if HELD not in subject.cache:
        rows = [subject.train, *subject.evaluation.values()]
        roots = [part for each in rows if each is not None for part in (each.read, each.collate)]
        subject.cache[HELD] = (held_generators(*roots), held_objects(*roots))
    held, unlogged = kept(*subject.cache[HELD]), _unlogged(trainer)
    with quiet(subject.model, wrapped, trainer=trainer), held, unlogged:
        yield


@contextmanager
def _unlogged(trainer: Any) -> Iterator[None]:
    """What a loss logs of itself is not heard while it is only tried out."""
    if trainer is None:
        yield
        return
    own = vars(trainer).get("log")
    trainer.log = lambda *args, **kwargs: None
    try:
        yield
    finally:
        if own is None:
            del trainer.log
        else:
            trainer.log = own


def _missing(probe: Probe, subject: Subject) -> str | None:
    trainer = subject.trainer
    if "fresh" in probe.needs and not subject.fresh:
        return "these weights have been trained already" if not subject.resumed else "resumed"
    if "optimizer" in probe.needs and subject.optimizer is None:
        return "there is no optimizer before train() here"
    if "trainer" in probe.needs and trainer is None:
        return "a callback alone cannot reach it; use hf_recipe.attach(trainer)"
    whole = probe.moment == "probe" or "unsharded" in probe.needs
    if whole and trainer is not None and sharded(trainer):
        return "parameters are sharded (FSDP or DeepSpeed)"
    return None
