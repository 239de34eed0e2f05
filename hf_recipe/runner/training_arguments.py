"""An experiment's TrainingArguments: the user's own, with what the experiment changes."""

from __future__ import annotations

import copy
from typing import Any

from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

from hf_recipe.instruments.compare import Variant
from hf_recipe.instruments.distributed import world_size
from hf_recipe.runner.options import Options
from hf_recipe.runner.setup import Setup

EVALUATIONS, LOGS = 6, 20  # on the way through a run


def training_arguments(options: Options, setup: Setup, variant: Variant, rows: int) -> Any:
    """The arguments of `variant`; what the user has given stands.

    Args:
        setup: the variant's settings.
        rows: how many it learns from.
    """
    args, given = copy.copy(options.training), options.given
    total = _steps(args, given, setup, rows)
    args.learning_rate, args.num_train_epochs = setup.learning_rate, setup.epochs
    args.lr_scheduler_type = SchedulerType(setup.schedule)
    if setup.schedule != "constant" and "warmup_steps" not in given:
        args.warmup_steps = round(setup.warmup * total)
    args.max_grad_norm = setup.clip or args.max_grad_norm
    args.weight_decay, args.label_smoothing_factor = setup.weight_decay, setup.label_smoothing
    args.seed = args.data_seed = variant.seed
    args.average_tokens_across_devices = False  # the loss is each process's own mean
    args.run_name = f"{variant.change} (seed {variant.seed})"
    args.eval_strategy, args.eval_steps = IntervalStrategy.STEPS, max(1, total // EVALUATIONS)
    args.logging_strategy, args.logging_steps = IntervalStrategy.STEPS, max(1, total // LOGS)
    args.save_strategy = SaveStrategy.NO
    if setup.early_stopping:
        args.save_strategy, args.save_steps = SaveStrategy.STEPS, args.eval_steps
        args.load_best_model_at_end, args.save_total_limit = True, 1
        args.metric_for_best_model, args.greater_is_better = "eval_loss", False
    args.disable_tqdm = True
    if "project" not in given:
        args.project = options.recipe.wandb_project
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False
    return args


def _steps(args: Any, given: Any, setup: Setup, rows: int) -> int:
    """Set the batch; how many steps the run will have."""
    processes = world_size()
    if "per_device_train_batch_size" not in given:
        total = 64 if rows >= 512 else 16
        args.per_device_train_batch_size = max(1, total // processes)
        args.per_device_eval_batch_size = max(1, 256 // processes)
    each = args.per_device_train_batch_size
    args.per_device_train_batch_size = max(1, round(setup.batch * each))
    batch = args.per_device_train_batch_size * processes * args.gradient_accumulation_steps
    if "dataloader_drop_last" not in given and rows >= 8 * batch:
        args.dataloader_drop_last = True  # every step the same size, on one process or many
    steps = rows // batch if args.dataloader_drop_last else -(-rows // batch)
    return int(args.max_steps) if args.max_steps > 0 else max(1, round(steps * setup.epochs))
