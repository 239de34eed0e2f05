"""The end of the job: learn from train and validation, then read the test set, once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from hf_recipe.core.exhibit import Answer, Table
from hf_recipe.core.report import write_atomically
from hf_recipe.instruments.distributed import from_rank_0
from hf_recipe.runner.cards import card_head
from hf_recipe.runner.distil import load_together, together
from hf_recipe.runner.distilling import predict, student_of
from hf_recipe.runner.experiment import Lab
from hf_recipe.runner.journey import Journey, mean
from hf_recipe.runner.setup import Setup

BOTH = "train+validation"
SAVED = ("model", "student")


def read_test(journey: Journey) -> list[list[str]]:
    """Refit the chosen setup and its student; read the test set; lines of the last table.

    The refit model takes the place of the ensemble's last member: it has seen more rows.
    """
    lab = journey.lab
    setup = _whole(journey).change(part=BOTH, keep=True)
    refit = setup.variant("refit on train + validation", lab.seeds[0])
    lab.train(refit)
    model = lab.model_path(refit)
    ensemble = together([model, *journey.teachers[: max(0, len(journey.teachers) - 1)]])
    taught = student_of(journey).change(
        part=BOTH, keep=True, early_stopping=False, teacher=ensemble
    )
    student = taught.variant("student, refit and distilled", lab.seeds[0])
    lab.train(student)
    models = {"model": str(model), "ensemble": ensemble, "student": str(lab.model_path(student))}
    if ensemble == models["model"]:
        del models["ensemble"]
    results = _results(lab, setup, models)
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
        for name in SAVED:
            shutil.copytree(models[name], lab.folder / name, dirs_exist_ok=True)
            head = card_head(name, lab.data.name, lab.metric_name, results, lab.report)
            write_atomically(lab.folder / name / "README.md", head)
    return lines


def _whole(journey: Journey) -> Setup:
    """What stands, for rows that leave none to stop by: as long as it went until it was stopped."""
    setup = journey.setup
    if not setup.early_stopping:
        return setup
    seen = [o.facts for o in journey.outcomes("what stands", setup)]
    share = mean([facts["steps"] / facts["planned"] for facts in seen])
    return setup.change(early_stopping=False, epochs=share * setup.epochs)


def _results(lab: Lab, setup: Setup, models: dict[str, str]) -> dict[str, dict[str, Any]]:
    """All models' results; from the file where this very reading has been done before."""
    key = "-".join(Path(models[name]).name for name in SAVED)
    path = lab.folder / "test" / f"{key}.json"
    known = json.loads(path.read_text()) if lab.leads and path.is_file() else None
    known = from_rank_0(known)
    if known is not None:
        return dict(known)
    results = {name: _read(lab, setup, folders) for name, folders in models.items()}
    if lab.leads:
        write_atomically(path, json.dumps(results))
    return results


def _read(lab: Lab, setup: Setup, folders: str) -> dict[str, Any]:
    model = load_together(folders)
    seen = predict(lab, setup, model, "test")
    losses = np.asarray(seen["row_losses"])
    return {
        **seen["metrics"],
        "loss": float(losses.mean()),
        "loss_error": float(losses.std(ddof=1) / np.sqrt(len(losses))),
        "rows": len(losses),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _line(lab: Lab, name: str, result: dict[str, Any]) -> list[str]:
    text = f"{result[lab.metric_name]:.4f}" + lab.data.task.interval(result)
    called = "ensemble, the teacher" if name == "ensemble" else name
    loss = f"{result['loss']:.4f} +- {result['loss_error']:.4f}"
    return [f"test: {called} ({result['parameters']:,} parameters)", loss, text, ""]
