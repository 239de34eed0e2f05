"""Independent trainings of a tiny network, several at once: one forked process per core.

A step of a few milliseconds is too short to be shared by cores, so a tiny network takes one and
leaves the others idle. What a stage will ask for next can be trained ahead on these: a fork of
this process trains it and leaves outcome, report and weights in the job's folder, where the stage
finds them just as it does after having been killed and started again. Nothing else depends on
it: what could not be trained ahead is trained when it is asked for.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from typing import TYPE_CHECKING

import psutil
import torch

from hf_recipe.instruments.compare import Variant
from hf_recipe.instruments.distributed import in_group
from hf_recipe.runner.show import Show

if TYPE_CHECKING:
    from hf_recipe.runner.experiment import Lab


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def places(lab: Lab) -> int:
    """How many trainings fit side by side; 1 where a device, a launcher or threads fill it."""
    on_cpu = lab.options.training.device.type == "cpu"
    # even of one: a group's threads are not there in a fork, which waits for them for ever
    if in_group() or not on_cpu or torch.accelerator.is_available() or sys.platform != "linux":
        return 1  # gradients in a fork: only where torch has started no thread for a device
    return max(1, cores() // torch.get_num_threads())


def train_ahead(lab: Lab, variants: Sequence[Variant], stuck_after_s: float = 30) -> set[str]:
    """Train those of `variants` that are not remembered yet, as many at once as there is room.

    Args:
        stuck_after_s: a fork that computes nothing for so long waits for a lock that some thread of
            this process held when it was forked, and for ever: it is ended.

    Returns:
        Keys of those that were trained.
    """
    due = {v.key: v for v in variants if not lab.outcome_path(v).is_file()}
    room = min(places(lab), len(due))
    if room < 2:
        return set()
    waiting = list(due.values())
    running: list[_Fork] = []
    try:
        with lab.show.training(f"{len(due)} trainings side by side"):
            while waiting or running:
                while waiting and len(running) < room:
                    running.append(_Fork(lab, waiting.pop(0)))
                wait([fork.process.sentinel for fork in running], timeout=1.0)
                running = [fork for fork in running if not fork.ended(stuck_after_s)]
    finally:
        for fork in running:
            fork.process.kill()
    return {key for key, variant in due.items() if lab.outcome_path(variant).is_file()}


class _Fork:
    """A forked process that trains one variant."""

    def __init__(self, lab: Lab, variant: Variant) -> None:
        fork = multiprocessing.get_context("fork")
        self.process = fork.Process(target=_train, args=(lab, variant), daemon=True)
        self.process.start()
        self._computed_s, self._at = 0.0, time.monotonic()

    def ended(self, stuck_after_s: float) -> bool:
        """Whether it is over; one that has computed nothing for so long is ended here."""
        if not self.process.is_alive():
            return True
        with suppress(psutil.Error):  # gone since
            computed = psutil.Process(self.process.pid).cpu_times()
            if computed.user + computed.system > self._computed_s:
                self._computed_s = computed.user + computed.system
                self._at = time.monotonic()
        stuck = time.monotonic() - self._at > stuck_after_s
        if stuck:
            self.process.kill()
            self.process.join()
        return stuck


def _train(lab: Lab, variant: Variant) -> None:
    """In the fork: train in silence; what goes wrong here is met again, and told, by the stage."""
    _die_with_parent()
    sys.stdout = sys.stderr = null = open(os.devnull, "w")  # noqa: SIM115
    os.dup2(null.fileno(), 1)
    os.dup2(null.fileno(), 2)
    lab.show = Show(leads=False)
    lab.remember(variant)


def _die_with_parent() -> None:
    """A killed job leaves no training behind: what starts again would run into it."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
