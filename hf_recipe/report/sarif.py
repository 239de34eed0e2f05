"""The findings as SARIF 2.1.0, the format of code-scanning dashboards.

These live on other machines, so what is written is the redacted report.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from hf_recipe.core.check import plain
from hf_recipe.core.finding import Finding
from hf_recipe.core.report import Report

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def render_sarif(report: Report, *, script: str | None = None) -> str:
    """The findings as SARIF 2.1.0.

    Args:
        report: what was found; symptoms are written as results of their own.
        script: the training script, relative to the repository. A finding has no line of source;
            dashboards that want a place show it at the top of this file.
    """
    redacted = report.redacted()
    rules: dict[str, dict[str, Any]] = {}
    for finding in redacted.flat:
        rules.setdefault(finding.check, _rule(finding))
    names = list(rules)
    notices = [
        _notice(name, "error", f"{name} crashed: {error}")
        for name, error in redacted.crashed.items()
    ] + [
        _notice(name, "note", f"{name} was skipped: {reason}")
        for name, reason in redacted.skipped.items()
    ]
    run = {
        "tool": {"driver": {"name": "hf_recipe", "rules": list(rules.values())}},
        "columnKind": "unicodeCodePoints",
        "invocations": [
            {
                "executionSuccessful": redacted.status != "failed" and not redacted.crashed,
                "toolExecutionNotifications": notices,
            }
        ],
        "results": [_result(f, names.index(f.check), script) for f in redacted.flat],
    }
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=1)


def _rule(finding: Finding) -> dict[str, Any]:
    help_text = "\n".join(
        filter(
            None,
            [
                finding.why,
                f"Fix: {finding.fix}" if finding.fix else "",
                f'Silence: ignore=["{finding.check}"]',
                f"More: hf-recipe explain {finding.check}",
            ],
        )
    )
    markdown = "\n\n".join(
        filter(
            None,
            [
                finding.why,
                f"```python\n{finding.fix}\n```" if finding.fix else "",
                f"`hf-recipe explain {finding.check}`",
            ],
        )
    )
    return {
        "id": finding.check,
        "name": "".join(part.capitalize() for part in finding.check.split("-")),
        "shortDescription": {"text": finding.check.replace("-", " ")},
        "fullDescription": {"text": finding.why or finding.check.replace("-", " ")},
        "help": {"text": help_text, "markdown": markdown},
        "defaultConfiguration": {"level": finding.severity},
        "properties": {"tags": [finding.stage]},
    }


def _result(finding: Finding, rule: int, script: str | None) -> dict[str, Any]:
    place = "/".join(filter(None, [finding.split, finding.subject])) or finding.stage
    location: dict[str, Any] = {
        "logicalLocations": [{"fullyQualifiedName": place, "kind": "member"}]
    }
    if script is not None:
        location["physicalLocation"] = {
            "artifactLocation": {"uri": script.replace("\\", "/")},
            "region": {"startLine": 1},
        }
    identity = "\x1f".join(finding.identity)
    about = f"{finding.subject}: " if finding.subject not in finding.message else ""
    return {
        "ruleId": finding.check,
        "ruleIndex": rule,
        "level": finding.severity,
        "kind": "fail",
        "message": {"text": f"{about}{finding.message}"},
        "locations": [location],
        "occurrenceCount": finding.count,
        "partialFingerprints": {"identity/v1": hashlib.sha256(identity.encode()).hexdigest()[:32]},
        "properties": {
            "stage": finding.stage,
            "split": finding.split,
            "step": finding.step,
            "evidence": plain(finding.evidence),
        },
    }


def _notice(check: str, level: str, message: str) -> dict[str, Any]:
    return {
        "level": level,
        "message": {"text": message},
        "descriptor": {"id": check},
    }
