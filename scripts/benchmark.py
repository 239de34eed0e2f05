"""Figures and their targets, each from a command; exits 1 when a target is missed.

    python scripts/benchmark.py overhead       # what attach() costs a step
    python scripts/benchmark.py healthy        # how many healthy runs raise an alarm
    python scripts/benchmark.py --help         # the rest: each benchmark_NAME.py is a command NAME

Speeds are ratios within one run, paired and interleaved: machines are shared and noisy. Every
command prints its figures and writes them as JSON, with commit, versions and seeds, to --out.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.figures import OUT, Figures  # noqa: E402

BLOCK = 50


# ---------------------------------------------------------------------------- overhead


def workloads(cuda: bool) -> dict[str, Callable[[], tuple[Any, Any]]]:
    """Name -> () -> (model, data set): a 3 ms step, a 2M-parameter GPT-2, a small ResNet."""
    import datasets
    import torch
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        ResNetConfig,
        ResNetForImageClassification,
    )

    from tests.models import bert, words

    def small() -> tuple[Any, Any]:
        return bert(hidden_size=16, num_hidden_layers=1, intermediate_size=32), words(512)

    def gpt2() -> tuple[Any, Any]:
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=1000, n_embd=192, n_layer=4, n_head=4, n_positions=64)
        ids = torch.randint(0, 1000, (256, 16)).tolist()
        data = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})
        return GPT2LMHeadModel(config), data

    def resnet() -> tuple[Any, Any]:
        torch.manual_seed(0)
        config = ResNetConfig(
            num_channels=1,
            embedding_size=16,
            hidden_sizes=[16, 32],
            depths=[1, 1],
            layer_type="basic",
            num_labels=10,
        )
        pixels = torch.randn(256, 1, 32, 32)
        labels = torch.randint(0, 10, (256,))
        rows = [{"pixel_values": p, "labels": y} for p, y in zip(pixels, labels, strict=True)]
        model = ResNetForImageClassification(config)
        model.accepts_loss_kwargs = False
        return model, rows

    return {"3 ms step": small, "GPT-2, 2M parameters": gpt2, "small ResNet": resnet}


def toggled_run(
    build: Callable[[], tuple[Any, Any]], steps: int, seed: int, watched: bool, cuda: bool
) -> list[float]:
    """Log ratios of the step's cost with the recipe on against off, one per pair of blocks.

    The recipe is paused and resumed in random order within each pair of blocks of one run. With
    `watched` False both are paused: what is left is the noise of the measurement itself.
    """
    import torch
    from transformers import Trainer, TrainerCallback

    import hf_recipe
    from tests.models import arguments

    clock = time.perf_counter if cuda else time.process_time
    torch.set_num_threads(1)
    model, data = build()
    draw = random.Random(seed)
    order = [on for _ in range(steps // (2 * BLOCK)) for on in draw.sample([True, False], 2)]

    class Toggle(TrainerCallback):
        def __init__(self) -> None:
            self.cost: list[float] = []
            self.began = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % BLOCK:
                return
            now = clock()
            if state.global_step:
                self.cost.append(now - self.began)
            block = state.global_step // BLOCK
            if watched and block < len(order):
                (recipe.resume if order[block] else recipe.pause)()
            self.began = clock()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.cost.append(clock() - self.began)

    with tempfile.TemporaryDirectory() as folder:
        toggle = Toggle()
        trainer = Trainer(
            model=model,
            args=arguments(
                Path(folder),
                max_steps=len(order) * BLOCK,
                logging_steps=10**9,
                use_cpu=not cuda,
                logging_strategy="no",
            ),
            train_dataset=data,
        )
        recipe = hf_recipe.attach(trainer)
        if not watched:
            recipe.pause()
        trainer.callback_handler.callbacks.insert(0, toggle)
        trainer.train()
    pairs = []
    for i in range(2, len(order) - 1, 2):  # the first pair warms up
        on, off = (i, i + 1) if order[i] else (i + 1, i)
        pairs.append(math.log(toggle.cost[on] / toggle.cost[off]))
    return pairs


def median_interval(values: list[float], seed: int) -> tuple[float, float, float]:
    """Median with its 95 % bootstrap interval, as ratios."""
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(1000))
    return tuple(math.exp(v) for v in (statistics.median(values), medians[25], medians[974]))


def overhead(options: argparse.Namespace) -> int:
    """`attach` at its defaults against the bare step."""
    import torch

    cuda = torch.cuda.is_available()
    figures = Figures("scripts/benchmark.py overhead", "Cost of `attach`, per step", options.seed)
    for name, build in workloads(cuda).items():
        steps = options.steps // (4 if "GPT" in name else 1)  # its step is many times as long
        ratio, *interval = median_interval(
            toggled_run(build, steps, options.seed, True, cuda), options.seed
        )
        same = median_interval(toggled_run(build, steps, options.seed, False, cuda), options.seed)
        decided = interval[0] > options.limit or interval[1] <= options.limit
        noisy = max(abs(same[1] - 1), abs(same[2] - 1)) > 0.003 and not decided
        figures.record(
            name,
            ratio,
            most=options.limit,
            interval=(interval[0], interval[1]),
            note=f"A/A {same[0]:.4f} [{same[1]:.4f}, {same[2]:.4f}]"
            + (": too noisy to decide" if noisy else ""),
        )
    return figures.finish(options.out)


# ---------------------------------------------------------------------------- healthy


def healthy(options: argparse.Namespace) -> int:
    """Every healthy run of the gallery over several seeds: how many raise an alarm."""
    from tests.gallery.harness import alarms, run
    from tests.gallery.healthy import HEALTHY

    figures = Figures(
        f"scripts/benchmark.py healthy --seeds {options.seeds}",
        "Healthy runs that raise an alarm",
        options.seed,
    )
    runs = flagged = 0
    for case in HEALTHY:
        told: list[str] = []
        for seed in range(options.seed, options.seed + options.seeds):
            with tempfile.TemporaryDirectory() as folder:
                told += sorted(alarms(run(case.build(Path(folder), seed))) - set(case.may))
            runs += 1
        if told:
            flagged += 1
            figures.record(case.name, len(told), most=0, note=", ".join(sorted(set(told))))
    figures.record("kinds of healthy run flagged", flagged, most=0, note=f"of {len(HEALTHY)}")
    figures.record("runs in all", runs)
    return figures.finish(options.out)


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "healthy": healthy,
    "overhead": overhead,
}
SCRIPTS = {  # benchmark_loss_law.py is the command loss-law
    path.stem.removeprefix("benchmark_").replace("_", "-"): path
    for path in sorted(Path(__file__).parent.glob("benchmark_*.py"))
}


def main() -> int:
    """Run one command; 1 if one of its targets is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=sorted([*COMMANDS, *SCRIPTS]))
    parser.add_argument("--steps", type=int, default=6000, help="steps of each run")
    parser.add_argument("--limit", type=float, default=1.03, help="largest ratio to the bare step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each healthy run")
    if sys.argv[1:2] and sys.argv[1] in SCRIPTS:  # a script of its own, with flags of its own
        command = [sys.executable, str(SCRIPTS[sys.argv[1]]), *sys.argv[2:]]
        return subprocess.run(command, cwd=ROOT).returncode
    options = parser.parse_args()
    return COMMANDS[options.command](options)


if __name__ == "__main__":
    sys.exit(main())
