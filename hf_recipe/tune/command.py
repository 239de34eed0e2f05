"""A trial's command line, in the words of a W&B sweep, so that one file serves every engine.

``command:`` is a list of words; of W&B's macros these are known here: ``${env}``,
``${interpreter}``, ``${program}``, ``${args}``, ``${args_no_hyphens}``,
``${args_no_boolean_flags}``, ``${args_json}`` and ``${envvar:NAME}``. One more is ours:
``${folder}``, the trial's own folder.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

DEFAULT = ("${env}", "${interpreter}", "${program}", "${args}")
ENVIRONMENT = re.compile(r"\$\{envvar:([^}]+)\}")
LEFT_OVER = re.compile(r"\$\{[^}]*\}")


def flags(params: Mapping[str, Any], prefix: str = "--") -> list[str]:
    """``--name=value`` of each value, as W&B writes them."""
    return [f"{prefix}{name}={_text(value)}" for name, value in params.items()]


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


def _no_booleans(params: Mapping[str, Any]) -> list[str]:
    """A True as a bare flag, a False as nothing."""
    said = {k: v for k, v in params.items() if v is not False}
    return [f"--{k}" if v is True else flags({k: v})[0] for k, v in said.items()]


def expand(
    command: Sequence[str],
    params: Mapping[str, Any],
    *,
    program: str = "",
    folder: str = "",
    interpreter: str = "python",
) -> list[str]:
    """The words of a trial's command line.

    Raises:
        ValueError: a macro that is not known here, a variable of the environment that is not set.
    """
    lists = {
        "${env}": ["/usr/bin/env"] if os.name == "posix" else [],
        "${args}": flags(params),
        "${args_no_hyphens}": flags(params, ""),
        "${args_no_boolean_flags}": _no_booleans(params),
        "${args_json}": [json.dumps(dict(params))],
    }
    words = {"${interpreter}": interpreter, "${program}": program, "${folder}": folder}
    out: list[str] = []
    for given in command or DEFAULT:
        if given in lists:
            out += lists[given]
            continue
        word = given
        for macro, value in words.items():
            word = word.replace(macro, value)
        word = ENVIRONMENT.sub(_variable, word)
        unknown = LEFT_OVER.search(word)
        if unknown:
            raise ValueError(
                f"command: {unknown.group()} is not known here; known: "
                f"{', '.join([*lists, *words, '${envvar:NAME}'])}"
            )
        out.append(word)
    return out


def _variable(match: re.Match[str]) -> str:
    name = match.group(1)
    if name not in os.environ:
        raise ValueError(f"command: the environment has no variable {name}")
    return os.environ[name]
