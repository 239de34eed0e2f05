"""What `attach` at its defaults costs a step, beside other watchers, in one run each.

    python scripts/benchmark.py overhead                 # ratios, our own microseconds, growth
    python scripts/benchmark.py overhead --only own      # our own microseconds alone

Three measures. The **ratio** to the bare step: a watcher is paused and resumed in random blocks of
one run, the blocks paired; an A/A run beside it says what the machine's noise alone gives. Our
**own time**: a clock around every function of ours that a step calls, by kind of step, weighed by
how often each kind comes; it resolves microseconds on a busy machine too. And how the own time
**grows** with the number of parameters and layers.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_SILENT", "true")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.figures import OUT, Figures

BLOCK = 50
USUAL, WORST = 1.01, 1.03
OWN_SHARE = 0.01  # of the bare step: 30 microseconds of 3 milliseconds
AFTER = 512  # from here on the run is in its steady state
Build = Callable[[], tuple[Any, Any]]
Watcher = Callable[[Any, Path], tuple[Callable[[], Any], Callable[[], Any]]]


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


# ---------------------------------------------------------------------------- watchers


def ours(trainer: Any, folder: Path) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """`hf_recipe.attach` at its defaults."""
    import hf_recipe

    recipe = hf_recipe.attach(trainer)
    return recipe.resume, recipe.pause


def nothing(trainer: Any, folder: Path) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A/A: both blocks with the recipe paused."""
    _, pause = ours(trainer, folder)
    pause()
    return pause, pause


def wandb_watch(trainer: Any, folder: Path) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """``wandb.watch(log="all")`` as HF's callback sets it: histograms every 100 passes."""
    import wandb

    run = wandb.init(mode="offline", dir=str(folder), project="overhead")

    def on() -> None:
        run.watch(trainer.model, log="all", log_freq=100)

    return on, lambda: run.unwatch(trainer.model)


def underflow_overflow(trainer: Any, folder: Path) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """HF's ``debug="underflow_overflow"``."""
    from transformers.debug_utils import DebugUnderflowOverflow

    before = {module: dict(module._forward_hooks) for module in trainer.model.modules()}

    def off() -> None:
        for module, hooks in before.items():
            module._forward_hooks.clear()
            module._forward_hooks.update(hooks)

    return lambda: DebugUnderflowOverflow(trainer.model), off


def torch_audit(trainer: Any, folder: Path) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """torch-audit's autopatch at its default, every 1,000th step."""
    from torch_audit import autopatch

    held: list[Any] = []

    def on() -> None:
        held.append(autopatch(trainer.model, optimizer=trainer.optimizer, reporters=[]))

    def off() -> None:
        while held:
            held.pop().unpatch()

    return on, off


def trainproof(trainer: Any, folder: Path) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """trainproof's callback at its defaults."""
    from trainproof.integrations import TrainproofCallback

    callback, callbacks = TrainproofCallback(), trainer.callback_handler.callbacks

    def off() -> None:
        if callback in callbacks:
            callbacks.remove(callback)

    return lambda: callbacks.append(callback), off


OTHERS: dict[str, tuple[str, Watcher]] = {
    'wandb.watch(log="all")': ("wandb", wandb_watch),
    'debug="underflow_overflow"': ("transformers", underflow_overflow),
    "torch-audit's autopatch": ("torch_audit", torch_audit),
    "trainproof's callback": ("trainproof", trainproof),
}


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


# ---------------------------------------------------------------------------- our own time


class OwnClock:
    """Nanoseconds spent in our functions, by step; what they call of the Trainer's is left out."""

    def __init__(self) -> None:
        self.step = 0
        self.spent: dict[int, int] = defaultdict(int)
        self.length: dict[int, int] = {}
        self._inside: list[bool] = []
        self._since = 0

    def around(self, function: Callable[..., Any], *, own: bool) -> Callable[..., Any]:
        """`function` with the clock running (own) or stopped (the Trainer's)."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._switch(own)
            try:
                return function(*args, **kwargs)
            finally:
                self._back()

        return timed

    def _switch(self, own: bool) -> None:
        now = time.perf_counter_ns()
        if self._inside and self._inside[-1]:
            self.spent[self.step] += now - self._since
        self._inside.append(own)
        self._since = time.perf_counter_ns()

    def _back(self) -> None:
        now = time.perf_counter_ns()
        if self._inside.pop():
            self.spent[self.step] += now - self._since
        self._since = time.perf_counter_ns()


@contextmanager
def clocked(clock: OwnClock, trainer: Any) -> Iterator[None]:
    """Attach to `trainer` with `clock` around callbacks, seams and hooks."""
    from transformers import TrainerCallback

    import hf_recipe
    from hf_recipe.instruments.margins import MarginWatch
    from hf_recipe.trainer.seams import SEAMS

    heard = MarginWatch._hear
    MarginWatch._hear = clock.around(heard, own=True)  # type: ignore[method-assign]
    for name in SEAMS:
        setattr(trainer, name, clock.around(getattr(trainer, name), own=False))
    recipe = hf_recipe.attach(trainer)
    for name in SEAMS:
        setattr(trainer, name, clock.around(getattr(trainer, name), own=True))
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, hf_recipe.RecipeCallback):
            for name in (n for n in dir(TrainerCallback) if n.startswith("on_")):
                setattr(callback, name, clock.around(getattr(callback, name), own=True))

    class Steps(TrainerCallback):
        def __init__(self) -> None:
            self.began = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now = time.perf_counter_ns()
            if self.began:
                clock.length[clock.step] = now - self.began
            clock.step, self.began = state.global_step + 1, now

    trainer.callback_handler.callbacks.insert(0, Steps())
    try:
        yield
    finally:
        recipe.detach()
        MarginWatch._hear = heard  # type: ignore[method-assign]


def own_times(build: Build, steps: int) -> dict[str, float]:
    """Microseconds a step: of ours on plain, flushed and sampled steps, in the mean; the step's.

    What happens once in a run (the look ahead at its half) is left out.
    """
    from hf_recipe.instruments.layers import EVERY, looks_at
    from hf_recipe.instruments.record import LATE, flushes_at

    clock = OwnClock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(build, Path(folder), steps)
        with clocked(clock, trainer):
            trainer.train()
    middle = steps // 2
    kinds: dict[str, list[int]] = {"plain": [], "heard": [], "flush": [], "sample": []}
    for step in range(min(AFTER, steps // 3), steps):
        kind = "heard" if step <= middle else "plain"  # labels' margins are heard half the run
        kind = "flush" if flushes_at(step) else "sample" if looks_at(step) else kind
        kinds[kind].append(clock.spent[step])
    found = {kind: usual_of(spent) for kind, spent in kinds.items()}
    length = usual_of([clock.length[s] for s in range(steps // 3, steps - 1)])
    each_flush, each_sample = 64 if steps > LATE else 32, EVERY
    usual = (found["plain"] + found["heard"]) / 2
    mean = usual + (found["flush"] - usual) / each_flush
    mean += max(0.0, found["sample"] - usual) / each_sample
    return {**found, "mean": mean, "step": length - mean}


def usual_of(nanoseconds: list[int]) -> float:
    """The lower quartile in microseconds: what is interrupted by other processes is longer."""
    return sorted(nanoseconds)[len(nanoseconds) // 4] / 1e3 if nanoseconds else 0.0


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
        decided = interval[0] > USUAL or interval[1] <= USUAL
        limit = USUAL if decided or noise <= 0.003 else WORST
        figures.record(
            name,
            ratio,
            most=limit,
            interval=(interval[0], interval[1]),
            note=f"A/A {same[0]:.4f} [{same[1]:.4f}, {same[2]:.4f}]"
            + ("" if limit == USUAL else f": too noisy to decide {USUAL}"),
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
    found = own_times(workloads()["3 ms step"], max(1400, options.steps // 3))
    note = ", ".join(f"{kind} {found[kind]:.0f}" for kind in ("plain", "heard", "flush", "sample"))
    figures.record("own time, us a step", found["mean"], note=f"by kind of step: {note}")
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
        found = own_times(build, 840)
        usual = (found["plain"] + found["heard"]) / 2
        figures.record(
            f"own us, {layers} x {width} wide, {parameters:,} parameters",
            found["mean"],
            note=f"{found['mean'] / found['step']:.2%} of a step of {found['step']:.0f}; usual "
            f"{usual:.0f}, flush {found['flush']:.0f}, sampled {found['sample']:.0f}",
        )


PARTS = {"ratios": ratios, "own": own, "growth": growth}


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
