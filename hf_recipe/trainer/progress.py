"""A progress bar for who waits at a terminal: nothing in the first two seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from hf_recipe.core.check import Probe

PATIENCE = 2.0  # seconds without a bar


def shown(
    probes: Iterable[Probe], *, enabled: bool, stream: Any = None, patience: float = PATIENCE
) -> Iterator[Probe]:
    """The probes one by one; from `patience` seconds on, a bar names the one that runs.

    Args:
        enabled: False for processes that do not speak, and where progress bars are off.
        stream: where the bar is drawn, if it is a terminal; default: standard error.
    """
    todo = list(probes)
    stream = sys.stderr if stream is None else stream
    if not (enabled and stream.isatty()):
        yield from todo
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    bar = Progress(
        TextColumn("preflight"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        console=Console(file=stream),
        transient=True,
    )
    task = bar.add_task("", total=len(todo))
    began = time.monotonic()
    started = False
    try:
        for done, probe in enumerate(todo):
            if not started and time.monotonic() - began >= patience:
                bar.start()
                started = True
            if started:
                bar.update(task, completed=done, description=probe.name)
            yield probe
    finally:
        if started:
            bar.stop()
