"""Can the label be told without reading the input?

From its length, the kinds of its characters, an image's brightness or file, from which cells are
missing: a network finds such a shortcut first, and fails where it does not hold. One fact that
tells the label about as well as the content does is a warning; what tells less is a note, since
lengths and brightness may rightly go with the label. Row numbers, files' sizes and formats and
columns that the model never gets are notes too: they say how the data was put together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt

from hf_recipe.core.check import Check, Located, Measurement, Skip
from hf_recipe.core.exhibit import Table
from hf_recipe.core.finding import Fault
from hf_recipe.data.asked import CALL, asking, chance_cell
from hf_recipe.data.cheap import (
    POWER,
    Trial,
    additive,
    auc_error,
    binned,
    chance_of,
    kernel,
    linear,
    looked_up,
    trees,
)
from hf_recipe.data.context import (
    LARGEST,
    at_most,
    patch_words,
    pixels_trial,
    pooled,
    tokens_of,
    words_trial,
)
from hf_recipe.data.metadata import metadata
from hf_recipe.data.sample import Sample, contents_of, gather, sample_of
from hf_recipe.data.source import roles_of
from hf_recipe.data.words import bag, neighbours, ordered_pairs
from hf_recipe.instruments.subject import Subject

Floats = npt.NDArray[np.float64]
CHANCE = 1e-3  # of an alarm per data set under the null
SHARE = 0.8  # of the content's lead over chance from which reading adds little
OF_FILES = {"bytes": "file's bytes", "format": "file's format"}  # no model sees them


@dataclass(frozen=True)
class Told:
    """How well one thing tells the label, on held-out rows.

    `auc` is of one class against the rest, mean over classes; `p` its chance under shuffled labels.
    """

    name: str
    auc: float
    p: float


@dataclass(frozen=True)
class LabelShortcuts(Measurement):
    """What tells the label without reading the input.

    Attributes:
        label: the label's column.
        metadata: all facts about the input together; None where none varies.
        content: the simplest probe that reads the input.
        facts: each fact by itself, best first.
        order: the row number.
        others: columns that the model does not get, each by itself, best first.
        rows: held-out rows.
        visible: the smallest AUC that would have been seen four times in five.
        unread: columns of kinds that were not looked at.
        note: how the rows were drawn.
    """

    label: str
    metadata: Told | None
    content: Told
    facts: tuple[Told, ...]
    order: Told
    others: tuple[Told, ...]
    rows: int
    visible: float
    unread: tuple[str, ...] = ()
    note: str = ""


def take_shortcuts(subject: Subject) -> Iterator[Located | Table]:
    """Look for shortcuts in the training set's sample."""
    sample = sample_of(subject)
    measured = measure(subject, sample)
    yield Located(measured, "train")
    yield shortcut_table(measured)


def measure(subject: Subject, sample: Sample) -> LabelShortcuts:
    """Everything about the sample's rows that is not their content, against their labels."""
    roles = roles_of(subject, sample.source)
    tokens = tokens_of(subject, sample)
    facts = metadata(sample.inputs, tokens)
    labels, held = sample.labels, sample.held
    codes = {n: binned(v, held) for n, v in facts.items() if n not in OF_FILES}
    together = additive("metadata", list(codes.values()), labels, held) if codes else None
    single = _best_first([told(looked_up(n, c, labels, held)) for n, c in codes.items()])
    spare = [c for c in sample.source.columns if c not in (*roles.inputs, roles.label)]
    spare_table = gather(sample.source, sample.places, spare) if spare else None
    others = [_single(name, facts[n], sample) for n, name in OF_FILES.items() if n in facts]
    unread = sample.inputs.unread
    if spare_table is not None:
        rest, good = contents_of(subject, sample.source, spare_table, sample.places)
        if good.all():
            others += [_single(n, v, sample) for n, v in rest.columns.items() if "[" not in n]
        unread += rest.unread
    counts = np.bincount(labels[held], minlength=sample.classes)
    largest = int(counts.max())
    return LabelShortcuts(
        label=str(roles.label),
        metadata=told(together) if together is not None else None,
        content=told(content_trial(subject, sample, single[0].auc if single else 0.5)),
        facts=single,
        order=_single("row number", sample.rows.astype(np.float64), sample),
        others=_best_first(others),
        rows=int(held.sum()),
        visible=smallest_visible(largest, int(counts.sum()) - largest),
        unread=unread,
        note=sample.note,
    )


def smallest_visible(positive: int, rest: int, chance: float = CHANCE) -> float:
    """The AUC that a test at `chance` sees four times in five."""
    from scipy.special import ndtri

    if not positive or not rest:
        return 1.0
    return min(1.0, 0.5 + (POWER - float(ndtri(chance))) * auc_error(positive, rest))


def content_trial(subject: Subject, sample: Sample, rival: float) -> Trial:
    """The best probe that reads the input; later ones are tried while `rival` (AUC) matches it.

    A fact is no shortcut because one blind probe reads less than it: pixels say nothing of
    texture, words nothing of their order.
    """
    trials = content_trials(subject, sample)
    best = next(trials, None)
    if best is None:
        raise Skip("no input column could be read: " + ", ".join(sample.inputs.unread))
    while rival - 0.5 >= SHARE * (best.auc - 0.5):
        trial = next(trials, None)
        if trial is None:
            break
        best = max(best, trial, key=lambda t: t.auc)
    return best


def content_trials(subject: Subject, sample: Sample) -> Iterator[Trial]:
    """Probes that read the input, the cheapest first."""
    tokens, pictures = tokens_of(subject, sample), sample.inputs.pictures
    labels, held = sample.labels, sample.held
    if pictures is not None:
        yield pixels_trial(subject, sample, pictures)
        words = patch_words(at_most(pictures, LARGEST).mean(axis=3), held)
        yield kernel("patches anywhere", pooled(words, 1), labels, held)
    elif sample.inputs.sounds is not None:
        yield trees("recordings", sample.inputs.sounds.bands, labels, held)
    elif tokens is not None:
        yield words_trial(subject, sample, tokens)
        yield linear("neighbours", bag(tokens) + neighbours(tokens), labels, held)
        yield linear("words in their order", bag(tokens) + ordered_pairs(tokens), labels, held)
    elif sample.inputs.columns:
        columns = np.stack(list(sample.inputs.columns.values()), axis=1)
        yield trees("columns", columns, labels, held)


def told(trial: Trial) -> Told:
    """The trial in two numbers."""
    return Told(trial.name, trial.auc, chance_of(trial.scores, trial.truth))


def _single(name: str, values: Floats, sample: Sample) -> Told:
    codes = binned(values, sample.held, bins=64)
    return told(looked_up(name, codes, sample.labels, sample.held))


def _best_first(found: list[Told]) -> tuple[Told, ...]:
    return tuple(sorted(found, key=lambda t: -t.auc))


def shortcut_table(seen: LabelShortcuts) -> Table:
    """Everything that was tried as a table."""
    rows = [("the content itself", "read by the model", seen.content)]
    if seen.metadata is not None:
        rows.append(("all facts together", "seen by the model", seen.metadata))
    rows += [(t.name, "seen by the model", t) for t in seen.facts]
    rows.append((seen.order.name, "not an input", seen.order))
    rows += [(t.name, "not an input", t) for t in seen.others]
    caption = (
        f"AUC on {seen.rows:,} held-out rows; {seen.visible:.2f} would have been seen. {seen.note}"
    )
    if seen.unread:
        caption += f"; not read: {', '.join(seen.unread)}"
    return Table(
        "Can the label be told without reading the input?",
        "data",
        ("from", "", "AUC", "p"),
        tuple((name, how, round(t.auc, 4), chance_cell(t.p)) for name, how, t in rows),
        caption,
    )


# ---------------------------------------------------------------- verdicts


def label_shortcut(
    seen: LabelShortcuts,
    *,
    chance: Annotated[
        float, "of an alarm under the null; measured: no alarm in 20 clean sets"
    ] = CHANCE,
    least: Annotated[float, "AUC below which a shortcut is hardly one; judged"] = 0.6,
    share: Annotated[
        float, "of the content's lead over chance from which reading adds little; judged"
    ] = SHARE,
) -> Iterator[Fault]:
    """A warning where one fact about the input tells as much as reading it; notes for the rest."""
    together = seen.metadata
    if together is not None and together.p < chance and together.auc >= least:
        content = max(seen.content.auc, 0.5)
        # a shortcut is one thing: many facts together come near to reading the input
        first = seen.facts[0]
        as_good = first.p < chance and first.auc - 0.5 >= share * (content - 0.5)
        best = [t for t in seen.facts if t.p < chance and t.auc >= (least + 0.5) / 2][:3]
        named = ", ".join(f"{t.name} (AUC {t.auc:.2f})" for t in best) or "several facts together"
        compared = "as much as" if as_good else "less than"
        yield Fault(
            message=f"{seen.label} can be told without reading the input, AUC {together.auc:.2f} "
            f"on {seen.rows:,} held-out rows, {compared} from its content ({content:.2f}): "
            f"by {named}",
            subject=", ".join(t.name for t in best) or "metadata",
            severity="warning" if as_good else "note",
            evidence={
                "seen": f"AUC {together.auc:.3f}",
                "expected": f"0.5; {seen.visible:.2f} would have been seen",
                "p": together.p,
                "content_auc": seen.content.auc,
                "facts": {t.name: round(t.auc, 4) for t in seen.facts[:10]},
            },
        )
    for other in (seen.order, *seen.others):
        packed = other.name in OF_FILES.values()  # content goes with it a little everywhere
        enough = max(least, 0.5 + share * (seen.content.auc - 0.5)) if packed else least
        if not (other.p < chance / (1 + len(seen.others)) and other.auc >= enough):
            continue
        text, fix = f"column {other.name} tells", f"keep {other.name} out of the input"
        if other is seen.order:
            text = "rows lie in an order that goes with"
            fix = "dataset = dataset.shuffle(seed=42)  # before any part is cut off"
        elif packed:
            text = f"the {other.name} alone would tell"
            fix = "write all images anew, in one format and quality, and compare"
        yield Fault(
            message=f"{text} {seen.label}: AUC {other.auc:.2f} on {seen.rows:,} held-out rows; "
            "the model does not get it",
            subject=other.name,
            severity="note",
            fix=fix,
            evidence={"seen": f"AUC {other.auc:.3f}", "expected": "0.5", "p": other.p},
        )


SHORTCUTS = asking("look for shortcuts", LabelShortcuts, take_shortcuts)

LABEL_SHORTCUT = Check(
    name="label-shortcut",
    stage="data",
    severity="warning",
    moments=("dataset",),
    why="A network learns the cheapest rule that fits; one that reads length or brightness fails "
    "where these no longer go with the label.",
    fix="balance the classes over it, cut or scale it away; report metrics for each of its bins",
    source="Geirhos et al. 2020 (arXiv:2004.07780); Hoeffding 1951",
    judges=(label_shortcut,),
    unsure="Length or brightness may be the label's own nature (day and night, summaries).",
    call=CALL,
)
