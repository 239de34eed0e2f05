"""Cost and yield of the data stage on generated rows; exit 1 when a target is missed.

    python scripts/benchmark_data.py [--rows 200000] [--rivals PYTHON]

Rows of (text of about 60 words, label, float, int) with planted faults: exact and near copies,
missing values, blank texts, outliers. Measured in CPU seconds of one process, beside what a user
would pick instead, in the same run: those tools live in an environment of their own, whose Python
is given (polars, rensa, cleanlab[datalab], pandas, ydata-profiling; what is not there is told).

- column statistics against a pass written by hand with pyarrow.compute: at most its cost, and at
  most 150 MB;
- exact copies against polars' hash: at most 3 times its cost;
- near copies against rensa: at most 1.05 times its cost; recall at 5 % of words edited at least
  0.98, precision at least 0.99;
- confident learning from given probabilities against cleanlab's batched form: no slower;
- the whole inspection: at most 20 CPU seconds; twice the rows: at most twice the cost; remembered
  results: under 0.2 seconds. Beside it: pandas' describe, ydata-profiling, cleanlab's Datalab,
  with what each finds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_recipe.data.columns import summarise
from hf_recipe.data.duplicates import repeats
from hf_recipe.data.near import Side, alike_pairs, near_copies
from hf_recipe.data.source import Source, read_source
from hf_recipe.data.suspects import confident_learning
from hf_recipe.instruments.batches import Rows
from scripts.figures import OUT, ROOT, Figures

EDITS = (0.0, 0.05, 0.1, 0.2, 0.4)
VOCABULARY = 20_000


def sentences(rows: int, draw: np.random.Generator) -> list[str]:
    """Texts of 40 to 79 words, as common as words are."""
    words = np.array([f"{chr(97 + i % 26)}{np.base_repr(i * 7919, 36).lower()}"
                      for i in range(VOCABULARY)])  # fmt: skip
    chance = 1 / np.arange(1, VOCABULARY + 1)
    lengths = draw.integers(40, 80, rows)
    chosen = words[draw.choice(VOCABULARY, lengths.sum(), p=chance / chance.sum())]
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    return [" ".join(chosen[a:b]) for a, b in itertools.pairwise(bounds)]


def edited(text: str, share: float, draw: np.random.Generator) -> str:
    """`text` with a share of its words replaced; one white space more where none is."""
    words = text.split()
    if not share:
        return text + " "
    for place in draw.choice(len(words), max(1, round(share * len(words))), replace=False):
        words[place] = f"new{draw.integers(10**6)}"
    return " ".join(words)


def generated(rows: int, seed: int) -> tuple[datasets.Dataset, dict[str, set[int]]]:
    """The data set, and the rows of each planted fault."""
    draw = np.random.default_rng(seed)
    some = max(rows // 50, 4)
    texts = sentences(rows - 2 * some, draw)
    sources = draw.choice(len(texts), 2 * some, replace=False)
    copies = [texts[i] for i in sources[:some]]
    near = [edited(texts[i], 0.05, draw) for i in sources[some:]]
    number = draw.normal(size=rows)
    spoilt = draw.choice(rows - 2 * some, 3 * (some // 20 + 1), replace=False)
    out, missing, blank = (set(part.tolist()) for part in np.split(spoilt, 3))
    number[list(out)] = 60.0
    number[list(missing)] = np.nan
    for row in blank:
        texts[row] = "  "
    planted = {
        "copies": set(range(rows - 2 * some, rows - some)),
        "near": set(range(rows - some, rows)),
        "outliers": out,
        "missing": missing,
        "blank": blank,
    }
    data = {
        "text": texts + copies + near,
        "label": draw.integers(0, 10, rows),
        "number": number,
        "count": draw.integers(0, 100_000, rows),
    }
    for name in ("number", "count"):  # an exact copy agrees in every input
        data[name][rows - 2 * some : rows - some] = data[name][sources[:some]]
    return datasets.Dataset.from_dict(data), planted


def source_of(data: datasets.Dataset) -> Source:
    """The rows as the checks read them."""
    return read_source(Rows(data, data, lambda rows: {}, "train"), limit=10**9)


def cost(work: Callable[[], Any], times: int = 3) -> float:
    """CPU seconds of `work`, the least of a few runs: the others were disturbed."""
    best = float("inf")
    for _ in range(times):
        began = time.process_time()
        work()
        best = min(best, time.process_time() - began)
    return best


# ---------------------------------------------------------------------------- statistics


def by_hand(table: pa.Table) -> list[Any]:
    """The same statistics, written by hand over the whole table."""
    found: list[Any] = []
    quantiles = [0.0, 0.25, 0.5, 0.75, 1.0]
    for column in table.columns:
        if pa.types.is_string(column.type):
            lengths = pc.utf8_length(column)
            found += [pc.count_distinct(column), pc.quantile(lengths, quantiles),
                      pc.mean(lengths), pc.sum(pc.count_substring(column, " ")),
                      pc.sum(pc.equal(pc.utf8_trim_whitespace(column), "")),
                      pc.value_counts(lengths)]  # fmt: skip
            continue
        flat = pc.cast(column, pa.float64())
        flat = pc.filter(flat, pc.is_finite(flat))
        low, high = pc.min_max(flat)["min"].as_py(), pc.min_max(flat)["max"].as_py()
        bins = pc.floor(pc.multiply(pc.divide(pc.subtract(flat, low), high - low), 30.0))
        found += [column.null_count, pc.count_distinct(column), pc.mean(flat), pc.stddev(flat),
                  pc.sum(pc.equal(flat, 0.0)), pc.quantile(flat, quantiles),
                  pc.value_counts(bins)]  # fmt: skip
    return found


def statistics(figures: Figures, data: datasets.Dataset) -> None:
    """Every column's summary against the pass by hand, by turns."""
    table, source = data.data.table, source_of(data)
    costs = [(cost(lambda: summarise(source), 1), cost(lambda: by_hand(table), 1))
             for _ in range(7)]  # fmt: skip
    ours, hand = (min(part) for part in zip(*costs, strict=True))
    figures.record("column statistics / pyarrow.compute by hand", ours / hand, most=1.0,
                   note=f"{ours:.2f} CPU s")  # fmt: skip


# ---------------------------------------------------------------------------- copies


def exact(figures: Figures, data: datasets.Dataset, rivals: Rivals) -> None:
    """Exact copies against polars."""
    source = source_of(data)
    ours = cost(lambda: repeats(source, ("text",), None), 7)
    against(figures, "exact copies / polars' hash", ours, rivals.told("polars"), 3.0)


def near(
    figures: Figures, data: datasets.Dataset, planted: dict[str, set[int]], rivals: Rivals
) -> None:
    """Near copies against rensa."""
    source = source_of(data)
    ours = cost(lambda: near_copies(Side.of(source, ("text",), None)), 3)
    later = {b for _, b in found_pairs(source)}
    wanted = planted["near"] - planted["blank"]
    figures.record("near copies: recall at 5 % edits", len(later & wanted) / len(wanted),
                   least=0.98, note=f"{ours:.2f} CPU s")  # fmt: skip
    figures.record("near copies: precision", len(later & wanted) / len(later), least=0.99)
    told = rivals.told("rensa")
    recall = len(wanted.intersection(told.get("rows", ()))) / len(wanted)
    against(figures, "near copies / rensa", ours, told, 1.05, f"its recall {recall:.3f}")


def witnesses(rows: int, classes: int, seed: int) -> tuple[Any, Any, set[int]]:
    """Probabilities of a fair witness, labels of which 3 % are wrong, and the wrong rows."""
    draw = np.random.default_rng(seed)
    truth = draw.integers(0, classes, rows)
    logits = draw.normal(size=(rows, classes)).astype(np.float32)
    logits[np.arange(rows), truth] += 4
    chances = np.exp(logits)
    wrong = draw.random(rows) < 0.03
    labels = np.where(wrong, (truth + draw.integers(1, classes, rows)) % classes, truth)
    return chances / chances.sum(axis=1, keepdims=True), labels, set(np.flatnonzero(wrong).tolist())


def labels(figures: Figures, folder: Path, wrong: set[int], rivals: Rivals) -> None:
    """Confident learning from given probabilities against cleanlab's batched form."""
    chances, given = np.load(folder / "probabilities.npy"), np.load(folder / "labels.npy")
    found = confident_learning(chances, given)
    ours = cost(lambda: confident_learning(chances, given), 7)
    told = rivals.told("cleanlab")
    theirs = told.get("rows", [])
    note = f"{scored(found.tolist(), wrong)}; its {scored(theirs, wrong)}" if theirs else ""
    against(figures, "confident learning / cleanlab, batched", ours, told, 1.0, note)


def scored(rows: list[int], wrong: set[int]) -> str:
    """Precision and recall in words."""
    hits = len(wrong.intersection(rows))
    return f"precision {hits / max(len(rows), 1):.3f}, recall {hits / len(wrong):.3f}"


def against(
    figures: Figures, name: str, ours: float, told: dict[str, Any], most: float, note: str = ""
) -> None:
    """Our CPU seconds as a ratio to a rival's; by themselves where it is not installed."""
    if "cpu" not in told:
        figures.record(f"{name.split(' / ')[0]}, CPU s", ours, note=told["why"])
        return
    seconds = f"{ours:.3g} CPU s, {told['cpu']:.3g} CPU s"
    figures.record(
        name, ours / told["cpu"], most=most, note="; ".join(filter(None, (seconds, note)))
    )


class Rivals:
    """Other tools, each timed in a process of its own by an interpreter that has them."""

    def __init__(self, python: str, folder: Path) -> None:
        self.python, self.folder = python, folder

    def told(self, tool: str) -> dict[str, Any]:
        """What `tool` costs and finds; {"why"} where it cannot be had."""
        run = subprocess.run(
            [self.python, str(ROOT / "scripts" / "rivals.py"), tool, str(self.folder)],
            capture_output=True, text=True, env={**os.environ, "POLARS_MAX_THREADS": "1",
            "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if run.returncode:
            why = (run.stderr.strip().splitlines() or [f"exit {run.returncode}"])[-1]
            return {"why": f"{tool}: {why}"}
        found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
        return found


def beside(figures: Figures, rivals: Rivals) -> None:
    """The tools that users start with: what they cost and what they find."""
    for tool, name in (
        ("pandas", "pandas describe"), ("ydata", "ydata-profiling, minimal"),
        ("datalab", "cleanlab Datalab, from given probabilities"),
    ):  # fmt: skip
        told = rivals.told(tool)
        if "cpu" in told:
            note = f"+{told['megabytes']:.0f} MB; {told['found']}"
            figures.record(f"{name}, CPU s", told["cpu"], note=note)


def found_pairs(source: Source) -> set[tuple[int, int]]:
    """The pairs of rows that are taken for near copies."""
    side = Side.of(source, ("text",), None)
    alive = np.zeros(len(side.exact), dtype=bool)
    alive[np.unique(side.exact, return_index=True)[1]] = True
    return {(a, b) for a, b in alike_pairs(side, alive & side.prints.enough)[2].tolist()}


def recall_curve(figures: Figures, seed: int, rows: int) -> None:
    """The share of planted copies that are found, by the share of words edited."""
    draw = np.random.default_rng(seed)
    base = sentences(rows, draw)
    count = rows // 20
    planted = {}
    for share in EDITS:
        for i in draw.choice(rows, count, replace=False).tolist():
            planted[(i, len(base))] = share
            base.append(edited(base[i], share, draw))
    pairs = found_pairs(source_of(datasets.Dataset.from_dict({"text": base})))
    for share in EDITS:
        recall = sum(p in pairs for p, s in planted.items() if s == share) / count
        least = 0.98 if share <= 0.05 else None
        figures.record(f"recall at {share:.0%} of words edited", recall, least=least)


# ---------------------------------------------------------------------------- the whole

WHOLE = """
import json, os, sys, time
import datasets
import hf_recipe
report = hf_recipe.inspect_dataset
data = datasets.Dataset.from_parquet(sys.argv[1], cache_dir=sys.argv[2])
import hf_recipe.catalogue
list(hf_recipe.catalogue.CHECKS)  # what every command imports is counted apart
from hf_recipe.data.columns import summarise
from hf_recipe.inspection import read_split
from scripts.rivals import forget_peak, peak
import numpy, scipy.stats, sklearn.linear_model, sklearn.ensemble, sklearn.feature_extraction.text
forget_peak()
base = peak()
summarise(read_split("train", data))
columns = peak()
began = time.process_time()
found = report(data, label="label")
spent = time.process_time() - began
most = peak()
began = time.process_time()
again = report(data, label="label")
again_spent = time.process_time() - began
assert sorted(f.message for f in again.flat) == sorted(f.message for f in found.flat)
print(json.dumps({"cpu": spent, "again": again_spent,
                  "megabytes": most - base, "columns": columns - base,
                  "crashed": found.crashed,
                  "findings": sorted({f.check for f in found.flat})}))
"""


def inspection(data: datasets.Dataset, folder: Path, name: str) -> dict[str, Any]:
    """One whole inspection in a process of its own."""
    path = folder / f"{name}.parquet"
    data.to_parquet(path)
    environment = {**os.environ, "HF_RECIPE_CACHE": str(folder / "remembered"),
                   "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
                   "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", WHOLE, str(path), str(folder / "cache")],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if run.returncode:
        raise RuntimeError(run.stderr[-2000:])
    figures: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return figures


def whole(figures: Figures, rows: int, seed: int) -> None:
    """The inspection of all rows and of half of them."""
    with tempfile.TemporaryDirectory() as folder:
        half = inspection(generated(rows // 2, seed)[0], Path(folder), "half")
        full = inspection(generated(rows, seed)[0], Path(folder), "full")
    if full["crashed"]:
        raise RuntimeError(f"checks crashed: {full['crashed']}")
    wanted = {"near-duplicate-example", "outlier-example", "duplicate-example", "blank-example",
              "missing-value"}  # fmt: skip
    figures.record("whole inspection, CPU s", full["cpu"], most=20 * max(rows / 200_000, 1.0),
                   note=f"+{full['megabytes']:.0f} MB")  # fmt: skip
    figures.record("column statistics, MB", full["columns"], most=150)
    # A few hundredths are left for the noise of a shared machine.
    figures.record("whole inspection / half the rows", full["cpu"] / half["cpu"], most=2.1)
    figures.record("the same inspection again, CPU s", full["again"], most=0.2)
    figures.record("planted faults found", len(wanted & set(full["findings"])), least=len(wanted),
                   note=", ".join(full["findings"]))  # fmt: skip


def main() -> int:
    """Run everything; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rivals", default=sys.executable, metavar="PYTHON",
                        help="an interpreter that has the other tools")  # fmt: skip
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON")
    options = parser.parse_args()
    if options.rows < 1_000:
        parser.error(f"--rows must be 1,000 or more; got {options.rows}")
    pa.set_cpu_count(1)
    data, planted = generated(options.rows, options.seed)
    figures = Figures("scripts/benchmark.py data", "The data stage", options.seed)
    figures.record("rows", options.rows)
    statistics(figures, data)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rivals = Rivals(options.rivals, folder)
        data.to_parquet(folder / "data.parquet")
        chances, given, wrong = witnesses(options.rows, 10, options.seed)
        np.save(folder / "probabilities.npy", chances)
        np.save(folder / "labels.npy", given)
        exact(figures, data, rivals)
        near(figures, data, planted, rivals)
        labels(figures, folder, wrong, rivals)
        recall_curve(figures, options.seed, max(options.rows // 10, 2_000))
        whole(figures, options.rows, options.seed)
        beside(figures, rivals)
    return figures.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())
