"""The nouns of the chain: probe or monitor -> measurement -> check -> fault.

A *measurement* is a frozen dataclass of plain numbers, so that it can be stored in a report and
judged again. A *check* holds, in one place, the name of a fault, why it matters, the line that
mends it and the pure functions that see it in a measurement. A *probe* takes measurements before
step 1; a *monitor* folds the recorder's windows into measurements while the run goes on. Neither
of the two has an opinion.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from hf_recipe.core.exhibit import Answer, Exhibit
from hf_recipe.core.finding import Fault, Finding, Moment, Severity, Stage

M = TypeVar("M", bound="Measurement")


class Skip(Exception):
    """Raised by a probe that cannot run here; its message is the reason, shown to the user."""


def private(**kwargs: Any) -> Any:
    """A dataclass field that holds values out of the user's data: it is never uploaded."""
    return field(metadata={"private": True}, **kwargs)


@dataclass(frozen=True)
class Measurement:
    """Base of all measurements: numbers and names, no tensors, no opinion.

    Fields are bool, int, float, str, None, other frozen dataclasses, and tuples or
    ``dict[str, ...]`` of these. ``version`` is raised when the meaning of a field changes.
    """

    version: ClassVar[int] = 1

    @classmethod
    def kind(cls) -> str:
        return cls.__name__

    def values(self) -> dict[str, Any]:
        """The fields as JSON-able values (NaN and infinities are tagged; see `plain`)."""
        return {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_values(cls: type[M], values: Mapping[str, Any]) -> M:
        """The measurement that `values` came from; fields added since take their defaults."""
        hints = hints_of(cls)  # type: ignore[arg-type]
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{k: typed(hints[k], v) for k, v in values.items() if k in known})


@functools.cache
def private_paths(record: Any) -> tuple[str, ...]:
    """Dotted paths of the private fields of a measurement, nested records included.

    A path goes through tuples unmarked and through ``dict[str, ...]`` as ``*``.
    """
    found: list[str] = []
    hints = hints_of(record)
    for item in dataclasses.fields(record):
        if item.metadata.get("private"):
            found.append(item.name)
        else:
            found += [f"{item.name}.{path}" for path in _private_within(hints[item.name])]
    return tuple(found)


def _private_within(hint: Any) -> list[str]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return list(private_paths(hint))
    step = "*." if typing.get_origin(hint) in (dict, Mapping) else ""
    return [f"{step}{path}" for a in typing.get_args(hint) for path in _private_within(a)]


def without(values: Any, path: str) -> Any:
    """`values` (JSON) without what stands at a dotted `path` of `private_paths`."""
    if isinstance(values, (list, tuple)):
        return [without(item, path) for item in values]
    if not isinstance(values, Mapping):
        return values
    head, _, rest = path.partition(".")
    if not rest:
        return {key: item for key, item in values.items() if key != head}
    return {
        key: without(item, rest) if head in ("*", key) else item for key, item in values.items()
    }


def plain(value: Any) -> Any:
    """`value` as JSON without bare NaN: non-finite floats become ``{"$float": "nan"}``."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return [plain(item) for item in sorted(value, key=repr)]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if hasattr(value, "tolist"):  # a numpy or torch value that slipped in
        return plain(value.tolist())
    return str(value)


def unplain(value: Any) -> Any:
    """The inverse of `plain` for untyped values."""
    if isinstance(value, Mapping):
        if set(value) == {"$float"}:
            return float(value["$float"])
        return {key: unplain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [unplain(item) for item in value]
    return value


@functools.cache
def hints_of(cls: Any) -> dict[str, Any]:
    """The resolved field annotations of a dataclass."""
    return typing.get_type_hints(cls)


def typed(hint: Any, value: Any) -> Any:
    """`value` (from JSON) as the type that a field declares: lists to tuples, dicts to records."""
    if isinstance(value, Mapping) and set(value) == {"$float"}:
        return float(value["$float"])
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return typed(_arm(arguments, value), value)
    if origin is tuple and isinstance(value, (list, tuple)):
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(typed(arguments[0], item) for item in value)
        return tuple(typed(a, item) for a, item in zip(arguments, value, strict=True))
    if origin is list and isinstance(value, (list, tuple)):
        return [typed(arguments[0], item) for item in value]
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {key: typed(arguments[1], item) for key, item in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, Mapping):
        hints = hints_of(hint)
        return hint(**{k: typed(hints[k], v) for k, v in value.items() if k in hints})
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return unplain(value)


def _arm(arms: tuple[Any, ...], value: Any) -> Any:
    """The member of a union that `value` (from JSON) belongs to."""
    if value is None or isinstance(value, str):
        return Any
    if isinstance(value, (Mapping, list, tuple)):
        containers = (tuple, list) if not isinstance(value, Mapping) else (dict, Mapping)
        for arm in arms:
            record = dataclasses.is_dataclass(arm) and isinstance(value, Mapping)
            if record or typing.get_origin(arm) in containers:
                return arm
        return Any
    return float if float in arms and int not in arms else Any


Judge = Callable[..., Iterable[Fault]]


@dataclass(frozen=True)
class Threshold:
    """A keyword-only argument of a judging function: a number a user may set."""

    name: str
    default: Any
    provenance: str


@dataclass(frozen=True)
class Check:
    """One fault: its name, why it matters, what mends it, and the functions that see it.

    Args:
        name: the fault in kebab-case; never reused for another one.
        severity: the default; a fault may carry its own.
        moments: when its measurements are taken.
        why: at most two lines, ending in a period.
        fix: a line of code.
        source: where the rule comes from, with the year.
        unsure: known false positives and limits, honestly.
        judges: one function per kind of measurement. The annotation of its first argument says
            which kind; its keyword-only arguments are thresholds, annotated
            ``Annotated[float, "where the default comes from"]``. It touches no tensor.
        explains: checks whose findings this one accounts for.
        call: the call that runs it, if it does not run by itself.
    """

    name: str
    stage: Stage
    severity: Severity
    moments: tuple[Moment, ...]
    why: str
    fix: str
    source: str
    judges: tuple[Judge, ...]
    unsure: str = ""
    explains: tuple[str, ...] = ()
    call: str = ""

    @functools.cached_property
    def by_kind(self) -> dict[str, Judge]:
        return {judged(judge).kind(): judge for judge in self.judges}

    @functools.cached_property
    def thresholds(self) -> dict[str, Threshold]:
        found = {}
        for judge in self.judges:
            hints = typing.get_type_hints(judge, include_extras=True)
            for name, parameter in inspect.signature(judge).parameters.items():
                if parameter.kind is parameter.KEYWORD_ONLY:
                    notes = getattr(hints.get(name), "__metadata__", ("",))
                    found[name] = Threshold(name, parameter.default, str(notes[0]))
        return found

    def judge(
        self, measurement: Measurement, thresholds: Mapping[str, Any] | None = None
    ) -> Iterator[Fault]:
        """Yield the faults that this check sees in `measurement`."""
        judge = self.by_kind.get(measurement.kind())
        if judge is None:
            return
        if not thresholds:
            yield from judge(measurement)
            return
        accepted = inspect.signature(judge).parameters
        yield from judge(measurement, **{k: v for k, v in thresholds.items() if k in accepted})

    def finding(
        self,
        fault: Fault,
        *,
        split: str = "",
        step: int | None = None,
        severity: Mapping[str, Any] | None = None,
    ) -> Finding:
        """What a fault of this check becomes; `severity` by check goes before everything else."""
        return Finding(
            check=self.name,
            stage=self.stage,
            severity=(severity or {}).get(self.name) or fault.severity or self.severity,
            message=fault.message,
            subject=fault.subject,
            evidence=dict(fault.evidence),
            why=self.why,
            fix=fault.fix or self.fix,
            examples=fault.examples,
            quotes=fault.quotes,
            split=split,
            step=step,
            last_step=step,
        )


@functools.cache
def judged(judge: Judge) -> type[Measurement]:
    """The kind of measurement that a judging function takes: its first argument's annotation."""
    first = next(iter(inspect.signature(judge).parameters))
    kind = typing.get_type_hints(judge)[first]
    if not (isinstance(kind, type) and issubclass(kind, Measurement)):
        raise TypeError(
            f"{judge.__qualname__}: the first argument must be annotated with a Measurement; "
            f"got {kind!r}"
        )
    return kind


Taken = Measurement | Exhibit | Answer


@dataclass(frozen=True)
class Located:
    """A measurement that belongs to one split of the data (``train``, ``validation``, ...)."""

    measurement: Measurement
    split: str


@dataclass(frozen=True)
class Probe:
    """Takes measurements before step 1, inside the quiet guard, leaving no trace.

    Args:
        name: verb and noun, for progress bars and crash reports.
        moment: ``dataset`` and ``batch`` probes read data (rank 0 alone, told to the others),
            ``static`` ones read the configuration, ``probe`` ones run the model.
        measures: the kinds of measurement it yields.
        take: gets the subject; yields measurements (bare or `Located`), exhibits and answers;
            raises `Skip` with the reason where it cannot.
        needs: what must be there: "fresh" (weights that no step has moved), "optimizer"
            (optimizer and scheduler exist), "trainer" (a Trainer, not a callback alone),
            "inspection" (seconds of time: `inspect_dataset` and the runner take it, a run does
            not).
        serves: checks whose monitors use what it measures as evidence, though they do not judge
            it themselves.
    """

    name: str
    moment: Moment
    measures: tuple[type[Measurement], ...]
    take: Callable[[Any], Iterable[Taken | Located]]
    needs: tuple[str, ...] = ()
    serves: tuple[str, ...] = ()


State = dict[str, Any]


@dataclass(frozen=True)
class Monitor:
    """Folds the recorder's windows into measurements while the run goes on.

    ``fold(state, window, seen)`` returns ``(state, measurement or None)``. The state is JSON, so
    that it survives a resume; the window holds the host numbers of one flush, the same on all
    ranks; ``seen`` is the latest measurement of each kind so far: two pieces of evidence make a
    third. A ``patient`` one has nothing to tell between two evaluations: past the run's beginning
    it is given the steps of many flushes together.
    """

    name: str
    moment: Moment
    measures: tuple[type[Measurement], ...]
    fold: Callable[[State, Any, Mapping[str, Measurement]], tuple[State, Measurement | None]]
    patient: bool = False
