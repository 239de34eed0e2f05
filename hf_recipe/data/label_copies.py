"""Before a run: does a feature, or a token at its own place, hold the label itself?

What is looked for here is a copy and nothing less: an element that has one value in every class, a
quantity that the target is a straight line of, a token that is the class's name. That takes no
probe of everything else and few rows; features that merely tell the label are asked for by
`hf_recipe.inspect_dataset` (`data/target_leak.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa

from hf_recipe.core.check import Located, Probe, Skip
from hf_recipe.data.asked import CALL
from hf_recipe.data.cheap import binned, looked_up
from hf_recipe.data.giveaway_tokens import Giveaway, balanced, from_tokens
from hf_recipe.data.hashing import flat_array, is_list, is_number
from hf_recipe.data.labels import seen_counts
from hf_recipe.data.sample import Sample, draw
from hf_recipe.data.source import Source, roles_of, source_of
from hf_recipe.data.target_leak import COPIED, Giveaways, lines, one_value, targets_of
from hf_recipe.data.tokenizer import special_ids, tokenizer_of
from hf_recipe.data.words import TokenRows
from hf_recipe.instruments.subject import Subject

FEWEST = 40  # rows, half of them to judge by: a copy is no chance there
FEWEST_OF_CLASS = 8
ROWS = 2_000
NAMED = ("name", "added")
LARGEST_VOCABULARY = 300_000


def take_copies(subject: Subject) -> Iterator[Located]:
    """Look for copies of the label among plain numbers and among token ids."""
    if subject.cache.get("raw"):
        raise Skip("looked for along with everything else")
    source = source_of(subject, "train")
    roles = roles_of(subject, source)
    ids = "input_ids" in roles.inputs
    if not ids and not (roles.inputs and _plain_numbers(source, roles.inputs)):
        raise Skip(f"texts and images take seconds of their own: {CALL}")
    form = seen_counts(subject, source, roles).form
    if form not in ("class", "number"):
        raise Skip("a row has not one class or quantity")
    sample = draw(subject, rows=ROWS, fewest=FEWEST, of_class=FEWEST_OF_CLASS)
    if ids:
        found = _named(subject, sample) if form == "class" else []
    elif form == "class":
        found = exact_copies(sample)
    else:
        every = lines(targets_of(sample, str(roles.label)), sample, dict(sample.inputs.columns))
        found = [giveaway for giveaway in every if giveaway.accuracy >= COPIED]
    measured = Giveaways(
        label=str(roles.label),
        features=1 if ids else len(sample.inputs.columns),
        found=tuple(found[:10]),
        rows=int(sample.held.sum()),
        unread=tuple(sample.inputs.unread),
        note=f"exact copies alone; {sample.note}",
    )
    yield Located(measured, "train")


def _plain_numbers(source: Source, inputs: tuple[str, ...]) -> bool:
    """Whether every input is numbers, or flat lists of them, that are no token ids."""
    for name in inputs:
        kind = flat_array(next(source.chunks([name])).column(name)).type
        if is_list(kind) and not pa.types.is_integer(kind.value_type):
            kind = kind.value_type
        if not is_number(kind):
            return False
    return True


def exact_copies(sample: Sample) -> list[Giveaway]:
    """Elements with one value in each class, and another in each.

    Where most elements are so, rows are prototypes of their class: the task itself.
    """
    labels, held, columns = sample.labels, sample.held, sample.inputs.columns
    parts = [labels == k for k in range(sample.classes)]
    still = [n for n, v in columns.items() if all(one_value(v[part]) for part in parts)]
    found = []
    for name in still:
        trial = looked_up(name, binned(columns[name], held, bins=64), labels, held)
        if balanced(trial) == 1.0:
            found.append(Giveaway(name, "exact", 1.0, 0.0, 0.0))
    return found if 2 * len(found) <= len(columns) else []


def _named(subject: Subject, sample: Sample) -> list[Giveaway]:
    """Tokens at a fixed place that are the classes' names, or one pattern with a number in it.

    Bare ids have no spelling; of them only those at the end of a row are looked at, where a label
    is appended: a marker in front may be how rows of a made-up task begin.
    """
    if sample.inputs.tokens is None:
        return []
    tokens = _plain_tokens(subject, sample.inputs.tokens)
    found = [giveaway for giveaway in from_tokens(sample, tokens) if giveaway.form in NAMED]
    return [g for g in found if tokens.vocabulary or g.name.endswith("from the end")]


def _plain_tokens(subject: Subject, tokens: TokenRows) -> TokenRows:
    """The rows without special tokens and padding, spelled where there is a tokenizer."""
    every = np.asarray(sorted(special_ids(subject).every), dtype=np.int64)
    tokens = tokens.where(~np.isin(tokens.ids, every))
    tokenizer = tokenizer_of(subject)
    highest = int(tokens.ids.max(initial=0))
    if tokenizer is None or not 0 < highest < LARGEST_VOCABULARY:
        return tokens
    pieces = tokenizer.convert_ids_to_tokens(list(range(highest + 1)))
    return replace(tokens, vocabulary=tuple((piece or "").strip("#▁Ġ ") for piece in pieces))


COPIES = Probe("look for copies of the label", "dataset", (Giveaways,), take_copies)
