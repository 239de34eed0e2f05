"""What users would pick instead of the data stage: one tool, timed in an environment of its own.

    PYTHON scripts/rivals.py TOOL FOLDER

Called by ``scripts/benchmark.py data --rivals PYTHON``: these tools pin versions that ours does
not share. FOLDER holds data.parquet, probabilities.npy and labels.npy. The last line printed is
JSON: CPU seconds (the least of a few runs, imports left out), megabytes above the imports, and
what was found. Nothing of this project is imported.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Told = dict[str, Any]


def peak() -> float:
    """The most memory that this process has held since `forget_peak`, in megabytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return float("nan")


def forget_peak() -> None:
    """The peak is what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def timed(work: Callable[[], Any], times: int = 3) -> tuple[Told, Any]:
    """CPU seconds and megabytes of `work`, and what it returned."""
    forget_peak()
    base, best, found = peak(), float("inf"), None
    for _ in range(times):
        began = time.process_time()
        found = work()
        best = min(best, time.process_time() - began)
    return {"cpu": best, "megabytes": peak() - base}, found


def of_polars(folder: Path) -> Told:
    """Exact copies by hash."""
    import polars

    texts = polars.read_parquet(folder / "data.parquet")["text"]
    told, copies = timed(lambda: int(texts.hash().is_duplicated().sum()), 7)
    return {**told, "found": f"{copies:,} rows that occur more than once"}


def of_rensa(folder: Path) -> Told:
    """Near copies: 128 permutations of word pairs, 32 bands."""
    import pandas
    import rensa

    texts = pandas.read_parquet(folder / "data.parquet")["text"].tolist()

    def work() -> list[bool]:
        pairs = [
            [f"{a} {b}" for a, b in itertools.pairwise(words)]
            for words in (text.split() for text in texts)
        ]
        matrix = rensa.RMinHash.digest_matrix_from_token_sets(pairs, 128, 42)
        index = rensa.RMinHashLSH(0.55, 128, 32)
        return list(index.query_duplicate_flags_matrix_one_shot(matrix))

    told, flags = timed(work, 2)
    rows = np.flatnonzero(flags).tolist()
    return {**told, "found": f"{len(rows):,} rows", "rows": rows}


def of_cleanlab(folder: Path) -> Told:
    """Label issues from given probabilities, in batches."""
    from cleanlab.experimental.label_issues_batched import find_label_issues_batched

    probabilities = np.load(folder / "probabilities.npy")
    labels = np.load(folder / "labels.npy")
    told, issues = timed(
        lambda: find_label_issues_batched(labels=labels, pred_probs=probabilities, verbose=False), 7
    )
    return {**told, "found": f"{len(issues):,} rows", "rows": np.asarray(issues).tolist()}


def of_datalab(folder: Path) -> Told:
    """Everything that Datalab looks for, given probabilities."""
    from cleanlab import Datalab

    data = {"label": np.load(folder / "labels.npy")}
    probabilities = np.load(folder / "probabilities.npy")

    def work() -> Any:
        lab = Datalab(data, label_name="label", verbosity=0)
        lab.find_issues(pred_probs=probabilities)
        return lab.get_issue_summary()

    told, summary = timed(work, 1)
    found = [f"{n} {k:,}" for n, k in zip(summary.issue_type, summary.num_issues, strict=True) if k]
    return {**told, "found": ", ".join(found) or "nothing"}


def of_pandas(folder: Path) -> Told:
    """describe of every column."""
    import pandas

    frame = pandas.read_parquet(folder / "data.parquet")
    told, table = timed(lambda: frame.describe(include="all"), 3)
    return {**told, "found": f"{table.shape[0]} numbers a column, no verdict"}


def of_ydata(folder: Path) -> Told:
    """The profile's alerts, in its minimal form, on the first 20,000 rows."""
    import pandas
    from ydata_profiling import ProfileReport

    frame = pandas.read_parquet(folder / "data.parquet").head(20_000)

    def work() -> Any:
        profile = ProfileReport(frame, minimal=True, progress_bar=False)
        profile.to_html()
        return profile.get_description().alerts

    told, alerts = timed(work, 1)
    names = sorted({str(alert.alert_type).split(".")[-1].lower() for alert in alerts})
    return {**told, "found": f"{len(frame):,} rows: " + (", ".join(names) or "no alert")}


TOOLS: dict[str, Callable[[Path], Told]] = {
    "polars": of_polars,
    "rensa": of_rensa,
    "cleanlab": of_cleanlab,
    "datalab": of_datalab,
    "pandas": of_pandas,
    "ydata": of_ydata,
}


def main() -> int:
    """Time one tool; 3 where it is not installed."""
    warnings.simplefilter("ignore")
    if len(sys.argv) != 3 or sys.argv[1] not in TOOLS:
        print(f"usage: rivals.py {{{','.join(TOOLS)}}} FOLDER", file=sys.stderr)
        return 2
    try:
        told = TOOLS[sys.argv[1]](Path(sys.argv[2]))
    except ImportError as error:
        print(f"not installed: {error.name}", file=sys.stderr)
        return 3
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
