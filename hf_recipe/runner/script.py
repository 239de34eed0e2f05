"""`hf-recipe check SCRIPT.py`: an unchanged training script, up to its first step."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer

from hf_recipe.core.report import Report
from hf_recipe.trainer.attach import attach


class ScriptFailed(Exception):
    """The script ended before its first training step; one line says how."""


class _Checked(BaseException):
    """Leaves the script from inside ``train()``; its own ``except Exception`` must not catch it."""

    def __init__(self, report: Report) -> None:
        self.report = report


def check_script(script: str, arguments: Sequence[str] = ()) -> Report:
    """Run `script` as ``__main__`` until it trains; look; go no further.

    Args:
        script: path of a Python file that calls ``Trainer.train()``, also of a subclass.
        arguments: the script's own.

    Raises:
        ScriptFailed: it raised, or ended without training.
    """
    train, argv, path = Trainer.train, sys.argv, list(sys.path)

    def look(trainer: Any, *args: Any, **kwargs: Any) -> None:
        recipe = attach(trainer)
        recipe.preflight()
        recipe.closing.console.summary(recipe.report)
        report = recipe.report
        recipe.detach()
        raise _Checked(report)

    Trainer.train = look
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    try:
        runpy.run_path(script, run_name="__main__")
    except _Checked as checked:
        return checked.report
    except SystemExit as error:
        raise ScriptFailed(f"{script} exited ({error.code}) before it trained") from None
    except Exception as error:  # whatever the script does wrong is its own
        line = str(error).strip().splitlines()
        text = line[0] if line else ""
        raise ScriptFailed(
            f"{script} failed before it trained: {type(error).__name__}: {text}"
        ) from error
    finally:
        Trainer.train, sys.argv, sys.path = train, argv, path
    raise ScriptFailed(f"{script} ended without calling Trainer.train()")
