"""Steps to detection: how long after a fault begins it is named, for each that a run can show.

The gallery's faulty runs, through real Trainers on a CPU. A proof (a loss that is no number,
gradients that are not cleared, a module that trains in evaluation mode, weights that differ) is to
be named at its step; the rest within a hundred. Exits 1 where one is late or missed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.figures import OUT, Figures

PROOF, REST = 0, 100  # steps after the fault's first


@dataclass(frozen=True)
class Fault:
    """One run that shows a fault.

    Attributes:
        check: what must be told.
        build: folder -> Trainer.
        begins: the first step that shows it.
        proof: whether that step alone proves it.
    """

    check: str
    build: Callable[[Path], Any]
    begins: int = 1
    proof: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    name: str = ""


def planted(at: int) -> list[Fault]:
    """Faults that begin in mid-run."""
    from transformers import Trainer

    from tests.gallery.test_latency import Breaks, Heats
    from tests.models import arguments, bert, words

    def breaks(folder: Path) -> Any:
        args = arguments(folder, max_steps=at + 4)
        trainer = Breaks(model=bert(), args=args, train_dataset=words())
        trainer.at = at
        return trainer

    def heats(folder: Path) -> Any:
        return Trainer(
            model=bert(num_hidden_layers=1),
            args=arguments(folder, max_steps=at + 110),
            train_dataset=words(512),
            callbacks=[Heats(at)],
        )

    course = {"select": ["loss-diverged"]}
    return [
        Fault("loss-not-finite", breaks, at, True, {"select": ["loss-not-finite"]}, f"at {at}"),
        Fault("loss-diverged", heats, at + 1, False, course, f"rate x 1e4 at {at}"),
    ]


def spike(folder: Path) -> Any:
    """One batch whose labels are wrong, late in a run that has settled."""
    from transformers import Trainer

    from tests.models import arguments, bert, words

    class Spikes(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if model.training and 150 <= self.state.global_step < 153:
                inputs = {**inputs, "labels": (inputs["labels"] + 1) % 4}
            return super().compute_loss(model, inputs, *args, **kwargs)

    args = arguments(folder, max_steps=224)
    return Spikes(model=bert(), args=args, train_dataset=words(512))


def faults() -> list[Fault]:
    """Everything that is measured here."""
    from tests.gallery.test_monitors import FAULTS
    from tests.gallery.test_statics import CASES

    proofs = {"gradient-accumulates": 2, "trains-in-eval-mode": 1}
    found = [*planted(38), *planted(150), *planted(700)]
    found.append(Fault("loss-spike", spike, 151, settings={"select": ["loss-spike"]}))
    watched = [c for c in CASES if c.check in ("trains-in-eval-mode", "batchnorm-small-batch")]
    for case in [*FAULTS, *watched]:
        found.append(
            Fault(
                case.check,
                lambda folder, case=case: case.build(folder, True),  # type: ignore[misc]
                proofs.get(case.check, 1),
                case.check in proofs,
                case.settings,
                "" if str(case) == case.check else str(case),
            )
        )
    return found


def steps_to(fault: Fault) -> float:
    """Optimizer steps from the fault's first to the one at whose end it was told."""
    from tests.gallery.harness import everything, run

    hush = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, hush[0], hush[1]:
        report = run(fault.build(Path(folder)), **fault.settings)
    told = [f for f in everything(report) if f.check == fault.check]
    if not told:
        return float("inf")
    first = min(f.step if f.step is not None else 0 for f in told)
    return max(0, first - fault.begins)


def main() -> int:
    """Print the table; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON")
    options = parser.parse_args()
    figures = Figures("scripts/benchmark.py detection", "Steps from a fault to its name", 3)
    for fault in faults():
        name = f"{fault.check} ({fault.name})" if fault.name else fault.check
        figures.record(
            name,
            steps_to(fault),
            most=PROOF if fault.proof else REST,
            note="a proof" if fault.proof else "",
        )
    return figures.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())
