"""Leaks between rows, into the past and out of padding, planted in ordinary architectures.

    python scripts/benchmark.py leaks

Twelve architectures, tiny and freshly drawn, are looked at as they are (any alarm is false) and
with a leak planted in their last normalisation layer: a thousandth of the next row, the batch's
mean taken off, rows in another order; in causal ones a little of the next position; in
ones that read a mask, a mask of ones. Every planted leak has to be found under its own name.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.figures import OUT, Figures  # noqa: E402

ROWS: dict[str, Callable[[Any], Any]] = {
    "a thousandth of the next row": lambda h: h + 1e-3 * h.roll(1, 0),
    "less the batch's mean": lambda h: h - h.mean(0, keepdim=True),
    "rows in another order": lambda h: h.flip(0),
}
FUTURE: dict[str, Callable[[Any], Any]] = {
    "a hundredth of the next position": lambda h: h + 1e-2 * h.roll(-1, 1),
}
CAUSAL = ("GPT-2", "Llama", "T5", "Mixtral")
MASKED = ("BERT", "BERT masked", "RoBERTa")
COMPARES_ROWS = ("CLIP",)  # by design
OURS = ["example-leak", "future-leak", "padding-leak", "packing-leak"]


def architectures() -> dict[str, Callable[[Path], Any]]:
    """Name -> (folder) -> a Trainer on rows that suit the model."""
    import torch
    from transformers import Trainer

    from tests.gallery import test_dependency_zoo as zoo
    from tests.models import arguments

    def of_zoo(name: str) -> Callable[[Path], Any]:
        def build(folder: Path) -> Any:
            torch.manual_seed(0)
            model, data = zoo.ZOO[name]()
            model.accepts_loss_kwargs = False
            return Trainer(
                model=model,
                args=arguments(folder, remove_unused_columns=False),
                train_dataset=data,
                data_collator=zoo.collate_pairs if name == "CLIP" else None,
            )

        return build

    found = {name: of_zoo(name) for name in zoo.ZOO}
    return {
        **found,
        "ViT": lambda folder: zoo.vit(folder, 3),
        "ResNet": lambda folder: zoo.resnet(folder, 3),
    }


def plant(model: Any, change: Callable[[Any], Any]) -> None:
    """Let the last normalisation layer that meets whole rows hand on something else."""
    norms = [m for m in model.modules() if "Norm" in type(m).__name__ and not list(m.children())]
    last = norms[-1]
    last.register_forward_hook(lambda module, inputs, output: change(output))


def told(trainer: Any) -> set[str]:
    """Alarms of the four leak checks; all that apply must have run."""
    from tests.gallery.harness import alarms, run

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        report = run(trainer, train=False, select=OURS)
    assert "example-leak" in report.ran or "example-leak" in report.skipped
    return alarms(report)


def planted() -> list[tuple[str, str, str, Callable[[Any], Any] | None]]:
    """(architecture, check, name of the leak, change of hidden states; None: a mask of ones)."""
    cases: list[tuple[str, str, str, Callable[[Any], Any] | None]] = []
    for name in architectures():
        if name not in COMPARES_ROWS:
            cases += [(name, "example-leak", kind, change) for kind, change in ROWS.items()]
        if name in CAUSAL:
            cases += [(name, "future-leak", kind, change) for kind, change in FUTURE.items()]
        if name in MASKED:
            cases.append((name, "padding-leak", "a mask of ones", None))
    return cases


def run_case(name: str, check: str, change: Callable[[Any], Any] | None) -> set[str]:
    """Alarms of one architecture with one leak."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        trainer = architectures()[name](Path(folder))
        if change is not None:
            plant(trainer.model, change)
        else:
            inner = trainer.data_collator

            def ones(rows: list[Any]) -> dict[str, Any]:
                batch = inner(rows)
                return {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}

            trainer.data_collator = ones
        return told(trainer)


def main() -> int:
    """Print the figures; 1 when a leak is missed or a healthy model accused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON")
    options = parser.parse_args()
    figures = Figures("scripts/benchmark.py leaks", "Leaks in ordinary architectures")
    accused = 0
    for name, build in architectures().items():
        with tempfile.TemporaryDirectory() as folder:
            found = told(build(Path(folder)))
        if found:
            accused += 1
            figures.record(f"{name}: alarms", len(found), most=0, note=", ".join(sorted(found)))
    figures.record(
        "healthy architectures accused", accused, most=0, note=f"of {len(architectures())}"
    )
    cases, found_of = planted(), dict.fromkeys(OURS, 0)
    for name, check, kind, change in cases:
        alarms = run_case(name, check, change)
        found_of[check] += check in alarms
        if check not in alarms:
            figures.record(f"{name}, {kind}: found", 0, least=1, note=", ".join(sorted(alarms)))
    for check in OURS:
        count = sum(case[1] == check for case in cases)
        if count:
            figures.record(f"{check}: share found", found_of[check] / count, least=1.0,
                           note=f"of {count} planted")  # fmt: skip
    return figures.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())
