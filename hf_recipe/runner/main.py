"""The main job: five stages in order, a gate after each, and one reading of the test set."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
import transformers

from hf_recipe.core.finding import Stage
from hf_recipe.core.report import Gate, write_atomically
from hf_recipe.instruments.distributed import from_rank_0, in_group, rank
from hf_recipe.report.model_card import write_model_card
from hf_recipe.runner import (
    baselines_stage,
    complexify_stage,
    data_stage,
    regularize_stage,
    tune_stage,
)
from hf_recipe.runner.data import load
from hf_recipe.runner.experiment import Lab
from hf_recipe.runner.final import SAVED, read_test
from hf_recipe.runner.journey import Journey
from hf_recipe.runner.models import given_config
from hf_recipe.runner.options import Options, UsageError, parse
from hf_recipe.runner.show import Show
from hf_recipe.runner.side_by_side import cores
from hf_recipe.runner.trial import TrialLab, run_trial, trial_folder

CLEAN, FOUND, USAGE, CRASHED = 0, 1, 2, 3
NEEDED_BYTES = 200_000_000
REMADE = ("outcomes", "experiments", "models", "runs", "search", "tokenizer", "test")

STAGES: Mapping[Stage, Callable[[Journey], Gate]] = {
    "data": data_stage.run,
    "baselines": baselines_stage.run,
    "complexify": complexify_stage.run,
    "regularize": regularize_stage.run,
    "tune": tune_stage.run,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the main job; returns the exit code.

    0 clean, 1 findings at or above ``--fail_on`` or a gate that is shut, 2 usage, 3 a check of
    ours crashed.
    """
    try:
        options = parse(sys.argv[1:] if arguments is None else list(arguments))
        _quieten()
        if options.recipe.trial:
            options.training.output_dir = str(trial_folder(options))
        folder = _folder(options)
        data = load(options)
        set_threads(tiny=data.kind != "text" and given_config(options) is None)
        make = TrialLab if options.recipe.trial else Lab
        lab = make(options, data, folder, Show(leads=rank() == 0))
    except UsageError as error:
        if rank() == 0:
            sys.stderr.write(f"recipe: {error}\n")
        return USAGE
    try:
        return run_trial(lab) if isinstance(lab, TrialLab) else from_rank_0(_travel(lab))
    finally:
        if in_group():
            dist.destroy_process_group()


def _travel(lab: Lab) -> int:
    journey = Journey(lab, lab.start)
    _announce(lab)
    shut = False
    try:
        for stage in lab.options.stages:
            lab.stage = stage
            lab.show.stage(stage)
            gate = from_rank_0(STAGES[stage](journey))
            lab.report.gate(gate)
            lab.show.gate(gate)
            write_report(lab)
            if gate.verdict == "fail" and not lab.options.recipe.keep_going:
                shut = True
                lab.show.say("\nThe gate is shut; mend what it names, or --keep_going.")
                break
        if not shut and "tune" in lab.options.stages:
            lab.show.stage("test, read once")
            journey.rows += read_test(journey)
        lab.report.status = "finished"
    except BaseException:
        lab.report.status = "failed"
        raise
    finally:
        write_report(lab)
    if lab.leads:
        _close(lab, journey)
    return exit_code(lab)


def exit_code(lab: Lab) -> int:
    """What the shell is told."""
    report, fail_on = lab.report, lab.options.recipe.fail_on
    if any(gate.verdict == "fail" for gate in report.gates):
        return FOUND
    if fail_on != "never" and report.at_least(fail_on):
        return FOUND
    return CRASHED if report.crashed else CLEAN


def write_report(lab: Lab) -> None:
    """report.json, report.html and the model cards, atomically, on rank 0."""
    if not lab.leads:
        return
    lab.report.to_json(lab.folder / "report.json")
    lab.report.to_html(lab.folder / "report.html")
    write_atomically(lab.folder / "MODEL_CARD.md", lab.report.to_markdown())
    for name in SAVED:
        if (lab.folder / name).is_dir():
            write_model_card(lab.folder / name / "README.md", lab.report)


def set_threads(*, tiny: bool = False) -> None:
    """torch's threads: cores over processes of this machine, unless the user has set them.

    Our own `tiny` networks take one: a step of a few milliseconds is too short to be shared, and
    on two cores the hand-over doubles it.

    Launchers set OMP_NUM_THREADS to 1 by themselves; under one, that value is not the user's.
    """
    asked = os.environ.get("OMP_NUM_THREADS")
    launched = "LOCAL_RANK" in os.environ or any(k.startswith("ACCELERATE_") for k in os.environ)
    if asked is not None and not (launched and asked == "1"):
        return
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(1 if tiny else max(1, cores() // processes))


def _folder(options: Options) -> Path:
    """The output folder, there and writable; emptied of its own files with --restart."""
    folder = Path(str(options.training.output_dir))
    problem = None
    if rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if options.recipe.restart:
                for name in REMADE:
                    shutil.rmtree(folder / name, ignore_errors=True)
                (folder / "experiments.csv").unlink(missing_ok=True)
            write_atomically(folder / "options.json", json.dumps(_asked(options), indent=1))
            free = shutil.disk_usage(folder).free
            if free < NEEDED_BYTES:
                problem = f"--output_dir {folder}: {free / 1e6:.0f} MB free, 200 MB are needed"
        except OSError as error:
            problem = f"--output_dir {folder}: {error.strerror or error}"
    problem = from_rank_0(problem)
    if problem is not None:
        raise UsageError(problem)
    return folder


def _asked(options: Options) -> dict[str, object]:
    """The options as they were resolved, for whoever asks what ran."""
    return {
        "command": list(options.command),
        "given": sorted(options.given),
        "model": vars(options.model),
        "data": vars(options.data),
        "recipe": vars(options.recipe),
    }


def _quieten() -> None:
    """The job's own lines are enough."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    logging.getLogger("torch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")


def _announce(lab: Lab) -> None:
    data = lab.data
    sizes = ", ".join(f"{part} {len(data.splits[part])}" for part in data.splits)
    lab.show.say(f"{data.name}: {data.task.name}, {sizes}")


def _close(lab: Lab, journey: Journey) -> None:
    columns = ["what", "validation loss", lab.metric_name, "seconds"]
    lab.show.table("What was tried", columns, journey.rows)
    lab.show.closing(lab.report, str(lab.folder / "report.html"))
    lab.show.say(f"experiments: {lab.folder / 'experiments.csv'}")


if __name__ == "__main__":
    sys.exit(main())
