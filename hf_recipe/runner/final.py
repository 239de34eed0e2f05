"""The end of the job: learn from train and validation, then read the test set, once."""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
from transformers import Trainer
from transformers.trainer_utils import IntervalStrategy

from hf_recipe.core.exhibit import Answer, Table
from hf_recipe.core.report import write_atomically
from hf_recipe.instruments.compare import Variant
from hf_recipe.instruments.distributed import from_rank_0
from hf_recipe.runner.experiment import Lab
from hf_recipe.runner.journey import Journey
from hf_recipe.runner.models import load_saved
from hf_recipe.runner.setup import Setup
from hf_recipe.runner.tune_stage import student_of

BOTH = "train+validation"


def read_test(journey: Journey) -> list[list[str]]:
    """Refit the chosen setup and its student; read the test set; lines of the last table."""
    lab = journey.lab
    setup = journey.setup.change(part=BOTH, keep=True, early_stopping=False)
    teacher = setup.variant("refit on train + validation", lab.seeds[0])
    lab.train(teacher)
    taught = student_of(journey).change(
        part=BOTH, keep=True, early_stopping=False, teacher=str(lab.model_path(teacher))
    )
    student = taught.variant("student, refit and distilled", lab.seeds[0])
    lab.train(student)
    results = _results(lab, {"teacher": teacher, "student": student})
    lines = [_line(lab, name, result) for name, result in results.items()]
    for line in lines:
        lab.show.say(f"  {line[0]}: {lab.metric_name} {line[2]}, loss {line[1]}")
    columns = ("model", "loss", lab.metric_name, "parameters")
    rows = tuple(
        (name, r["loss"], r[lab.metric_name], r["parameters"]) for name, r in results.items()
    )
    lab.report.exhibit(Table("Test, read once", "tune", columns, rows))
    lab.report.answer(
        Answer("How good is it on data that chose nothing?", "tune", f"test: {lines[0][2]}")
    )
    if lab.leads:
        for name, variant in (("model", teacher), ("student", student)):
            shutil.copytree(lab.model_path(variant), lab.folder / name, dirs_exist_ok=True)
    return lines


def _results(lab: Lab, variants: dict[str, Variant]) -> dict[str, dict[str, Any]]:
    """Both models' results; from the file where this very reading has been done before."""
    path = lab.folder / "test" / f"{'-'.join(v.key for v in variants.values())}.json"
    known = json.loads(path.read_text()) if lab.leads and path.is_file() else None
    known = from_rank_0(known)
    if known is not None:
        return dict(known)
    results = {name: _read(lab, variant) for name, variant in variants.items()}
    if lab.leads:
        write_atomically(path, json.dumps(results))
    return results


def _read(lab: Lab, variant: Variant) -> dict[str, Any]:
    args = lab.arguments(Setup(**variant.settings), variant)
    args.report_to, args.dataloader_drop_last = [], False
    args.eval_strategy = IntervalStrategy.NO
    model = load_saved(lab.model_path(variant))
    trainer = Trainer(
        model=model,
        args=args,
        **lab.measured(lab.feed),
    )
    seen = trainer.predict(lab.feed.rows("test"))
    losses = np.asarray(lab.data.task.row_losses(seen.predictions, seen.label_ids))
    shutil.rmtree(args.output_dir, ignore_errors=True)
    metrics = {k.removeprefix("test_"): float(v) for k, v in seen.metrics.items()}
    return {
        **{k: v for k, v in metrics.items() if not k.endswith(("runtime", "_second"))},
        "loss": float(losses.mean()),
        "loss_error": float(losses.std(ddof=1) / np.sqrt(len(losses))),
        "rows": len(losses),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _line(lab: Lab, name: str, result: dict[str, Any]) -> list[str]:
    text = f"{result[lab.metric_name]:.4f}" + lab.data.task.interval(result)
    loss = f"{result['loss']:.4f} +- {result['loss_error']:.4f}"
    return [f"test: {name} ({result['parameters']:,} parameters)", loss, text, ""]
