"""One experiment: a Trainer run that the recipe watches, recorded, and never run twice.

An outcome is kept under a name made of the data, the user's flags and the experiment's own
settings; a run that was killed and started again finds what it had done.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from transformers import Trainer, set_seed

from hf_recipe.baselines.output_bias import set_output_bias
from hf_recipe.core.check import plain
from hf_recipe.core.config import Settings
from hf_recipe.core.finding import Stage
from hf_recipe.core.report import Report
from hf_recipe.explanation import stored_checks
from hf_recipe.instruments.compare import Outcome, Variant, remembered
from hf_recipe.instruments.distributed import rank, world_size
from hf_recipe.regularize.augment import Augmentation, stronger
from hf_recipe.runner.beside import look_beside, shared_outcome
from hf_recipe.runner.data import Data
from hf_recipe.runner.distil import distillation_trainer, with_fidelity
from hf_recipe.runner.feed import Feed
from hf_recipe.runner.kept import MOST, Kept
from hf_recipe.runner.ledger import Ledger, command_line, git_state, tracked
from hf_recipe.runner.looks import absorb, check_saved
from hf_recipe.runner.made_up import training_rows
from hf_recipe.runner.models import build, design_of, given_config
from hf_recipe.runner.options import Options, context_of, split_list
from hf_recipe.runner.pieces import (
    Part,
    WholeEvaluation,
    norm_quantile,
    note_of,
    worth_of_fields,
)
from hf_recipe.runner.setup import FEW_ROWS, Setup, beginning
from hf_recipe.runner.show import Show
from hf_recipe.runner.side_by_side import train_ahead
from hf_recipe.runner.training_arguments import training_arguments
from hf_recipe.trainer.attach import attach, known_thresholds

TRAIN_SAMPLE = 1024


class Lab:
    """Where experiments are run: data, folder, report and what is shown.

    Attributes:
        report: the whole job's.
        remember: gives a variant's outcome, trained now or found in the job's folder.
        stage: which stage is at work.
        fields: what each input field is worth to the latest model that was watched; stored form.
    """

    KEPT = MOST  # models whose weights stay

    def __init__(self, options: Options, data: Data, folder: Path, show: Show) -> None:
        self.options, self.data, self.folder, self.show = options, data, folder, show
        self.pretrained = options.model.model_name_or_path is not None
        config = given_config(options)
        self.given = config is not None
        design_of(data, options, "base")  # a mistyped one is told before anything is trained
        self.feed: Feed = data.task.feeds[data.kind](data, options, folder, config)
        self._feeds: dict[float, Feed] = {1.0: self.feed}
        self.report = Report(title=f"The recipe on {data.name}")
        self.stage: Stage = "data"
        self.metric_name = data.task.metric
        self.group = time.strftime("recipe-%Y%m%d-%H%M%S")
        self.context = context_of(options, data.fingerprint)
        self.ledger = Ledger(folder / "experiments.csv", command_line(), git_state())
        self.bias = ""
        self.fields: Any = None
        self.kept = Kept(folder / "models" / self.context, self.KEPT)
        self._watched: set[str] = set()
        self._ahead: set[str] = set()
        self.remember = remembered(self._experiment, folder / "outcomes" / self.context)

    @property
    def leads(self) -> bool:
        """Whether this process writes and speaks."""
        return rank() == 0

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of comparisons, from the user's own on."""
        first = int(self.options.training.seed)
        few = len(self.data.splits["train"]) < FEW_ROWS / 2
        own = not (self.pretrained or self.given)  # small networks, whose trainings are cheap
        usual = 4 if few and own else 2
        return tuple(range(first, first + (self.options.recipe.seeds or usual)))

    @property
    def start(self) -> Setup:
        """Where the recipe begins: the user's flags, or defaults that suit the input."""
        task, rows = self.data.task, len(self.data.splits["train"])
        return beginning(self.options, task.ladder(self.data.kind), task.patience, rows)

    def feed_for(self, setup: Setup) -> Feed:
        """The rows at the size that `setup` asks for."""
        if setup.share not in self._feeds:
            self._feeds[setup.share] = self.feed.scaled(setup.share)
        return self._feeds[setup.share]

    def run(
        self, change: str, setup: Setup, seed: int | None = None, *, watch: bool = False
    ) -> Outcome:
        """Train once, or remember having done so; one line either way.

        With `watch` everything that is found is reported; else, as in a trial, errors alone.
        """
        variant = setup.variant(change, self.seeds[0] if seed is None else seed)
        if watch:
            self._watched.add(variant.key)
        return self.train(variant)

    def ahead(self, variants: Sequence[Variant], *, watch: bool = False) -> None:
        """Train side by side what `run` will be asked for next; does nothing where none fits.

        Args:
            watch: as in `run`, for the first of them.
        """
        if watch:
            self._watched.add(variants[0].key)
        self._ahead |= train_ahead(self, variants)

    def train(self, variant: Variant) -> Outcome:
        """As `run`, for `instruments.compare.compare`."""
        known = self.outcome_path(variant).is_file() and variant.key not in self._ahead
        outcome = self.remember(variant)
        self.fields = outcome.facts.get("fields") or self.fields
        if self.leads:
            self._take_in(variant)
            number = self.ledger.record(
                self.stage, variant, outcome, note=note_of(variant, outcome)
            )
            self.show.experiment(number, variant, outcome, self.metric_name, known=known)
        return outcome

    # ---------------------------------------------------------------- inside

    def _experiment(self, variant: Variant) -> Outcome:
        setup = Setup(**variant.settings)
        shared = shared_outcome(self, setup, variant)
        if shared is not None:
            return shared
        args = self.arguments(setup, variant)
        with self._tracking(variant), self.show.training(variant.change) as progress:
            trainer = self.trainer(setup, args)
            if progress is not None:
                trainer.add_callback(progress)
            recipe = self._watch(trainer, setup, variant)
            passing = look_beside(self, trainer, setup)
            began = time.perf_counter()
            trainer.train()
            outcome = self._measure(trainer, setup, time.perf_counter() - began)
            if passing is not None:
                outcome = passing.add_to(outcome, self._measure)
            if variant.key in self._watched and setup.share == 1:
                use = plain(worth_of_fields(trainer, self.data.inputs))
                outcome = replace(outcome, facts={**outcome.facts, "fields": use})
            outcome = with_fidelity(outcome, trainer, setup)
            recipe.detach()
        if setup.keep:
            trainer.save_model(str(self.model_path(variant)))
            check_saved(self, trainer, self.model_path(variant))
        elif self.kept.wants(variant, outcome.loss):
            trainer.save_model(str(self.model_path(variant)))
            self.kept.add(variant, outcome.loss)
        if self.leads:
            shutil.rmtree(args.output_dir, ignore_errors=True)
        return outcome

    def outcome_path(self, variant: Variant) -> Path:
        """Where an experiment's outcome is remembered."""
        return self.folder / "outcomes" / self.context / f"{variant.key}.json"

    def model_path(self, variant: Variant) -> Path:
        """Where the weights of an experiment lie, if they are kept."""
        return self.kept.place(variant)

    def trainer(self, setup: Setup, args: Any) -> Trainer:
        """A Trainer for `setup`, its model freshly drawn."""
        set_seed(args.seed)
        feed = self.feed_for(setup)
        model = build(self.data, feed, self.options, setup.model, setup.dropout, setup.depth)
        if not self.pretrained:
            self.bias = self._init_well(model, feed)
        common: dict[str, Any] = {
            "model": model,
            "args": args,
            "train_dataset": training_rows(feed, setup, args.seed),
            "eval_dataset": feed.rows("validation"),
            **self.measured(feed, setup.without),
        }
        if setup.teacher:
            trainer = distillation_trainer(setup.teacher, common)
        else:
            trainer = Trainer(**common)
        if setup.augment:
            trainer.add_callback(
                Augmentation(*(stronger(change, setup.augment) for change in feed.changes))
            )
        if setup.early_stopping:
            from hf_recipe.regularize.early_stopping import EarlyStopping

            trainer.add_callback(EarlyStopping())
        trainer.add_callback(WholeEvaluation())
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer

    def measured(self, feed: Feed, without: str = "") -> dict[str, Any]:
        """A Trainer's arguments for collating and for measuring what the task asks."""
        task = self.data.task
        return {
            "data_collator": feed.collator(without),
            "processing_class": feed.processing_class,
            "compute_metrics": task.metrics_of(self.data),
            "preprocess_logits_for_metrics": task.condense,
        }

    def _init_well(self, model: Any, feed: Feed) -> str:
        """Let the fresh model predict the labels' frequencies from the first step on."""
        try:
            change = set_output_bias(
                model, feed.rows("train"), data_collator=feed.collate, rows=256
            )
        except ValueError as error:
            return str(error)
        return f"the output bias is set to the label frequencies ({change.before:.4f} nats saved)"

    def arguments(self, setup: Setup, variant: Variant) -> Any:
        """The user's TrainingArguments with this experiment's settings."""
        rows = setup.rows or self.feed_for(setup).count(setup.part)
        args = training_arguments(self.options, setup, variant, rows)
        args.output_dir = str(self.folder / "runs" / variant.key)
        args.report_to = self.trackers
        return args

    def _watch(self, trainer: Trainer, setup: Setup, variant: Variant) -> Any:
        chosen = self.options.recipe
        ignore = set(split_list(chosen.ignore))
        if variant.key not in self._watched:
            # The data were looked at and the pipeline proved; a rate that blows up is an answer.
            ignore |= {"data", "baselines", "loss-not-finite", "overfitting"}
            ignore |= {"still-improving", "saturated-early"}  # fitting a law takes its time
        elif self.stage == "complexify":
            ignore |= {"overfitting"}  # here it is the aim
        recipe = attach(
            trainer,
            select=split_list(chosen.select) or None,
            ignore=sorted(ignore),
            report_dir=self._report_folder(variant),
            log_samples=chosen.log_samples,
        )
        recipe.closing.console = self.show.silent_sink()
        return recipe

    def _measure(self, trainer: Trainer, setup: Setup, seconds: float) -> Outcome:
        feed = self.feed_for(setup)
        validation = trainer.predict(feed.rows("validation"), metric_key_prefix="validation")
        train = feed.rows(setup.part)
        chosen = range(0, len(train), max(1, len(train) // TRAIN_SAMPLE))
        sample = train.select(chosen) if hasattr(train, "select") else Part(train, chosen)
        seen = trainer.predict(sample, metric_key_prefix="train")
        row_losses = self.data.task.row_losses
        own = row_losses(seen.predictions, seen.label_ids)
        history = trainer.state.log_history
        return Outcome(
            row_losses=row_losses(validation.predictions, validation.label_ids),
            cost=seconds,
            metric=float(validation.metrics[f"validation_{self.metric_name}"]),
            facts={
                "train_losses": own,
                "metrics": {k: v for k, v in validation.metrics.items() if not k.endswith("time")},
                "parameters": sum(p.numel() for p in trainer.model.parameters()),
                "averaged": setup.average,
                "steps": trainer.state.global_step,
                "planned": trainer.state.max_steps,
                "train_curve": [[h["step"], h["loss"]] for h in history if "loss" in h],
                "curve": [[h["step"], h["eval_loss"]] for h in history if "eval_loss" in h],
                "processes": world_size(),
                "norm_p90": norm_quantile(trainer.hf_recipe),
            },
        )

    def _take_in(self, variant: Variant) -> None:
        """Put what the recipe saw in an experiment into the job's report."""
        path = self._report_folder(variant) / "report.json"
        if not path.is_file():
            return
        seen = Report.from_json(path)
        self.absorb(seen)
        trial = variant.key not in self._watched
        standing = {finding.identity for finding in self.report.flat}
        for finding in seen.flat:
            if trial and finding.severity != "error":
                continue
            if finding.identity not in standing:
                self.report.add(finding)
                self.show.finding(finding)

    def absorb(self, seen: Report) -> None:
        """Take in what another report ran, skipped and crashed on; not its findings."""
        absorb(self.report, seen, self.chosen())

    def settings(self) -> Settings:
        """What the user selected."""
        chosen = self.options.recipe
        return Settings.resolve(
            command_line={
                "select": split_list(chosen.select) or None,
                "ignore": split_list(chosen.ignore) or None,
                "log_samples": chosen.log_samples or None,
            },
            checks=known_thresholds(),
        )

    def chosen(self, stage: Stage | None = None) -> set[str]:
        """Names of the selected checks, of one stage or all."""
        settings = self.settings()
        return {
            name
            for name, entry in stored_checks().items()
            if settings.selects(name, entry["stage"]) and stage in (None, entry["stage"])
        }

    def left_out(self, what: str, reason: str) -> None:
        """Say once that something cannot be tried on this task."""
        self.show.once(f"       {what} is not tried: {reason}")

    def _report_folder(self, variant: Variant) -> Path:
        return self.folder / "experiments" / variant.key

    @property
    def trackers(self) -> list[str]:
        """Where the experiments' curves go."""
        if "report_to" in self.options.given:
            return list(self.options.training.report_to)
        return ["wandb"]

    def _tracking(self, variant: Variant) -> AbstractContextManager[Any]:
        if not ("wandb" in self.trackers and self.leads):
            return contextlib.nullcontext()
        return tracked(
            project=self.options.recipe.wandb_project,
            group=self.group,
            name=f"{self.stage}: {variant.change} (seed {variant.seed})",
            folder=self.folder,
            config={"recipe": dict(variant.settings), "stage": self.stage, "key": variant.key},
        )
