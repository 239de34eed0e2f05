"""What `attach` at its defaults costs, beside other watchers, in one run each.

    python scripts/benchmark.py overhead                 # all of it
    python scripts/benchmark.py overhead --only own      # our own microseconds alone

The **ratio** to the bare step: a watcher is paused and resumed in random blocks of one run, the
blocks paired; an A/A run beside it says what the machine's noise alone gives. Our **own time** in
microseconds (`own_time.py`), and how it **grows** with the number of parameters and layers. What a
**short** run of 50 steps pays in all: probes before it, the report after it. And the **memory**
that is held while a run goes on.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import math
import os
import random
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_SILENT", "true")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.figures import OUT, Figures
from scripts.own_time import KINDS, own_times
from scripts.watchers import OTHERS, Watcher, nothing, ours, wandb_watch

BLOCK = 50
USUAL, WORST = 1.01, 1.03
QUIET = 0.003  # how far A/A may leave 1 before a ratio decides nothing
OWN_SHARE = 0.01  # of the bare step: 30 microseconds of 3 milliseconds
SHORT, SHORT_SECONDS = 50, 1.0  # steps, and CPU seconds of ours in such a run, imports left out
MEGABYTES, MEMORY_SHARE = 10.0, 0.01  # of the model, beside them
Build = Callable[[], tuple[Any, Any]]


def workloads() -> dict[str, Build]:
    """Name -> () -> (model, data set): a 3 ms step, a 2M-parameter GPT-2, a small ResNet."""
    import datasets
    import torch
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        ResNetConfig,
        ResNetForImageClassification,
    )

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

    return {"3 ms step": sized(16, 1), "GPT-2, 2M parameters": gpt2, "small ResNet": resnet}


def sized(width: int, layers: int) -> Build:
    """A BERT of `layers` layers, `width` wide."""
    from tests.models import bert, words

    def build() -> tuple[Any, Any]:
        model = bert(hidden_size=width, num_hidden_layers=layers, intermediate_size=2 * width)
        return model, words(512)

    return build


def trainer_of(build: Build, folder: Path, steps: int) -> Any:
    """A Trainer that logs, evaluates and saves nothing."""
    import torch
    from transformers import Trainer

    from tests.models import arguments

    torch.set_num_threads(1)
    model, data = build()
    cuda = torch.cuda.is_available()
    args = arguments(
        folder, max_steps=steps, logging_steps=10**9, logging_strategy="no", use_cpu=not cuda
    )
    return Trainer(model=model, args=args, train_dataset=data)


# ---------------------------------------------------------------------------- the ratio


def toggled_run(build: Build, steps: int, seed: int, watcher: Watcher) -> list[float]:
    """Log ratios of the step's cost with the watcher on against off, one per pair of blocks.

    It is switched in random order within each pair of blocks of one run.
    """
    import torch
    from transformers import TrainerCallback

    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    draw = random.Random(seed)
    order = [on for _ in range(steps // (2 * BLOCK)) for on in draw.sample([True, False], 2)]

    class Toggle(TrainerCallback):
        def __init__(self) -> None:
            self.cost: list[float] = []
            self.began = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % BLOCK:
                return
            now, block = clock(), state.global_step // BLOCK
            if block:
                self.cost.append(now - self.began)
            before = order[block - 1] if block else None
            if block < len(order) and order[block] != before:
                (on if order[block] else off)()
            self.began = clock()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.cost.append(clock() - self.began)

    with tempfile.TemporaryDirectory() as folder:
        toggle = Toggle()
        trainer = trainer_of(build, Path(folder), len(order) * BLOCK)
        on, off = watcher(trainer, Path(folder))
        trainer.callback_handler.callbacks.insert(0, toggle)
        trainer.train()
        off()
        if watcher is wandb_watch:
            import wandb

            wandb.finish()
    pairs = []
    for i in range(2, len(order) - 1, 2):  # the first pair warms up
        with_it, without = (i, i + 1) if order[i] else (i + 1, i)
        pairs.append(math.log(toggle.cost[with_it] / toggle.cost[without]))
    return pairs


def median_interval(values: list[float], seed: int) -> tuple[float, float, float]:
    """Median with its 95 % bootstrap interval, as ratios."""
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(1000))
    return tuple(math.exp(v) for v in (statistics.median(values), medians[25], medians[974]))


# ---------------------------------------------------------------------------- the command


def ratios(figures: Figures, options: argparse.Namespace) -> None:
    """`attach` on the three workloads, and the others on the first."""
    for name, build in workloads().items():
        steps = options.steps // (4 if "GPT" in name else 1)  # its step is many times as long
        ratio, *interval = median_interval(
            toggled_run(build, steps, options.seed, ours), options.seed
        )
        same = median_interval(toggled_run(build, steps, options.seed, nothing), options.seed)
        noise = max(abs(same[1] - 1), abs(same[2] - 1))
        decided = noise <= QUIET or interval[0] > USUAL or interval[1] <= USUAL
        figures.record(
            name,
            ratio,
            most=USUAL if decided else WORST,
            interval=(interval[0], interval[1]),
            note=f"A/A {same[0]:.4f} [{same[1]:.4f}, {same[2]:.4f}]"
            + ("" if decided else f": undecided at {USUAL}, the machine is too noisy"),
        )
    small = workloads()["3 ms step"]
    for name, (package, watcher) in OTHERS.items():
        if importlib.util.find_spec(package) is None:
            figures.record(f"3 ms step with {name}", math.nan, note="not installed")
            continue
        pairs = toggled_run(small, options.steps // 4, options.seed, watcher)
        ratio, *interval = median_interval(pairs, options.seed)
        figures.record(
            f"3 ms step with {name}", ratio, interval=(interval[0], interval[1]), note="another's"
        )


def own(figures: Figures, options: argparse.Namespace) -> None:
    """Our own microseconds on the 3 ms step, against the step itself."""
    make = functools.partial(trainer_of, workloads()["3 ms step"])
    found = own_times(make, max(1400, options.steps // 3))
    note = ", ".join(f"{kind} {found[kind]:.0f}" for kind in KINDS)
    figures.record(
        "own time, us a step",
        found["mean"],
        note=f"by kind of step: {note}; {found['share heard']:.0%} of the steps are heard; "
        f"{found['clock']:.0f} of the clock's own taken off",
    )
    figures.record(
        "own time, share of the bare step",
        found["mean"] / found["step"],
        most=OWN_SHARE,
        note=f"of {found['step']:.0f} us",
    )


def growth(figures: Figures, options: argparse.Namespace) -> None:
    """The own time over width and depth."""
    for width, layers in ((16, 1), (64, 1), (256, 1), (64, 4), (64, 16)):
        build = sized(width, layers)
        parameters = sum(p.numel() for p in build()[0].parameters())
        found = own_times(functools.partial(trainer_of, build), 840)
        figures.record(
            f"own us, {layers} x {width} wide, {parameters:,} parameters",
            found["mean"],
            note=f"{found['mean'] / found['step']:.2%} of a step of {found['step']:.0f}; usual "
            f"{found['usual']:.0f}, flush {found['flush']:.0f}, sampled {found['sample']:.0f}",
        )


def short(figures: Figures, options: argparse.Namespace) -> None:
    """CPU seconds that a run of 50 steps takes longer: probes, watching, report."""
    build = workloads()["3 ms step"]
    took: dict[bool, list[float]] = {True: [], False: []}
    for repeat in range(6):
        for watched in (True, False):
            with tempfile.TemporaryDirectory() as folder:
                trainer = trainer_of(build, Path(folder), SHORT)
                began = time.process_time()
                if watched:
                    ours(trainer, Path(folder))
                trainer.train()
                if repeat:  # the first one imports
                    took[watched].append(time.process_time() - began)
    bare = statistics.median(took[False])
    figures.record(
        f"a run of {SHORT} steps: CPU seconds more",
        statistics.median(took[True]) - bare,
        most=SHORT_SECONDS,
        note=f"the bare run takes {bare:.2f}",
    )


def memory(figures: Figures, options: argparse.Namespace) -> None:
    """Megabytes that attach holds while a run goes on, tensors and Python objects."""
    build = workloads()["GPT-2, 2M parameters"]
    size = sum(p.numel() * p.element_size() for p in build()[0].parameters()) / 2**20
    with tempfile.TemporaryDirectory() as folder:  # imports are no part of it
        trainer = trainer_of(build, Path(folder), 2)
        ours(trainer, Path(folder))
        trainer.train()
    watched, bare = held(build, ours), held(build, lambda trainer, folder: None)
    figures.record(
        "memory held in mid-run, MB more",
        watched - bare,
        most=MEGABYTES + MEMORY_SHARE * size,
        note=f"1 % of the model's {size:.1f} and 10 beside it are allowed",
    )


def held(build: Build, watch: Callable[[Any, Path], Any]) -> float:
    """Megabytes of tensors and of Python objects that a run has made by step 24 and still holds."""
    from transformers import TrainerCallback

    from hf_recipe.instruments.memory import TensorBytes

    seen: list[float] = []

    class Look(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 24:
                gc.collect()
                seen.append((tensors.now + tracemalloc.get_traced_memory()[0]) / 2**20)
                control.should_training_stop = True

    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(build, Path(folder), SHORT)
        trainer.add_callback(Look())
        tracemalloc.start()
        try:
            with TensorBytes() as tensors:
                watch(trainer, Path(folder))
                trainer.train()
        finally:
            tracemalloc.stop()
    return seen[0]


PARTS = {"ratios": ratios, "own": own, "growth": growth, "short": short, "memory": memory}


def main() -> int:
    """Print the tables; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6000, help="steps of each run")
    parser.add_argument("--only", choices=sorted(PARTS), help="one of the tables")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON")
    options = parser.parse_args()
    figures = Figures("scripts/benchmark.py overhead", "Cost of `attach`, per step", options.seed)
    for name, part in PARTS.items():
        if options.only in (None, name):
            part(figures, options)
    return figures.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())
