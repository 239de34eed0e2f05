"""The catalogue: every check, probe and monitor, collected from the modules named here.

Nothing registers itself: a module defines module-level `Check`, `Probe` and `Monitor` objects,
and naming the module below is what puts them into the catalogue.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from hf_recipe.core.check import Check, Measurement, Monitor, Probe, judged
from hf_recipe.core.report import Report

MODULES: tuple[str, ...] = (
    "hf_recipe.data.answers",
    "hf_recipe.data.blank",
    "hf_recipe.data.columns",
    "hf_recipe.data.columns_dropped",
    "hf_recipe.data.context",
    "hf_recipe.data.downsample",
    "hf_recipe.data.drift",
    "hf_recipe.data.drift_glance",
    "hf_recipe.data.duplicates",
    "hf_recipe.data.input_scale",
    "hf_recipe.data.label_copies",
    "hf_recipe.data.label_head",
    "hf_recipe.data.label_probe",
    "hf_recipe.data.labels",
    "hf_recipe.data.masks",
    "hf_recipe.data.near",
    "hf_recipe.data.order",
    "hf_recipe.data.outliers",
    "hf_recipe.data.shortcuts",
    "hf_recipe.data.splits",
    "hf_recipe.data.stale",
    "hf_recipe.data.suspect_label",
    "hf_recipe.data.target_leak",
    "hf_recipe.data.target_scale",
    "hf_recipe.data.targets",
    "hf_recipe.data.tokens",
    "hf_recipe.data.truncation",
    "hf_recipe.data.unreadable",
    "hf_recipe.data.variation",
    "hf_recipe.data.vocabulary",
    "hf_recipe.data.word_labels",
    "hf_recipe.data.written",
    "hf_recipe.baselines.accumulation",
    "hf_recipe.baselines.augmentation",
    "hf_recipe.baselines.batch_size",
    "hf_recipe.baselines.dependency",
    "hf_recipe.baselines.evaluation_memory",
    "hf_recipe.baselines.frozen",
    "hf_recipe.baselines.gradient_reach",
    "hf_recipe.baselines.hockey_stick",
    "hf_recipe.baselines.human",
    "hf_recipe.baselines.initial_loss",
    "hf_recipe.baselines.initialisation",
    "hf_recipe.baselines.input_blind",
    "hf_recipe.baselines.input_reach",
    "hf_recipe.baselines.leaks",
    "hf_recipe.baselines.loaded",
    "hf_recipe.baselines.loss_falls",
    "hf_recipe.baselines.loss_operands",
    "hf_recipe.baselines.loss_pairs",
    "hf_recipe.baselines.loss_units",
    "hf_recipe.baselines.modes",
    "hf_recipe.baselines.new_tokens",
    "hf_recipe.baselines.one_batch",
    "hf_recipe.baselines.optimizer_wiring",
    "hf_recipe.baselines.output_bias",
    "hf_recipe.baselines.packing",
    "hf_recipe.baselines.rehearsal",
    "hf_recipe.baselines.repeatability",
    "hf_recipe.baselines.save_rehearsal",
    "hf_recipe.baselines.step_gradient",
    "hf_recipe.baselines.terms",
    "hf_recipe.baselines.tied",
    "hf_recipe.baselines.vectorise",
    "hf_recipe.baselines.wiring",
    "hf_recipe.complexify.accumulates",
    "hf_recipe.complexify.architectures",
    "hf_recipe.complexify.batchnorm",
    "hf_recipe.complexify.checkpoint_reload",
    "hf_recipe.complexify.batchnorm_ranks",
    "hf_recipe.complexify.clipping",
    "hf_recipe.complexify.dead_units",
    "hf_recipe.complexify.feeding",
    "hf_recipe.complexify.gradient_depth",
    "hf_recipe.complexify.growth",
    "hf_recipe.complexify.loss_course",
    "hf_recipe.complexify.loss_spikes",
    "hf_recipe.complexify.nonfinite_origin",
    "hf_recipe.complexify.rank_noise",
    "hf_recipe.complexify.ranks",
    "hf_recipe.complexify.rate_race",
    "hf_recipe.complexify.resuming",
    "hf_recipe.complexify.schedule",
    "hf_recipe.complexify.schedule_advice",
    "hf_recipe.complexify.updates",
    "hf_recipe.regularize.features",
    "hf_recipe.regularize.late_noise",
    "hf_recipe.regularize.metric_agreement",
    "hf_recipe.regularize.more_data",
    "hf_recipe.regularize.overfitting",
    "hf_recipe.regularize.selection",
    "hf_recipe.regularize.simple_model",
    "hf_recipe.regularize.stop_wiring",
    "hf_recipe.regularize.weight_decay",
    "hf_recipe.tune.study_checks",
    "hf_recipe.tune.teacher_gain",
    "hf_recipe.tune.teacher_spaces",
    "hf_recipe.tune.teacher_weight",
    "hf_recipe.tune.teachers",
)


class _Lazy(Mapping[str, Any]):
    """A mapping by name that imports the catalogue's modules on first use."""

    def __init__(self, kind: Any) -> None:
        self._kind = kind

    @functools.cached_property
    def _items(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for module in MODULES:
            for item in vars(importlib.import_module(module)).values():
                if isinstance(item, self._kind):
                    known = found.setdefault(item.name, item)
                    if known is not item:
                        raise ValueError(f"two different {self._kind.__name__}s named {item.name}")
        return found

    def __getitem__(self, name: str) -> Any:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


CHECKS: Mapping[str, Check] = _Lazy(Check)
PROBES: Mapping[str, Probe] = _Lazy(Probe)
MONITORS: Mapping[str, Monitor] = _Lazy(Monitor)


@functools.cache
def measurement_kinds() -> dict[str, type[Measurement]]:
    """Every kind of measurement that some check judges, by name."""
    kinds = (judged(judge) for check in CHECKS.values() for judge in check.judges)
    return {kind.kind(): kind for kind in kinds}


def rejudge(report: Report, thresholds: Mapping[str, Mapping[str, Any]] | None = None) -> Report:
    """Judge a stored report's measurements again, under other thresholds.

    Returns a new report with the same measurements; findings of measurements that were not
    stored, and of kinds or versions no longer known, are not repeated but listed as skipped.
    """
    kinds = measurement_kinds()
    again = Report.from_dict(report.to_dict())
    again.flat, again.ran, again.crashed = [], {}, {}
    severity = report.settings.get("severity") or {}
    for stored in report.measurements:
        kind = kinds.get(stored.kind)
        if kind is None or kind.version != stored.version:
            continue
        try:
            measurement = kind.from_values(stored.values)
        except TypeError:  # a report without its private fields
            continue
        for check in CHECKS.values():
            if stored.kind not in check.by_kind or check.name not in report.ran:
                continue
            again.ran.setdefault(check.name, [])
            if stored.moment not in again.ran[check.name]:
                again.ran[check.name].append(stored.moment)
            for fault in check.judge(measurement, (thresholds or {}).get(check.name)):
                again.add(
                    check.finding(fault, split=stored.split, step=stored.step, severity=severity)
                )
    for name in report.ran:
        if name not in again.ran:
            again.skipped[name] = "its measurement is not in the stored report"
    return again
