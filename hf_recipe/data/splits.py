"""Do evaluation rows stand in the training set too?

The recipe chooses by the validation loss; rows that were trained on make it a memory test. Rows
are compared by a 64-bit hash of what the model sees (`input_ids`, the image's bytes, the text),
so that a differing row number or label does not hide a copy.

Poor inputs (a few categories, a short text) repeat by chance. A training row's chance to have a
twin among the other training rows is what an evaluation row's chance would be if both were drawn
alike; poor rows count as leaked only beyond that. Rich ones (long texts, images) never repeat by
chance: a twin is a copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hf_recipe.core.check import Check, Located, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault, Severity
from hf_recipe.data.hashing import Hashes, is_list, row_bits, table_hashes
from hf_recipe.data.near import near_leak
from hf_recipe.data.source import Roles, Source, roles_of, source_of
from hf_recipe.instruments.batches import has_rows
from hf_recipe.instruments.subject import Subject

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class SplitOverlap(Measurement):
    """Rows of an evaluation set whose inputs stand in the training set.

    Attributes:
        columns: what was compared.
        train_rows, rows: rows read of the training and of the evaluation set.
        train_distinct: different inputs among the training rows.
        copies: evaluation rows with the same input as a training row.
        whole: of these, rows that agree in every shared column.
        relabelled: of these, rows whose label is another one; None without comparable labels.
        rich: copies too rich in information to agree by chance.
        rich_expected, rich_deviation: rich copies to expect, and its standard deviation, from
            how often training rows repeat each other (a random split of repeated rows).
        poor_expected, poor_deviation: the same for the others.
        same_data: the evaluation set is the training set itself.
        declared: the evaluation set's name says that it is training data.
        copied: rows, of both splits, that were copied before they were split; see `copied`.
        note: how much was read, where not all was.
        examples: evaluation rows that are copies, rich ones first.
    """

    columns: tuple[str, ...]
    train_rows: int
    rows: int
    train_distinct: int
    copies: int = 0
    whole: int = 0
    relabelled: int | None = None
    rich: int = 0
    rich_expected: float = 0.0
    rich_deviation: float = 0.0
    poor_expected: float = 0.0
    poor_deviation: float = 0.0
    same_data: bool = False
    declared: bool = False
    copied: int = 0
    note: str = ""
    examples: tuple[int, ...] = ()


def take_overlap(subject: Subject) -> Iterator[Located]:
    """Compare every evaluation set with the training set."""
    if not subject.evaluation:
        raise Skip("there is no evaluation set to compare with the training set")
    train = source_of(subject, "train")
    reasons = []
    for split in subject.evaluation:
        try:
            evaluation = source_of(subject, split)
            yield Located(overlap(subject, train, evaluation), split)
        except Skip as reason:
            reasons.append(str(reason))
    if len(reasons) == len(subject.evaluation):
        raise Skip("; ".join(dict.fromkeys(reasons)))


def overlap(subject: Subject, train: Source, evaluation: Source) -> SplitOverlap:
    """What `evaluation` shares with `train`; raises Skip where rows cannot be compared."""
    roles, other = roles_of(subject, train), roles_of(subject, evaluation)
    columns = tuple(sorted(set(roles.inputs) & set(other.inputs)))
    if not columns:
        raise Skip(f"train and {evaluation.name} share no input column")
    if train.varies or evaluation.varies:
        raise Skip("a row comes out differently each time it is read, so copies cannot be seen")
    same = is_training_set(subject, evaluation.name)
    declared = "train" in evaluation.name.lower()
    train_hashes, hashes = _hashes(train, columns), _hashes(evaluation, columns)
    distinct, places, counts = np.unique(train_hashes, return_inverse=True, return_counts=True)
    found = np.isin(hashes, distinct)
    basis = SplitOverlap(
        columns=columns,
        train_rows=len(train_hashes),
        rows=len(hashes),
        train_distinct=len(distinct),
        copies=int(found.sum()),
        same_data=same,
        declared=declared,
        note="; ".join(f"{s.name}: {s.note}" for s in (train, evaluation) if s.note),
    )
    if not found.any() or same:
        return basis
    enough = math.log2(max(len(train_hashes) * len(hashes), 2)) + 10  # one chance in 1,000
    rich = _rich(evaluation, columns, found, enough)
    repeated = counts[places] > 1
    rich_repeated = _rich(train, columns, repeated, enough)
    rich_expected, rich_deviation = chance(train_hashes, rich_repeated, hashes, rich)
    poor_expected, poor_deviation = chance(
        train_hashes, repeated & ~rich_repeated, hashes, found & ~rich
    )
    order = np.concatenate([np.flatnonzero(rich), np.flatnonzero(found & ~rich)])
    return SplitOverlap(
        **{
            **vars(basis),
            "whole": _whole(train, evaluation),
            "relabelled": _relabelled(train, evaluation, roles, train_hashes, hashes, found),
            "rich": int(rich.sum()),
            "rich_expected": rich_expected,
            "rich_deviation": rich_deviation,
            "poor_expected": poor_expected,
            "poor_deviation": poor_deviation,
            "copied": copied(train_hashes, hashes) if len(hashes) else 0,
            "examples": tuple(int(evaluation.rows[i]) for i in order[:20]),
        }
    )


def chance(
    train_hashes: Hashes, repeated: Flags, hashes: Hashes, found: Flags
) -> tuple[float, float]:
    """Copies to expect when both splits are drawn alike, with the standard deviation.

    The share of training rows with a twin among the others estimates an evaluation row's chance
    of one; equal rows are one cluster, since they are found or missed together.

    Args:
        train_hashes, repeated: the training rows, and which of them have a twin among them.
        hashes, found: the evaluation rows, and which of them have a twin in training.
    """
    rate = float(repeated.mean())
    # three rows (the rule of three) stand for repeats that this training set is too small to show
    spread = (rate + 3 / max(len(train_hashes), 1)) * cluster_size(hashes[found]) * len(hashes)
    shared = _mean_variance(train_hashes, repeated) * len(hashes) ** 2
    return rate * len(hashes), math.sqrt(spread + shared)


def cluster_size(hashes: Hashes) -> float:
    """Mean size of the cluster of equal hashes that an element stands in; 1 where there is none."""
    _, counts = np.unique(hashes, return_counts=True)
    return float((counts.astype(np.float64) ** 2).sum() / counts.sum()) if len(counts) else 1.0


def _mean_variance(hashes: Hashes, flags: Flags) -> float:
    """Variance of the mean of `flags`, with equal hashes as clusters."""
    _, places = np.unique(hashes, return_inverse=True)
    sums = np.bincount(places, weights=flags - flags.mean())
    return float((sums**2).sum()) / max(len(hashes), 1) ** 2


def _hashes(source: Source, columns: Sequence[str]) -> Hashes:
    parts = [table_hashes(chunk, columns) for chunk in source.chunks(columns)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint64)


def _rich(source: Source, columns: Sequence[str], chosen: Flags, enough: float) -> Flags:
    """Which of the chosen rows hold more than `enough` bits."""
    rich = np.zeros(len(chosen), dtype=bool)
    if not chosen.any():
        return rich
    start = 0
    bits = []
    for chunk in source.chunks(columns):
        inside = chosen[start : start + chunk.num_rows]
        if inside.any():
            bits.append(row_bits(chunk, columns)[inside])
        start += chunk.num_rows
    rich[chosen] = np.concatenate(bits) > enough
    return rich


def _whole(train: Source, evaluation: Source) -> int:
    shared = sorted(set(train.columns) & set(evaluation.columns))
    return int(np.isin(_hashes(evaluation, shared), _hashes(train, shared)).sum())


def _relabelled(
    train: Source,
    evaluation: Source,
    roles: Roles,
    train_hashes: Hashes,
    hashes: Hashes,
    found: Flags,
) -> int | None:
    """Copies none of whose twins in training has their label; None where labels are sequences."""
    label = roles.label
    if label is None or label not in evaluation.columns or label not in train.columns:
        return None
    first: pa.Table = next(train.chunks([label]))
    if is_list(first.schema.field(label).type):
        return None
    pairs = train_hashes ^ _hashes(train, [label])
    wanted = hashes ^ _hashes(evaluation, [label])
    return int((found & ~np.isin(wanted, pairs)).sum())


def is_training_set(subject: Subject, split: str) -> bool:
    """Whether an evaluation set is the training set: itself, or the same inputs row by row."""
    train, evaluation = subject.rows("train").dataset, subject.rows(split).dataset
    if train is evaluation:
        return True
    fingerprints: list[Any] = [getattr(d, "_fingerprint", None) for d in (train, evaluation)]
    if fingerprints[0] is not None and fingerprints[0] == fingerprints[1]:
        return True
    if not (has_rows(train) and has_rows(evaluation)) or len(train) != len(evaluation):
        return False
    try:
        one, two = source_of(subject, "train"), source_of(subject, split)
        columns = roles_of(subject, one).inputs
    except Skip:
        return False
    if not columns or not set(columns) <= set(two.columns) or one.varies or two.varies:
        return False
    hashes = _hashes(one, columns)
    return len(hashes) > 1 and bool((hashes == _hashes(two, columns)).all())


def copied(train: Hashes, evaluation: Hashes) -> int:
    """Rows of inputs that stand so and so often as copies do, and as no chance would have it.

    Inputs that repeat because their world is small come k times with frequencies p_k of a mixture
    of Poisson distributions, for which k p_k^2 <= (k + 1) p_(k-1) p_(k+1) (Cauchy and Schwarz):
    many twins mean some triplets. Rows copied before the split (a class repeated to even out its
    share, a data set joined to itself) leave a hole there.

    Returns:
        Rows of the inputs that come that often; 0 where there is no such hole.
    """
    _, counts = np.unique(np.concatenate([train, evaluation]), return_counts=True)
    seen = np.bincount(counts, minlength=3).astype(float)
    seen = np.concatenate([seen, [0.0]])
    for times in range(len(seen) - 2, 1, -1):
        wanted = times * seen[times] ** 2 / ((times + 1) * max(seen[times - 1], 1.0))
        if seen[times] >= 20 and wanted >= 12 and seen[times + 1] <= wanted / 4:
            return int(times * seen[times])
    return 0


def split_leak(
    overlap: SplitOverlap,
    *,
    deviations: Annotated[
        float, "standard deviations beyond chance; 5 is a false alarm in a million"
    ] = 5.0,
    error_fraction: Annotated[
        float, "share of rows from which a leak moves a metric by more than its last digit; judged"
    ] = 0.005,
    mean_copies: Annotated[
        float, "copies per input beyond which the inputs are a small world of their own; judged"
    ] = 3.0,
) -> Iterator[Fault]:
    """Copies beyond chance; none is reported where the set is, or says it is, training data."""
    if overlap.same_data or overlap.declared or not overlap.copies:
        return
    poor = overlap.copies - overlap.rich
    rich_beyond = overlap.rich - overlap.rich_expected > deviations * overlap.rich_deviation
    # a twin or two can always be chance where rows are poor, unless rich rows leak beside them
    excess = poor - overlap.poor_expected
    poor_leaks = excess > deviations * overlap.poor_deviation + 2 or (
        rich_beyond and excess > overlap.poor_deviation
    )
    small_world = overlap.train_rows > mean_copies * overlap.train_distinct
    copied_before = overlap.copied > 0 and overlap.rich > 0 and not small_world and not rich_beyond
    rich_beyond = rich_beyond or copied_before
    leaked = (poor if poor_leaks else 0) + (overlap.rich if rich_beyond or not small_world else 0)
    if not leaked:
        return
    share = leaked / overlap.rows
    expected = overlap.rich_expected + overlap.poor_expected
    beyond_chance = poor_leaks or rich_beyond
    parts = [f"{leaked:,} of {overlap.rows:,} rows ({share:.1%}) stand in the training set too"]
    if overlap.relabelled:
        parts.append(f"{overlap.relabelled:,} of them under another label")
    if copied_before:
        parts.append(
            f"{overlap.copied:,} rows of both were copied before they were split: their inputs "
            "come as often as copies do and as no chance would have it"
        )
    elif not beyond_chance:
        parts.append(
            "as many as a random split of a training set that repeats itself would give"
            if expected >= 0.5
            else "so few that a random split of such rows could give them"
        )
    if overlap.note:
        parts.append(overlap.note)
    # What a random split of such rows gives is the data's nature: repeats, and a stray twin or two.
    loud: Severity = "error" if share >= error_fraction else "warning"
    yield Fault(
        message="; ".join(parts) + f" (compared: {', '.join(overlap.columns)})",
        severity=loud if beyond_chance else "note",
        fix='parts = whole.train_test_split(0.2)  # first; then repeat rows of parts["train"]'
        if copied_before
        else _without_copies(overlap.columns),
        evidence={
            "seen": f"{leaked:,} copies",
            "expected": "none" if expected < 0.5 else f"{expected:.0f} by repetition alone",
            "copies": leaked,
            "fraction": share,
            "relabelled": overlap.relabelled,
            "whole_rows": overlap.whole,
        },
        examples=overlap.examples,
    )


def _without_copies(columns: Sequence[str]) -> str:
    row = f"str(row[{columns[0]!r}])" if len(columns) == 1 else f"str([row[c] for c in {columns}])"
    return (
        f"seen = {{{row} for row in train}}; "
        f"validation = validation.filter(lambda row: {row} not in seen)"
    )


OVERLAP = Probe("compare splits", "dataset", (SplitOverlap,), take_overlap)

SPLIT_LEAK = Check(
    name="split-leak",
    stage="data",
    severity="error",
    moments=("dataset",),
    why="Rows that were trained on measure memory: the validation loss falls while the model "
    "overfits, and every choice made by it is wrong.",
    fix="seen = set(map(str, train[column])); "
    "validation = validation.filter(lambda row: str(row[column]) not in seen)",
    source="Karpathy 2019; Lee et al. 2022 (arXiv:2107.06499)",
    judges=(split_leak, near_leak),
    unsure="Inputs from a small world of long sequences (counting, grammars) repeat lawfully; they "
    "are told from copies by how often training rows repeat each other. Near copies are searched "
    "by inspect_dataset alone.",
)
