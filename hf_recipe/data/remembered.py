"""What the data probes found is kept under the data sets' fingerprint, whole.

A second launch on the same data reads a file instead of the data. The costly questions (context,
size, variation, shortcuts, drift, cross-validated labels) are asked by `inspect_dataset` and the
runner; a run under `attach` never asks them, and reports what is known of its data set.

Only probes whose outcome rests on the rows and on which columns are input and label are kept (and
on how ids are spelled, where that is part of the name); those that look at a model or a collator
are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from hf_recipe.core.check import Located, Measurement, Probe, Skip, plain, typed
from hf_recipe.core.exhibit import EXHIBITS, Answer
from hf_recipe.data.cache import dataset_fingerprint, recall, remember
from hf_recipe.data.columns import COLUMNS
from hf_recipe.data.context import LADDER
from hf_recipe.data.downsample import SWEEP
from hf_recipe.data.drift import DRIFT
from hf_recipe.data.duplicates import REPEATS
from hf_recipe.data.label_copies import COPIES
from hf_recipe.data.label_probe import SUSPECTS
from hf_recipe.data.labels import COUNTS, seen_counts
from hf_recipe.data.outliers import TAILS
from hf_recipe.data.shortcuts import SHORTCUTS
from hf_recipe.data.source import LABELS, Roles, Source, roles_of, source_of
from hf_recipe.data.splits import OVERLAP
from hf_recipe.data.target_leak import GIVEAWAYS
from hf_recipe.data.tokenizer import special_ids, tokenizer_of
from hf_recipe.data.unreadable import OPENED
from hf_recipe.data.variation import VARIATION
from hf_recipe.data.written import WRITTEN
from hf_recipe.instruments.subject import Subject

OF_TRAINING = frozenset(
    probe.name
    for probe in (LADDER, SWEEP, VARIATION, SHORTCUTS, GIVEAWAYS, COPIES, SUSPECTS, WRITTEN)
)
OF_ALL_SPLITS = frozenset(
    probe.name for probe in (COLUMNS, REPEATS, COUNTS, TAILS, OVERLAP, DRIFT, OPENED)
)
ASKED = OF_TRAINING - {WRITTEN.name, COPIES.name} | {DRIFT.name}  # by inspection alone
KEPT = OF_TRAINING | OF_ALL_SPLITS


def remembering(probe: Probe) -> Probe:
    """`probe`, which reads what it found on the same data before, and keeps what it finds."""
    if probe.name not in KEPT:
        return probe

    def take(subject: Subject) -> Iterable[Any]:
        name = name_of(probe, subject)
        known = _read(probe, name)
        if known is not None:
            return known
        found = list(probe.take(subject))
        if name is not None:
            names = [name]
            if probe.name in ASKED:
                names.append(str(name_of(probe, subject, label_alone=True)))
            for each in names:
                remember(each, probe.name, [_written(item) for item in found])
        return found

    return replace(probe, take=take)


def recalling(probe: Probe) -> Probe:
    """`probe` as a run takes it: a costly one is read if it is known, and never taken."""
    if probe.name not in ASKED:
        return remembering(probe)

    def take(subject: Subject) -> Iterable[Any]:
        for label_alone in (False, True):
            known = _read(probe, name_of(probe, subject, label_alone=label_alone))
            if known is not None:
                return known
        if "inspection" in probe.needs:
            raise Skip("takes seconds of its own: hf_recipe.inspect_dataset(dataset)")
        return probe.take(subject)

    return replace(probe, take=take, needs=())


def is_known(probe: Probe, subject: Subject) -> bool:
    """Whether an inspection of the same data has left what `probe` found."""
    names = (name_of(probe, subject, label_alone=alone) for alone in (False, True))
    return any(_read(probe, name) is not None for name in names)


def name_of(probe: Probe, subject: Subject, *, label_alone: bool = False) -> str | None:
    """The fingerprint of what `probe` reads; None where the data cannot be told by name.

    Args:
        label_alone: whatever the input's columns are: a data set and its label.
    """
    if subject.train is None or subject.train.is_stream:
        return None
    splits = ["train"]
    if probe.name not in OF_TRAINING:
        splits += list(subject.evaluation)
    if any(subject.rows(split).is_stream for split in splits):
        return None
    source = source_of(subject, "train")
    roles = roles_of(subject, source)
    label = "label" if roles.label in LABELS else roles.label
    about: list[Any] = [probe.name, label, splits]
    about.append([kind.version for kind in probe.measures])
    if not label_alone:
        about += [roles.inputs, _form(subject, source, roles)]
    if probe.name not in ASKED:
        about.append(bool(subject.cache.get("raw")))
    if probe.name == COPIES.name:
        about.append(_spelling(subject))
    return dataset_fingerprint(*(subject.rows(name).dataset for name in splits), about=about)


def _spelling(subject: Subject) -> list[Any]:
    """What tells one reading of token ids from another."""
    tokenizer = tokenizer_of(subject)
    words = sorted(tokenizer.get_vocab().items()) if tokenizer is not None else []
    return [sorted(special_ids(subject).every), words]


def _form(subject: Subject, source: Source, roles: Roles) -> str:
    """What the labels are taken for; a model may have a say in it."""
    if "label form" not in subject.cache:
        try:
            subject.cache["label form"] = seen_counts(subject, source, roles).form
        except Skip as reason:
            subject.cache["label form"] = str(reason)
    return str(subject.cache["label form"])


# ---------------------------------------------------------------- as JSON


def _written(item: Any) -> Any:
    if isinstance(item, Located):
        return {"split": item.split, **_written(item.measurement)}
    if isinstance(item, Measurement):
        return {"measurement": item.kind(), "values": item.values()}
    return {"kind": type(item).__name__, "values": plain(item)}


def _read(probe: Probe, name: str | None) -> list[Any] | None:
    """What is kept of `probe` under `name`; None where nothing is, or nothing of this version."""
    kept = None if name is None else recall(name, probe.name)
    if not isinstance(kept, list):
        return None
    try:
        return list(_items(probe, kept))
    except (TypeError, ValueError, KeyError):
        return None


def _items(probe: Probe, kept: Sequence[Any]) -> Iterator[Any]:
    kinds = {kind.kind(): kind for kind in probe.measures}
    for item in kept:
        if "measurement" in item:
            found = kinds[item["measurement"]].from_values(item["values"])
            yield Located(found, item["split"]) if "split" in item else found
        else:
            drawn = {**EXHIBITS, "Answer": Answer}[item["kind"]]
            yield typed(drawn, item["values"])
