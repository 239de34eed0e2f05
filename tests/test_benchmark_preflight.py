"""The preflight's benchmark: it counts passes of the user's batch, and a missed limit exits 1."""

from __future__ import annotations

import json
from pathlib import Path

from scripts.benchmark_preflight import one_preflight, pass_seconds, record
from scripts.figures import Figures, page
from tests.models import classifier


def test_probes_are_timed_and_a_missed_limit_is_told(tmp_path: Path) -> None:
    trainer = classifier(tmp_path / "run", save_strategy="steps", save_steps=10)
    weights = [p.detach().clone() for p in trainer.model.parameters()]
    assert len(pass_seconds(trainer, 2)) == 2
    spent, whole, skipped = one_preflight(trainer)
    assert all((p == w).all() for p, w in zip(trainer.model.parameters(), weights, strict=True))
    assert skipped == {}
    assert "probe: chart row dependence" in spent
    assert 0 < max(spent.values()) < sum(spent.values()) <= whole
    found = {
        "passes": 12.0, "pass_ms": 3.0, "data_seconds": 0.1,
        "probes": {"probe: look": 2.0, "probe: glance": 1e-4},
        "skipped_for_cost": {},
    }  # fmt: skip
    figures = Figures("scripts/benchmark.py preflight", "Cost")
    record(figures, "BERT", found, 10.0)
    assert figures.finish(tmp_path) == 1
    kept = json.loads((tmp_path / "preflight.json").read_text())["figures"]
    assert [row["met"] for row in kept] == [False, True, True]
    figures = Figures("scripts/benchmark.py preflight", "Cost")
    record(figures, "BERT", {**found, "passes": 9.0}, 10.0)
    assert figures.finish(tmp_path) == 0
    record(figures, "ViT", {**found, "passes": 9.0, "probes": {"probe: weigh": 3.0}}, 10.0)
    figures.finish(tmp_path)
    text = page(tmp_path)
    assert "| ViT: passes | 9 | <= 10 | met" in text
    table = text.splitlines()[text.splitlines().index("|  | BERT | ViT |") :]
    assert table[2:] == ["| probe: weigh |  | 3.00 |", "| probe: look | 2.00 |  |"]
