"""Does the ladder of regularizers keep what helps, and nothing else?

    python scripts/benchmark.py regularize                 # all of it, some minutes
    python scripts/benchmark.py regularize --part nulls    # or digits

- nulls: ladders whose rungs change nothing but the draw of random numbers, each training a real
  one, judged by the stage's own code with two seeds: how many keep anything.
- digits: digits with 300 training rows: the stage's result against its start, over five seeds and
  some hundred rows that had no part in choosing.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hf_recipe.instruments.compare import Outcome, Variant, paired_gain  # noqa: E402
from hf_recipe.runner import regularize_stage  # noqa: E402
from hf_recipe.runner.journey import Journey  # noqa: E402
from hf_recipe.runner.setup import Setup  # noqa: E402
from scripts.figures import OUT, Figures  # noqa: E402

TRIED = ("augmentation", "simulated", "smaller-batch", "dropout", "weight-decay", "label-smoothing")
SEEDS, ROWS, HELD = 2, 300, 360


# ---------------------------------------------------------------------------- nulls


def train_many(count: int, seed: int, *, jitter: float = 0.0) -> np.ndarray[Any, Any]:
    """Held-out losses (networks, rows) of small networks on digits, trained side by side.

    They share the rows and differ in their initial weights and in the order of rows.
    """
    draw = torch.Generator().manual_seed(seed)
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    inputs, labels = torch.tensor((x - 8) / 5, dtype=torch.float32), torch.tensor(y)
    train, held = order[:ROWS], order[-HELD:]
    width, steps, rate = 48, 250, 3e-3
    weights = [
        torch.randn(count, 64, width, generator=draw) / 8,
        torch.zeros(count, 1, width),
        torch.randn(count, width, 10, generator=draw) / width**0.5,
        torch.zeros(count, 1, 10),
    ]
    for weight in weights:
        weight.requires_grad_()

    def logits(rows: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.gelu(rows @ weights[0] + weights[1])
        return hidden @ weights[2] + weights[3]

    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        rows = torch.tensor(train)[torch.randint(0, ROWS, (count, 32), generator=draw)]
        batch = inputs[rows]
        batch = batch + jitter * torch.randn(batch.shape, generator=draw)
        loss = torch.nn.functional.cross_entropy(
            logits(batch).reshape(-1, 10), labels[rows].reshape(-1)
        )
        optimizer.zero_grad()
        (loss * count).backward()
        optimizer.step()
    with torch.no_grad():
        found = torch.nn.functional.cross_entropy(
            logits(inputs[held]).reshape(-1, 10), labels[held].repeat(count), reduction="none"
        )
    return found.reshape(count, -1).double().numpy()


class Rehearsal:
    """A lab whose trainings were done beforehand.

    Args:
        train: setup and seed -> losses of rows; asked once for each.
        names: of regularizers that are tried.
    """

    def __init__(
        self, train: Callable[[Setup, int], np.ndarray[Any, Any]], names: tuple[str, ...]
    ) -> None:
        self.train = train
        self.known: dict[tuple[Setup, int], Outcome] = {}
        self.seeds = tuple(range(SEEDS))
        self.stage, self.metric_name, self.fields = "regularize", "accuracy", None
        self.start = Setup("base", 1e-3, 10)
        model = SimpleNamespace(model_name_or_path=None, config_name=None)
        recipe = SimpleNamespace(regularizers=",".join(names))
        self.options = SimpleNamespace(recipe=recipe, model=model)
        self.feed = SimpleNamespace(changes=("any",), fixed="")
        self.data = SimpleNamespace(
            kind="numbers",
            classes=("0", "1"),
            inputs=(),
            labels=lambda part: np.zeros(8, dtype=int),
            task=SimpleNamespace(strata_of_rows=lambda feed, part: [0] * 8),
        )
        self.report = SimpleNamespace(exhibit=lambda ladder: None)
        self.show = SimpleNamespace(say=lambda text: None)

    def ahead(self, variants: Sequence[Variant], *, watch: bool = False) -> None:
        """None is: a drawn outcome takes no time."""

    def run(self, change: str, setup: Setup, seed: int, *, watch: bool = False) -> Outcome:
        """The outcome of this setup and seed."""
        if (setup, seed) not in self.known:
            losses = tuple(self.train(setup, seed))
            self.known[setup, seed] = Outcome(losses, 1.0, 0.9, {"planned": 250})
        return self.known[setup, seed]


def kept_of(train: Callable[[Setup, int], np.ndarray[Any, Any]], names: tuple[str, ...]) -> str:
    """What one ladder over these trainings keeps."""
    lab: Any = Rehearsal(train, names)
    journey = Journey(lab, lab.start)
    regularize_stage.climb(journey, journey.outcomes("start", lab.start))
    return regularize_stage.kept(lab.start, journey.setup)


def drawn(
    runs: np.ndarray[Any, Any], draw: np.random.Generator, fall: float = 0.0
) -> Callable[[Setup, int], np.ndarray[Any, Any]]:
    """Each training takes another one of `runs`; with augmentation its losses are lower."""
    order = itertools.cycle(draw.permutation(len(runs)))
    return lambda setup, seed: runs[next(order)] * (1 - fall if setup.augment else 1)


def nulls(figures: Figures, options: argparse.Namespace) -> None:
    """Ladders whose rungs do nothing; and, beside them, rungs that do."""
    each = 2 * SEEDS * (len(TRIED) + 1)  # with a second look at every rung
    runs = train_many(options.trials * each, options.seed)
    draw = np.random.default_rng(options.seed)
    silent = [
        not kept_of(drawn(ladder, draw), TRIED) for ladder in runs.reshape(options.trials, each, -1)
    ]
    figures.record(
        f"null ladders that keep nothing, of {options.trials}",
        float(np.mean(silent)),
        least=0.95,
        note=f"{len(TRIED)} rungs, {SEEDS} seeds or twice as many, all trained anew",
    )
    many = 1000
    again = [not kept_of(drawn(runs, draw), TRIED) for _ in range(many)]
    figures.record(f"the same, {many} ladders drawn from these", float(np.mean(again)), least=0.95)
    for fall in (0.05, 0.1, 0.2, 0.3):
        names = ("augmentation", "dropout", "weight-decay")
        found = ["augment" in kept_of(drawn(runs, draw, fall), names) for _ in range(200)]
        least = 0.8 if fall == 0.3 else None
        figures.record(f"a fall of the loss by {fall:.0%} is kept", np.mean(found), least=least)


# ---------------------------------------------------------------------------- digits


def digits(figures: Figures, options: argparse.Namespace) -> None:
    """The stage on digits with few training rows; then seeds and rows that had no part in it."""
    from hf_recipe.runner.data import load
    from hf_recipe.runner.experiment import Lab
    from hf_recipe.runner.options import parse
    from hf_recipe.runner.show import Show

    with tempfile.TemporaryDirectory() as name:
        asked = parse(["--use_cpu", "true", "--report_to", "none", "--output_dir", name])
        data = load(asked)
        train = data.splits["train"]
        few, others = train.select(range(ROWS)), train.select(range(ROWS, len(train)))
        chosen = replace(data, splits={**data.splits, "train": few})
        lab = Lab(asked, chosen, Path(name), Show())
        lab.stage = "regularize"
        journey = Journey(lab, lab.start.change(model="large"))
        start = journey.setup
        regularize_stage.climb(journey, journey.outcomes("where the stage begins", start))
        end, seeds = journey.setup, range(1000 + options.seed, 1005 + options.seed)
        unseen = replace(data, splits={**data.splits, "train": few, "validation": others})
        lab = Lab(asked, unseen, Path(name), Show())
        before = [lab.run("where the stage began", start, seed).row_losses for seed in seeds]
        after = [lab.run("where it ended", end, seed).row_losses for seed in seeds]
    gain = paired_gain(before, after)
    loss = float(np.mean(before))
    figures.record(
        f"digits, {ROWS} training rows: fall of the validation loss",
        gain.mean / loss,
        interval=(gain.low / loss, gain.high / loss),
        note=f"from {loss:.3f}, 5 seeds and {len(others)} rows that had no part in choosing; "
        f"kept: {regularize_stage.kept(start, end) or 'nothing'}",
    )
    figures.record("the same, lower end of its interval", gain.low / loss, least=0.001)


PARTS = {"nulls": nulls, "digits": digits}


def main() -> int:
    """Run the chosen parts; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=sorted(PARTS), help="default: all of them")
    parser.add_argument("--trials", type=int, default=40, help="null ladders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    command = "scripts/benchmark.py regularize"
    figures = Figures(
        command + (f" --part {options.part}" if options.part else ""),
        "The ladder of regularizers",
        options.seed,
    )
    for name in [options.part] if options.part else list(PARTS):
        PARTS[name](figures, options)
    return figures.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())
