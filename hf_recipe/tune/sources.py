"""The trials of a study, from wherever it was run: Optuna, W&B, or a folder of runs."""

from __future__ import annotations

import ast
import contextlib
import csv
import difflib
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_recipe.tune.results import parameters_of_run, read_result
from hf_recipe.tune.study import flat

Trials = list[dict[str, Any]]

UNQUOTED = re.compile(r"(?<=: )(nan|-?inf)\b")  # numbers that are no Python literals
STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
KNOWN = (
    "a study.journal, the main job's experiments.csv, W&B's runs, or a folder per run that tells "
    "its parameters (metrics.json, trainer_state.json of hyperparameter_search, a model card)"
)


def read_trials(
    source: str, names: Sequence[str], metric: str, *, study: str | None = None
) -> Trials:
    """The trials of `source`, as `tune.analysis.analyse` takes them.

    Args:
        source: an Optuna storage (a journal file, or a database's URL); a .csv or .json export of
            W&B's runs; a folder: of ``hf-recipe sweep run``, of the main job, W&B's own, or of
            runs.
        names: the searched parameters, dotted.
        metric: as the search knows it; in experiments.csv it is the validation loss.
        study: which one of a storage that holds several.

    Raises:
        ValueError: nothing that can be read is there, or nothing of what was searched.
    """
    path = Path(source)
    if path.is_dir():
        return _folder(path, names, metric, study)
    if "://" not in source and not path.is_file():
        raise ValueError(f"no such file or folder: {source}")
    if path.suffix == ".csv":
        return trials_of_export(_csv(source), names, metric)
    if path.suffix == ".json":
        return trials_of_export(json.loads(path.read_text(encoding="utf-8")), names, metric)
    return _optuna(source, names, study)


def _folder(path: Path, names: Sequence[str], metric: str, study: str | None) -> Trials:
    if (path / "study.journal").is_file():
        return _optuna(str(path / "study.journal"), names, study)
    if (path / "experiments.csv").is_file():
        return _ledger(str(path / "experiments.csv"), names)
    records = sorted([*path.glob("*run-*/*.wandb"), *path.glob("wandb/*run-*/*.wandb")])
    if records:
        return trials_of_export(map(_record, records), names, metric)
    found = _chosen(_runs(path, metric), names)
    if not found:
        raise ValueError(f"{path} holds none of: {KNOWN}")
    return found


def _chosen(trials: Iterable[dict[str, Any]], names: Sequence[str]) -> Trials:
    """Those that tell any of what was searched, with that alone."""
    cut = ({**t, "params": {n: t["params"][n] for n in names if n in t["params"]}} for t in trials)
    return [trial for trial in cut if trial["params"]]


def _seed(value: Any) -> dict[str, int]:
    return {} if value is None else {"seed": int(value)}


# ------------------------------------------------------------------ Optuna


def _optuna(source: str, names: Sequence[str], study: str | None) -> Trials:
    """The finished trials of one study; dropped ones are none."""
    from hf_recipe.tune.optuna_points import import_optuna, open_storage

    optuna, storage = import_optuna(), open_storage(source)
    known = optuna.get_all_study_names(storage)
    if study not in known and (study is not None or len(known) != 1):
        raise ValueError(f"{source} holds the studies {', '.join(known) or '(none)'}; say --study")
    found = []
    for trial in optuna.load_study(study_name=study or known[0], storage=storage).trials:
        notes = trial.user_attrs
        if not trial.state.is_finished() or "dropped" in notes:
            continue
        told = notes.get("result") or {}
        state = STATES[trial.state.name]
        one = {
            "params": notes.get("params") or trial.params,
            "value": trial.value if state == "complete" else None,
            "state": "failed" if told.get("state") == "infeasible" else state,
            "curve": told.get("curve") or list(trial.intermediate_values.values()),
        }
        found.append(one | _seed(told.get("seed")))
    return _chosen(found, names)


# ------------------------------------------------------------------ W&B


def trials_of_export(
    rows: Iterable[Mapping[str, Any]], names: Sequence[str], metric: str
) -> Trials:
    """Trials out of a W&B project's exported runs.

    Args:
        rows: one mapping per run, flat as its page exports them, or with a ``config`` and a
            ``summary`` as its API gives them.
        names: the searched parameters.
        metric: the summary's key.

    Raises:
        ValueError: there are runs, and none of them tells what was searched, or the metric.
    """
    flattened = [_flattened(row) for row in rows]
    for wanted, what in ((names, "parameters"), ([metric], "metric")):
        keys = sorted(set().union(*flattened))
        if flattened and not set(wanted) & set(keys):
            near = difflib.get_close_matches(wanted[0], keys, 3, 0.5)
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise ValueError(
                f"none of {len(flattened)} runs tells the {what} {', '.join(wanted)}{hint}"
            )
    found = []
    for row in flattened:
        value = row.get(metric)
        one = {
            "params": row,
            "value": _finite(value),
            "state": str(row.get("State", row.get("state", "finished"))).lower(),
        }
        found.append(one | _seed(row.get("seed")))
    return _chosen(found, names)


def _flattened(row: Mapping[str, Any]) -> dict[str, Any]:
    """A run's row with what its config and summary hold; nothing where a cell is empty."""
    own = {k: v for k, v in row.items() if v not in (None, "")}
    for part in ("config", "summary"):
        held = own.pop(part, None)
        if isinstance(held, str):  # a cell of the csv that W&B's guide to its API makes
            with contextlib.suppress(ValueError, SyntaxError):
                held = ast.literal_eval(UNQUOTED.sub(r"'\1'", held))
        if isinstance(held, Mapping):
            own |= flat(held)
    return own


def _record(path: Path) -> dict[str, Any]:
    """A run of W&B's own folder, online or offline, by W&B's own reader."""
    words = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(path)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{path}: {(done.stderr.strip() or 'unreadable').splitlines()[-1]}")
    return dict(json.loads(done.stdout))


# ------------------------------------------------------------------ folders and tables


def _runs(path: Path, metric: str) -> Iterator[dict[str, Any]]:
    """The runs in the folders of `path`."""
    for folder in sorted(p for p in path.iterdir() if p.is_dir()):
        params, result = parameters_of_run(folder), read_result(folder, metric)
        if params and result is not None:
            told = result.checked()
            one = {
                "params": params,
                "value": told.value,
                "state": {"complete": "complete", "pruned": "pruned"}.get(told.state, "failed"),
                "curve": list(told.curve),
            }
            yield one | _seed(params.get("seed") if told.seed is None else told.seed)


def _ledger(source: str, names: Sequence[str]) -> Trials:
    """The main job's experiments that differ in what is asked about alone."""
    found = []
    for row in _csv(source):
        settings, loss = json.loads(row["config"]), _finite(row["validation_loss"])
        whole = settings.get("part") == "train" and not settings.get("teacher")
        if whole and all(name in settings for name in names):
            found.append(
                {
                    "params": {name: settings[name] for name in names},
                    "value": loss,
                    "state": "failed" if loss is None else "complete",
                    "seed": int(row["seed"]),
                }
            )
    return found


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(float(value)) else None


def _csv(source: str) -> list[dict[str, Any]]:
    """Rows with numbers where the text is one."""
    with Path(source).open(newline="", encoding="utf-8") as file:
        return [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(file)]


def _number(text: Any) -> Any:
    if text in ("true", "false"):  # as W&B writes them
        return text == "true"
    try:
        return float(text)
    except (TypeError, ValueError):
        return text
