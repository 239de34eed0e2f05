"""How often the data stage claims what is not there, and how often it finds what is.

    python scripts/benchmark.py data-null [--seeds 20]

Under the null: labels that nothing tells, variation that goes with nothing, splits drawn alike,
labels without noise. A claim there is false; each kind may be at most one in twenty. The p-values
themselves are counted too: no more of them lie under 0.05 than 5 % would give in 99 of 100 counts.
Clean sets of text, numbers and images raise no alarm at all. Then the same questions with a
planted answer, over as many seeds. Exits 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_RECIPE_CACHE"] = "off"  # every seed is measured
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import datasets
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_recipe.core.report import Report
from scripts.figures import OUT, Figures
from tests.data import planted
from tests.data.asking import alarms, answer, ask, found, measured

CONTEXT, SIZE, VARIES = "local-context-enough", "input-oversized", "spurious-variation"
MOST_FALSE = 0.05
KINDS = ("case", "accents", "white space", "digits")
LIGHTS = ("brightness", "contrast", "shift")
RATES = (0.0, 0.1, 0.2)


class Tally:
    """Trials and hits by name, in the order of their first trial."""

    def __init__(self) -> None:
        self.hits: dict[str, list[bool]] = defaultdict(list)

    def add(self, name: str, *hits: bool) -> None:
        """Count trials; `hits` are those that the name speaks of."""
        self.hits[name] += map(bool, hits)

    def record(
        self,
        figures: Figures,
        *,
        most: float | None = None,
        least: float | None = None,
        counted: bool = False,
    ) -> None:
        """Every name's share of hits.

        Args:
            counted: `most` is a chance: as many hits are granted as it gives in 99 of 100 counts.
        """
        from scipy.stats import binom

        for name, hits in ((n, h) for n, h in self.hits.items() if h):
            bound = most
            if most is not None and counted:
                bound = float(binom.ppf(0.99, len(hits), most)) / len(hits)
            note = f"of {len(hits):,}"
            figures.record(name, float(np.mean(hits)), most=bound, least=least, note=note)


# ---------------------------------------------------------------------------- nothing there


def nothing_tells(seed: int, false: Tally, low: Tally) -> None:
    """Labels that neither words nor pixels nor numbers tell."""
    texts = planted.context("none", seed)
    blind = planted.digits(seed, shift=lambda pixels, y, rng: pixels[rng.permutation(len(y))])
    for what, data in (("text", texts), ("image", blind)):
        report = ask(data, CONTEXT, SIZE, VARIES, "label-shortcut", "target-in-input")
        for start, asked in (
            ("Are local", "context"),
            ("How far", "size"),
            ("Which v", "variation"),
        ):
            said = answer(report, start)
            false.add(f"{asked} of {what}, no signal: claims", not said.startswith("undecided"))
        false.add(f"shortcut of {what}, no signal: claims", found(report, "label-shortcut"))
        false.add(f"giveaway of {what}, no signal: claims", found(report, "target-in-input"))
        rungs = measured(report, "ContextLadder")["rungs"]
        low.add(f"p < 0.05: {what} rungs against chance", *(r["p_chance"] < 0.05 for r in rungs))
        count_shortcuts(report, what, low)
    table = datasets.Dataset.from_dict(planted.table(seed, signal=False))
    report = ask(table, "label-shortcut", "target-in-input")
    false.add("shortcut of a table, no signal: claims", found(report, "label-shortcut"))
    false.add("giveaway of a table, no signal: claims", found(report, "target-in-input"))
    count_shortcuts(report, "table", low)


def count_shortcuts(report: Report, what: str, low: Tally) -> None:
    """The p-values of everything that was tried as a shortcut."""
    seen = measured(report, "LabelShortcuts")
    tried = [t for t in (seen["metadata"], seen["content"], seen["order"], *seen["facts"]) if t]
    low.add(f"p < 0.05: shortcuts of a {what}", *(t["p"] < 0.05 for t in tried))


def varies_for_nothing(seed: int, false: Tally, low: Tally) -> None:
    """Variation that goes with nothing must not be said to tell; one that tells, not to be free."""
    trials = [("text", kind, planted.varied) for kind in KINDS]
    trials += [("image", kind, planted.lit) for kind in LIGHTS]
    for what, kind, build in trials:
        report = ask(build(seed, kind, tells=False), VARIES)
        one = variation(report, kind)
        false.add(f"variation of {what}, random: said to tell", one["p_loss"] < 0.01)
        low.add(f"p < 0.05: loss without a random {what} variation", one["p_loss"] < 0.05)
        report = ask(build(seed, kind, tells=True), VARIES)
        free = [f.subject for f in found(report, VARIES)]
        false.add(f"variation of {what}, telling: said to be free", kind in free)


def variation(report: Report, kind: str) -> Any:
    """The measured variation called `kind`."""
    every = measured(report, "VariationTrials")["variations"]
    return next(one for one in every if one["name"] == kind)


def drawn_alike(seed: int, false: Tally, low: Tally) -> None:
    """Two splits of one draw."""
    tables = datasets.Dataset.from_dict(planted.table(seed))
    for what, data in (
        ("text", planted.keyed(seed)),
        ("table", tables),
        ("image", planted.digits(seed)),
    ):
        report = ask(planted.halves(data), "split-drift")
        seen = measured(report, "SplitDrift")
        false.add(f"drift of a {what}, drawn alike: claims", found(report, "split-drift"))
        low.add(f"p < 0.05: drift of a {what}", seen["p"] < 0.05)
        low.add(f"p < 0.05: single drifts of a {what}", *(f["p"] < 0.05 for f in every(seen)))


def every(drift: Any) -> Iterable[Any]:
    """Single features, one in each measurement: the ten best are the luckiest of many."""
    return drift["features"] if len(drift["features"]) < 10 else ()


# ---------------------------------------------------------------------------- clean sets


def clean_sets(seed: int, alarmed: Tally) -> None:
    """The whole inspection of clean sets: not one warning."""
    rng = planted.rng_of(seed)
    table = planted.table(seed)
    sets = {
        "text": planted.halves(planted.keyed(seed)),
        "table": planted.halves(datasets.Dataset.from_dict(table)),
        "digits": planted.halves(planted.digits(seed)),
        "quantity": planted.halves(
            datasets.Dataset.from_dict({**table, "label": table["f0"] + rng.normal(size=2_000)})
        ),
    }
    for name, data in sets.items():
        report = ask(data, *every_check())
        told = alarms(report)
        if told:
            print(f"seed {seed}, {name}: {told}", flush=True)
        alarmed.add(f"clean {name}: alarms", bool(told))


def every_check() -> list[str]:
    """All checks of the catalogue."""
    from hf_recipe.catalogue import CHECKS

    return list(CHECKS)


# ---------------------------------------------------------------------------- planted answers


def planted_answers(seed: int, right: Tally) -> None:
    """The questions with a known answer."""
    for truth, says in (
        ("bag", "local features are enough for a cheap probe: words tell"),
        ("neighbours", "local features are enough for a cheap probe: words and their neighbours"),
        ("order", "global context is needed"),
        ("ends", "global context is needed"),
    ):
        said = answer(ask(planted.context(truth, seed), CONTEXT), "Are local")
        right.add(f"context {truth}", said.startswith(says))
    for build, says in (
        (planted.stripes, "local"), (planted.blobs, "global"), (planted.digits, "global"),
    ):  # fmt: skip
        said = answer(ask(build(seed), CONTEXT), "Are local")
        right.add(f"context {build.__name__}", said.startswith(says))
    for where in ("head", "tail", "middle"):
        notes = found(ask(planted.evidence(seed, where), SIZE), SIZE)
        facts = [(f.evidence["way"], f.evidence["size"]) for f in notes]
        right.add(f"size: evidence in the {where}", facts == [(where, 32)])
    notes = found(ask(planted.digits(seed, side=32, noise=60.0), SIZE), SIZE)
    right.add("size: digits at four times their side",
              len(notes) == 1 and 6 <= notes[0].evidence["size"] <= 12)  # fmt: skip
    for name, hit in faults(seed):
        right.add(name, hit)


def faults(seed: int) -> Iterator[tuple[str, bool]]:
    """Shortcut, drift and leak, each planted where nothing else is wrong."""
    lit = planted.digits(seed, shift=lambda pixels, y, rng: pixels / 2 + 12 * y[:, None, None])
    yield (
        "shortcut: brightness",
        bool(found(ask(lit, "label-shortcut"), "label-shortcut", "warning")),
    )
    data = planted.halves(datasets.Dataset.from_dict(planted.table(seed)))
    moved = np.asarray(data["validation"]["f2"]) + 0.7
    drifted = data["validation"].remove_columns("f2").add_column("f2", moved)
    (*notes,) = found(ask({**data, "validation": drifted}, "split-drift"), "split-drift", "warning")
    yield "drift: one column by 0.7 deviations", [f.subject for f in notes] == ["f2"]
    texts = planted.halves(planted.keyed(seed))
    copies = texts["train"].select(range(20))
    leaky = datasets.concatenate_datasets([texts["validation"], copies])
    (*errors,) = found(ask({**texts, "validation": leaky}, "split-leak"), "split-leak", "error")
    yield "leak: 20 rows", [f.evidence["copies"] for f in errors] == [20]
    columns = planted.table(seed)
    copied = columns["label"] + planted.rng_of(seed).normal(0, 0.1, len(columns["label"]))
    data = datasets.Dataset.from_dict({**columns, "extra": copied})
    (*warned,) = found(ask(data, "target-in-input"), "target-in-input", "warning")
    yield "giveaway: the label itself", [f.subject for f in warned] == ["extra"]


# ---------------------------------------------------------------------------- label noise


def label_noise(seed: int, false: Tally, right: Tally, apart: dict[str, list[float]]) -> None:
    """Digits and texts with flipped labels: the alarm, and the estimated rate."""
    for what, data, classes in (
        ("digits", planted.digits(seed), 10),
        ("texts", planted.keyed(seed, share=0.97), 2),
    ):
        labels = np.asarray(data["label"])
        for rate in RATES:
            rng = planted.rng_of(1_000 + seed)
            wrong = rng.random(len(labels)) < rate
            noisy = np.where(
                wrong, (labels + rng.integers(1, classes, len(labels))) % classes, labels
            )
            report = ask(data.remove_columns("label").add_column("label", noisy), "suspect-label")
            told = bool(found(report, "suspect-label", "warning"))
            seen = measured(report, "LabelSuspects")
            if rate:
                right.add(f"label noise of {what}, {rate:.0%}", told)
                apart[f"estimated noise of {what} less {rate:.0%}"].append(seen["rate"] - rate)
            else:
                false.add(f"label noise of {what}, none: claims", told)


def main() -> int:
    """Run everything; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds must be 1 or more; got {options.seeds}")
    title = "False verdicts of the data stage, and planted ones"
    figures = Figures("scripts/benchmark.py data-null", title, options.seed)
    figures.record("seeds", options.seeds)
    false, low, alarmed, right = Tally(), Tally(), Tally(), Tally()
    apart: dict[str, list[float]] = defaultdict(list)
    for seed in range(options.seed, options.seed + options.seeds):
        nothing_tells(seed, false, low)
        varies_for_nothing(seed, false, low)
        drawn_alike(seed, false, low)
        label_noise(seed, false, right, apart)
        clean_sets(seed, alarmed)
        planted_answers(seed, right)
        print(f"seed {seed} is done", file=sys.stderr, flush=True)
    false.record(figures, most=MOST_FALSE)
    low.record(figures, most=MOST_FALSE, counted=True)
    alarmed.record(figures, most=0.0)
    right.record(figures, least=0.9)
    for name, errors in apart.items():
        middle, spread = float(np.mean(errors)), float(np.std(errors))
        figures.record(name, abs(middle), most=0.03, note=f"{middle:+.3f}, +- {spread:.3f} a set")
    return figures.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())
