"""What a check says, why, and what mends it: from the generated catalogue, without torch."""

from __future__ import annotations

import functools
import json
import textwrap
from pathlib import Path
from typing import Any

from hf_recipe.core.config import require_known

LABEL, WIDTH = 16, 100


@functools.cache
def stored_checks() -> dict[str, dict[str, Any]]:
    """The generated ``checks.json``: what `explain` and the settings need."""
    text = Path(__file__).with_name("checks.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def explain(name: str) -> str:
    """What is known of the check `name`, as text of at most 100 columns.

    Raises:
        ValueError: no check has that name; the nearest one is suggested.
    """
    checks = stored_checks()
    require_known(name, checks, "check")
    entry = checks[name]
    moments = ", ".join(entry["moments"])
    lines = [f"{name}   {entry['severity']}, stage {entry['stage']}, looked at: {moments}", ""]
    fields = [("why", entry["why"]), ("fix", entry["fix"]), ("known problems", entry["unsure"])]
    fields += [("source", entry["source"]), ("runs by", entry["call"])]
    fields += [("accounts for", ", ".join(entry["explains"]))]
    for label, text in fields:
        if text:
            lines += _hanging(label, text)
    for threshold, told in entry["thresholds"].items():
        why = f"   ({told['provenance']})" if told["provenance"] else ""
        lines += _hanging("threshold", f"{threshold} = {told['default']}{why}")
    lines += ["", f"{'silence':<{LABEL}}hf_recipe.attach(trainer, ignore=[{name!r}])"]
    return "\n".join(lines)


def _hanging(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"{label:<{LABEL}}", subsequent_indent=" " * LABEL
    )
