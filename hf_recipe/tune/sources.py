"""The trials of a study, from wherever it was run: Optuna, an export of W&B, or a job's folder."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_recipe.tune.wandb_sweep import trials_of_export

STATES = {"COMPLETE": "complete", "PRUNED": "failed", "FAIL": "failed"}


def read_trials(source: str, names: Sequence[str], metric: str) -> list[dict[str, Any]]:
    """The finished trials of `source`, as `tune.analysis.analyse` takes them.

    Args:
        source: an Optuna storage (a journal file, or a database's URL); a .csv or .json export of
            W&B's runs; a folder that holds either the journal of ``hf-recipe sweep run`` or the
            main job's experiments.csv.
        names: the searched parameters, dotted.
        metric: as the search knows it; in experiments.csv it is the validation loss.

    Raises:
        ValueError: nothing that can be read is there.
    """
    path = Path(source)
    if path.is_dir():
        for name, read in (("study.journal", _optuna), ("experiments.csv", _ledger)):
            if (path / name).is_file():
                return read(str(path / name), names)
        raise ValueError(f"{source} holds neither a study.journal nor an experiments.csv")
    if "://" not in source and not path.is_file():
        raise ValueError(f"no such file or folder: {source}")
    if path.suffix == ".csv":
        return trials_of_export(_csv(source), names, metric)
    if path.suffix == ".json":
        return trials_of_export(json.loads(path.read_text(encoding="utf-8")), names, metric)
    return _optuna(source, names)


def _optuna(source: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """All studies of a storage as one; dropped trials are no trials."""
    from hf_recipe.tune.optuna_points import import_optuna, open_storage

    optuna, storage = import_optuna(), open_storage(source)
    found = []
    for study in optuna.get_all_study_names(storage):
        for trial in optuna.load_study(study_name=study, storage=storage).trials:
            notes = trial.user_attrs
            if not trial.state.is_finished() or "dropped" in notes:
                continue
            told = notes.get("result") or {}
            params = notes.get("params") or trial.params
            one = {
                "params": {n: params[n] for n in names if n in params},
                "value": trial.value if trial.state.name == "COMPLETE" else None,
                "state": STATES[trial.state.name],
                "curve": told.get("curve") or list(trial.intermediate_values.values()),
            }
            seed = told.get("seed")
            found.append(one if seed is None else one | {"seed": seed})
    return found


def _ledger(source: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """The main job's experiments that differ in what is asked about alone."""
    found = []
    for row in _csv(source):
        settings, loss = json.loads(row["config"]), float(row["validation_loss"])
        whole = settings.get("part") == "train" and not settings.get("teacher")
        if whole and all(name in settings for name in names):
            finite = math.isfinite(loss)
            found.append(
                {
                    "params": {name: settings[name] for name in names},
                    "value": loss if finite else None,
                    "state": "complete" if finite else "failed",
                    "seed": int(row["seed"]),
                }
            )
    return found


def _csv(source: str) -> list[dict[str, Any]]:
    """Rows with numbers where the text is one."""
    with Path(source).open(newline="", encoding="utf-8") as file:
        return [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(file)]


def _number(text: Any) -> Any:
    try:
        return float(text)
    except (TypeError, ValueError):
        return text
