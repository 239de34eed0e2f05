"""What a trial's process leaves in its folder, and how it is read.

A script of ours writes ``metrics.json`` (and ``curve.jsonl`` while it runs). Any other is read by
what the Trainer itself leaves: ``all_results.json`` or ``eval_results.json``, else the newest
``trainer_state.json``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_recipe.tune.engines import Result
from hf_recipe.tune.study import flat

METRICS, CURVE = "metrics.json", "curve.jsonl"
CARD_LINE = re.compile(r"^- (\w+): (\S+)$", re.MULTILINE)  # of the Trainer's model card
FOLDER_VARIABLE = "HF_RECIPE_TRIAL"  # a trial's process finds its folder here


def key_of(metric: str) -> str:
    """The Trainer's key for a metric as W&B shows it: eval/loss -> eval_loss."""
    head, slash, rest = metric.partition("/")
    return f"{head}_{rest}" if slash and head in ("eval", "test", "train") else metric


def read_result(folder: str | Path, metric: str) -> Result | None:
    """What the trial in `folder` gave; None where nothing whole is there."""
    folder, key = Path(folder), key_of(metric)
    told = _json(folder / METRICS)
    if isinstance(told, dict):
        return _told(told, key, metric)
    found: Any = None
    for name in ("all_results.json", "eval_results.json"):
        found = found or _json(folder / name)
    history = (newest_state(folder) or {}).get("log_history", [])
    curve = tuple(float(h[key]) for h in history if _is_number(h.get(key)))
    if isinstance(found, dict) and key in found:
        return Result("complete", _number(found[key]), curve=curve)
    return Result("complete", curve[-1], curve=curve) if curve else None


def parameters_of_run(folder: str | Path) -> dict[str, Any]:
    """What the run in `folder` was given, by dotted name; {} where it does not tell.

    From our own metrics.json, from the state of the Trainer's ``hyperparameter_search``, or from
    the list of hyperparameters in the Trainer's model card.
    """
    folder = Path(folder)
    told = _json(folder / METRICS)
    params = told.get("params") if isinstance(told, dict) else None
    state = newest_state(folder)
    params = params or (state or {}).get("trial_params")
    if params:
        return dict(flat(params))
    card = folder / "README.md"
    lines = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return {name: _literal(value) for name, value in CARD_LINE.findall(lines)}


def newest_state(folder: Path) -> dict[str, Any] | None:
    """The Trainer's own state, of its newest checkpoint."""
    states = sorted(folder.rglob("trainer_state.json"), key=lambda p: p.stat().st_mtime)
    state = _json(states[-1]) if states else None
    return state if isinstance(state, dict) else None


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _told(told: Mapping[str, Any], key: str, metric: str) -> Result:
    metrics = told.get("metrics") or {}
    value = _number(next((metrics[k] for k in (key, metric) if k in metrics), told.get("value")))
    state = told.get("state", "complete")
    if state == "complete" and value is None:
        known = ", ".join(sorted(metrics)) or "no metrics"
        missing = key not in metrics and metric not in metrics and "value" not in told
        reason = f"{METRICS} holds no {key}, but {known}" if missing else "the metric is not finite"
        return Result("failed" if missing else "infeasible", reason=reason)
    return Result(
        state=state,
        value=value,
        seed=told.get("seed"),
        curve=tuple(float(v) for _, v in told.get("curve", ()) if v is not None),
        seconds=told.get("seconds"),
        reason=told.get("reason", ""),
        facts=told.get("facts", {}),
    )


def read_curve(folder: str | Path, start: int) -> tuple[list[tuple[int, float]], int]:
    """(step, value) lines written since byte `start`, and where to go on."""
    path = Path(folder) / CURVE
    if not path.is_file():
        return [], start
    with path.open("rb") as file:
        file.seek(start)
        lines = file.read().split(b"\n")
    whole = lines[:-1]  # what has no end yet is still being written
    points = [json.loads(line) for line in whole if line.strip()]
    return [(int(s), float(v)) for s, v in points], start + sum(len(x) + 1 for x in whole)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: Any) -> float | None:
    return float(value) if _is_number(value) and math.isfinite(value) else None
