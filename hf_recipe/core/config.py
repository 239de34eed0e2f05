"""Settings: which checks run, how severe they are, and where each value came from.

Precedence: call argument > command line > ``recipe.yaml`` > ``[tool.hf_recipe]`` in
``pyproject.toml`` > default. A name that does not exist is an error that suggests the nearest.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Real
from pathlib import Path
from typing import Any

from hf_recipe.core.finding import SEVERITIES, STAGES, Severity

ON_ERROR = ("warn", "stop", "raise")


@dataclass(frozen=True)
class Settings:
    """What the user asked for, and the origin of each value.

    Attributes:
        select: check names or stages to run; None: all.
        ignore: check names or stages not to run.
        expect: checks that are meant to fire: silent if they do, a finding if they do not.
        severity: severity by check.
        thresholds: keyword arguments of judging functions, by check.
        on_error: on findings of severity error: "warn", "stop" the training, or "raise".
        baseline: path of an earlier report (JSON); what stands in it is not reported again.
        report_dir: folder of the report; None: ``<output_dir>/recipe``.
        overhead: share of a step's time that monitors may use; see `layers.interval_of`.
        log_samples: whether rows of the data may leave the machine.
        origins: where each value that is not a default came from.
    """

    select: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = ()
    expect: tuple[str, ...] = ()
    severity: Mapping[str, Severity] = field(default_factory=dict)
    thresholds: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    on_error: str = "warn"
    baseline: str | None = None
    report_dir: str | None = None
    overhead: float = 0.01
    log_samples: bool = False
    origins: Mapping[str, str] = field(default_factory=dict)

    def selects(self, name: str, stage: str) -> bool:
        """Whether the check `name` of `stage` runs."""
        if name in self.ignore or (stage in self.ignore and name not in (self.select or ())):
            return False
        return self.select is None or name in self.select or stage in self.select

    @classmethod
    def resolve(
        cls,
        arguments: Mapping[str, Any] | None = None,
        command_line: Mapping[str, Any] | None = None,
        *,
        checks: Mapping[str, Collection[str]],
        directory: str | Path | None = None,
    ) -> Settings:
        """Merge the four sources; validate every name and value.

        Args:
            arguments: values given in a call; None means "not given".
            command_line: values given on the command line; None means "not given".
            checks: for each known check the names of its thresholds.
            directory: where ``recipe.yaml`` and ``pyproject.toml`` are looked for; default: here.

        Raises:
            ValueError: an unknown name (with the nearest known one) or a value out of range.
        """
        folder = Path(directory) if directory is not None else Path.cwd()
        known = {f.name for f in fields(cls)} - {"origins"}
        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        sources: list[tuple[str, Mapping[str, Any]]] = [
            ("[tool.hf_recipe] in pyproject.toml", _from_pyproject(folder / "pyproject.toml")),
            ("recipe.yaml", _from_yaml(folder / "recipe.yaml")),
            ("command line", command_line or {}),
            ("argument", arguments or {}),
        ]
        for origin, given in sources:
            for key, value in given.items():
                name = str(key)
                if name not in known:
                    _refuse_typo(name, known, origin)
                elif value is not None:
                    values[name], origins[name] = value, origin
        settings = cls(**{k: _shaped(k, v, origins[k]) for k, v in values.items()}, origins=origins)
        settings._validate(checks)
        return settings

    def _validate(self, checks: Mapping[str, Collection[str]]) -> None:
        selectable = [*checks, *STAGES]
        for option in ("select", "ignore"):
            for name in getattr(self, option) or ():
                require_known(name, selectable, f"{option}: check or stage")
        for name in self.expect:
            require_known(name, checks, "expect: check")
        for name, severity in self.severity.items():
            require_known(name, checks, "severity: check")
            require_known(severity, SEVERITIES, f"severity of {name}")
        for name, given in self.thresholds.items():
            require_known(name, checks, "thresholds: check")
            for threshold, value in given.items():
                require_known(threshold, checks[name], f"thresholds: {name} has no threshold")
                if isinstance(value, bool) or not isinstance(value, Real):
                    raise ValueError(
                        f"thresholds: {threshold} of {name} must be a number; got {value!r}"
                    )
        require_known(self.on_error, ON_ERROR, "on_error")
        if not 0 < self.overhead <= 1:
            raise ValueError(f"overhead must lie in (0, 1]; got {self.overhead}")
        if self.baseline is not None and not Path(self.baseline).is_file():
            raise ValueError(f"baseline: no such file: {self.baseline}")


def require_known(name: str, known: Iterable[str], what: str) -> None:
    """Raise ValueError, with the nearest known name, unless `name` is known."""
    names = list(known)
    if name in names:
        return
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names[:8]) or 'none'}"
    raise ValueError(f"unknown {what} {name!r}; {hint}")


def _refuse_typo(name: str, known: Collection[str], origin: str) -> None:
    """Files may hold keys of other tools; a near miss of ours is an error all the same."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if near or origin == "argument":
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
        raise ValueError(f"unknown setting {name!r} ({origin}); {hint}")


def _shaped(name: str, value: Any, origin: str) -> Any:
    if name in ("select", "ignore", "expect"):
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, (list, tuple, set, frozenset)):
            raise ValueError(f"{name} ({origin}) must be a list of names; got {value!r}")
        return tuple(str(item).strip() for item in items if str(item).strip())
    if name in ("severity", "thresholds"):
        if not isinstance(value, Mapping) or (
            name == "thresholds" and not all(isinstance(v, Mapping) for v in value.values())
        ):
            raise ValueError(f"{name} ({origin}) must map check names; got {value!r}")
        return dict(value)
    if name in ("baseline", "report_dir"):
        return str(value)
    if name == "overhead":
        try:
            return float(value)
        except (TypeError, ValueError):
            raise ValueError(f"overhead ({origin}) must be a number; got {value!r}") from None
    if name == "log_samples" and not isinstance(value, bool):
        raise ValueError(f"log_samples ({origin}) must be true or false; got {value!r}")
    return value


def _from_pyproject(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    ours = table.get("hf_recipe", {})
    if not isinstance(ours, Mapping):
        raise ValueError(f"{path}: [tool.hf_recipe] must be a table; got {ours!r}")
    return dict(ours)


def _from_yaml(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold `name: value` lines; got {type(content).__name__}")
    return dict(content)
