"""Our own microseconds in a step: a clock around every function of ours that a step calls.

It resolves microseconds where a whole step's time does not, on a busy machine too. The clock costs
time itself, more of it after a step has emptied the caches; so a hollow run beside it carries the
same clocks around functions that do nothing, and what they show is taken off.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

AFTER = 512  # from here on the run is in its steady state
KINDS = ("plain", "heard", "flush", "sample")
Make = Callable[[Path, int], Any]  # folder and steps -> a Trainer


class OwnClock:
    """Nanoseconds spent in our functions, by step; what they call of the Trainer's is left out."""

    def __init__(self) -> None:
        self.step = 0
        self.hears: Callable[[], bool] = lambda: False
        self.spent: dict[int, int] = defaultdict(int)
        self.length: dict[int, int] = {}
        self.heard: set[int] = set()  # steps in which the margins' hook was there
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

    def follow(self, trainer: Any) -> None:
        """Tell the step, and take the steps' lengths: one begins as its rows are asked for."""
        fetch, began = trainer.get_batch_samples, 0

        def get_batch_samples(*args: Any, **kwargs: Any) -> Any:
            nonlocal began
            now = time.perf_counter_ns()
            if began:
                self.length[self.step] = now - began
            self.step, began = trainer.state.global_step + 1, now
            samples = fetch(*args, **kwargs)
            if self.hears():
                self.heard.add(self.step)
            return samples

        trainer.get_batch_samples = get_batch_samples


@contextmanager
def attached(clock: OwnClock, trainer: Any) -> Iterator[None]:
    """Attach to `trainer` with `clock` around callbacks, seams and the margins' hook."""
    import hf_recipe
    from hf_recipe.instruments.margins import MarginWatch
    from hf_recipe.trainer.seams import SEAMS

    heard = MarginWatch._hear
    MarginWatch._hear = clock.around(heard, own=True)  # type: ignore[method-assign]
    for name in SEAMS:
        setattr(trainer, name, clock.around(getattr(trainer, name), own=False))
    recipe = hf_recipe.attach(trainer)
    clock.hears = lambda: (m := recipe.closer_look.margins) is not None and m.listening
    for name in SEAMS:
        setattr(trainer, name, clock.around(getattr(trainer, name), own=True))
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, hf_recipe.RecipeCallback):
            for name in _events():
                setattr(callback, name, clock.around(getattr(callback, name), own=True))
    try:
        yield
    finally:
        recipe.detach()
        MarginWatch._hear = heard  # type: ignore[method-assign]


@contextmanager
def hollow(clock: OwnClock, trainer: Any) -> Iterator[None]:
    """The same clocks around functions that do nothing, and no recipe."""
    from transformers import TrainerCallback

    from hf_recipe.trainer.seams import SEAMS

    def nothing(*args: Any, **kwargs: Any) -> None:
        """What an empty function costs is not ours."""

    for name in SEAMS:
        inner = clock.around(getattr(trainer, name), own=False)
        setattr(trainer, name, clock.around(inner, own=True))
    callback = TrainerCallback()
    for name in _events():
        setattr(callback, name, clock.around(nothing, own=True))
    trainer.add_callback(callback)
    handles: list[Any] = []
    clock.hears = lambda: bool(handles)

    class Hear(TrainerCallback):
        """A hook of the same kind over the first half of the run."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                handles.append(trainer.model.register_forward_hook(clock.around(nothing, own=True)))
            elif state.global_step == state.max_steps // 2:
                handles.pop().remove()

    trainer.add_callback(Hear())
    yield


def _events() -> list[str]:
    from transformers import TrainerCallback

    return [name for name in dir(TrainerCallback) if name.startswith("on_")]


def own_times(make: Make, steps: int) -> dict[str, float]:
    """Microseconds a step: of ours on plain, flushed and sampled steps, in the mean; the step's.

    What happens once in a run (the look ahead at its half) is left out.
    """
    from hf_recipe.instruments.layers import EVERY

    found, length, heard = _by_kind(make, steps, attached)
    empty, _, _ = _by_kind(make, steps, hollow)
    found = {kind: max(0.0, found[kind] - empty[kind]) for kind in KINDS}
    usual = found["plain"] + heard * (found["heard"] - found["plain"])
    mean = usual + max(0.0, found["flush"] - usual) / flush_interval(steps)
    mean += max(0.0, found["sample"] - usual) / EVERY
    clocks = {"clock": empty["plain"], "mean": mean, "usual": usual, "step": length - mean}
    return {**found, **clocks, "share heard": heard}


def flush_interval(steps: int) -> int:
    """Steps from one flush to the next at the end of a run of so many."""
    from hf_recipe.instruments.record import flushes_at

    last = [step for step in range(1, steps + 1) if flushes_at(step)][-2:]
    return last[1] - last[0]


def _by_kind(
    make: Make, steps: int, watch: Callable[[OwnClock, Any], AbstractContextManager[None]]
) -> tuple[dict[str, float], float, float]:
    """(own microseconds by kind of step, the step's own length, the share of steps heard)."""
    from hf_recipe.instruments.layers import looks_at
    from hf_recipe.instruments.record import flushes_at

    clock = OwnClock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(Path(folder), steps)
        with watch(clock, trainer):
            clock.follow(trainer)
            trainer.train()
    kinds: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for step in range(min(AFTER, steps // 3), steps):
        kind = "heard" if step in clock.heard else "plain"
        kind = "sample" if looks_at(step) else "flush" if flushes_at(step) else kind
        kinds[kind].append(clock.spent[step])
    length = usual_of([clock.length[s] for s in range(steps // 3, steps - 1)])
    times = {kind: usual_of(spent) for kind, spent in kinds.items()}
    return times, length, len(clock.heard) / steps


def usual_of(nanoseconds: list[int]) -> float:
    """The lower quartile in microseconds: what is interrupted by other processes is longer."""
    return sorted(nanoseconds)[len(nanoseconds) // 4] / 1e3 if nanoseconds else 0.0
