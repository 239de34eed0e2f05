"""Before a run: are the rows of an evaluation set another kind of row altogether?

Another tokenizer, another scale or a step that was forgotten shows in a few hundred rows, and in
nearly every one of them. No more is asked of a run: finer differences, which may be how the data
is (a later month, longer texts), are told by `hf_recipe.inspect_dataset`.
"""

from __future__ import annotations

from collections.abc import Iterator

from hf_recipe.core.check import Located, Probe, Skip
from hf_recipe.data.drift import DRIFT, SplitDrift, every_drift
from hf_recipe.data.remembered import is_known
from hf_recipe.instruments.subject import Subject


def take_glance(subject: Subject) -> Iterator[Located]:
    """Compare a few rows of every evaluation set with a few of the training set."""
    if subject.cache.get("raw"):
        raise Skip("looked for along with everything else")
    if subject.train is None or any(
        subject.rows(s).is_stream for s in ("train", *subject.evaluation)
    ):
        raise Skip("a stream is not read ahead")
    if is_known(DRIFT, subject):
        raise Skip("known from an inspection of the same data")
    for split, seen in every_drift(subject, glance=True)[0].items():
        yield Located(seen, split)


DRIFT_GLANCE = Probe("glance at both splits", "dataset", (SplitDrift,), take_glance)
