"""The recipe in a project's own tests: a training script that was healthy stays so.

    from hf_recipe.testing import assert_finds, assert_healthy, assert_no_trace

    def test_our_training_is_healthy(tmp_path):
        assert_healthy(build_trainer(tmp_path), train=True)

Build the Trainer small (a few rows, ``max_steps=20``): most faults of a pipeline show before
step 1, and the rest within some steps.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch

from hf_recipe.catalogue import CHECKS
from hf_recipe.core.config import require_known
from hf_recipe.core.finding import Finding
from hf_recipe.core.report import Report
from hf_recipe.trainer.attach import attach


def examined(
    trainer: Any, *, train: bool = False, preflight: bool = True, **settings: Any
) -> Report:
    """Attach, preflight, train if asked to, detach; the report.

    Args:
        train: call ``trainer.train()`` too; otherwise the weights stay as they are.
        preflight: run the probes beforehand; else they run as ``train()`` begins.
        settings: arguments of `hf_recipe.attach`.

    Raises:
        AssertionError: a check of ours crashed; it is named with its error.
    """
    recipe = attach(trainer, **settings)
    try:
        if preflight:
            recipe.preflight()
        if train:
            trainer.train()
    finally:
        recipe.detach()
    assert recipe.report.crashed == {}, f"crashed: {recipe.report.crashed}"
    return recipe.report


def alarms(report: Report) -> list[Finding]:
    """The roots that are warnings or errors; notes are none."""
    return [finding for finding in report.findings if finding.severity != "note"]


def assert_healthy(
    trainer: Any, *, train: bool = False, allow: Collection[str] = (), **settings: Any
) -> Report:
    """Nothing is wrong with this Trainer that the recipe can see.

    Args:
        allow: checks whose findings are known and accepted here.

    Raises:
        AssertionError: what was found, with the numbers and the line that mends each.
    """
    report = examined(trainer, train=train, **settings)
    unexpected = [finding for finding in alarms(report) if finding.check not in allow]
    assert not unexpected, _told(f"{len(unexpected)} unexpected", unexpected)
    return report


def assert_finds(
    trainer: Any,
    check: str,
    *,
    train: bool = False,
    also: Collection[str] = (),
    **settings: Any,
) -> Report:
    """This fault is found, as a cause of its own, and no other alarm goes off.

    Args:
        check: the name that must be found, a note or an alarm.
        also: further alarms that the same fault may rightly raise.

    Raises:
        ValueError: no such check; the nearest name is told.
        AssertionError: it was not found (with the reason, where it did not run), or others were.
    """
    require_known(check, CHECKS, "check")
    report = examined(trainer, train=train, **settings)
    why = report.skipped.get(check) or ("it ran" if check in report.ran else "it did not run")
    found = any(finding.check == check for finding in report.findings)
    assert found, _told(f"{check} was not found ({why}); instead", report.findings)
    others = [f for f in alarms(report) if f.check != check and f.check not in also]
    assert not others, _told(f"besides {check}", others)
    return report


def assert_no_trace(build: Callable[[], Any], **settings: Any) -> None:
    """Training is bit-identical with and without the recipe.

    Args:
        build: makes the same Trainer anew at each call, seeds included.
        settings: arguments of `hf_recipe.attach`.

    Raises:
        AssertionError: the first thing that differs, by name.
    """
    bare = build()
    bare.train()
    left = traces(bare)
    watched = build()
    examined(watched, train=True, **settings)
    with_us = traces(watched)
    assert left.keys() == with_us.keys(), sorted(left.keys() ^ with_us.keys())
    for name, value in left.items():
        assert value == with_us[name], f"{name} differs between the bare and the watched run"


def traces(trainer: Any) -> dict[str, bytes]:
    """What a run leaves, as bytes by name: weights, optimizer, random state, logged losses."""
    found = {f"weight {name}": _bytes(v) for name, v in trainer.model.state_dict().items()}
    for index, state in trainer.optimizer.state_dict()["state"].items():
        tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
        found |= {f"optimizer {index} {k}": _bytes(v) for k, v in tensors.items()}
    found["random state of torch"] = _bytes(torch.get_rng_state())
    found["random state of numpy"] = pickle.dumps(np.random.get_state(legacy=False))
    found["random state of python"] = pickle.dumps(random.getstate())
    kept = [
        {k: v for k, v in entry.items() if "loss" in k or "norm" in k or k == "step"}
        for entry in trainer.state.log_history
    ]
    found["logged losses"] = repr(kept).encode()
    return found


def _bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().tobytes())


def _told(what: str, findings: Collection[Finding]) -> str:
    lines = [f"{f.severity}[{f.check}] {f.message}; fix: {f.fix}" for f in findings]
    return "\n  ".join([f"{what}:", *(lines or ["nothing"])])
