"""A worker: it asks an engine for points and runs each as a process of its own.

Any number of workers may share a study, on one machine or many. Each trial has a folder; its
process is a session of its own, so that it outlives a worker that is killed: whoever comes next
waits for it and takes its result. A worker on another machine is given up when its heartbeat has
stood still for `GRACE` seconds by the clock of whoever looks, so clocks need not agree.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_recipe.tune.command import expand
from hf_recipe.tune.engines import LOST, OptunaEngine, Result, Suggestion
from hf_recipe.tune.results import FOLDER_VARIABLE, key_of, read_curve, read_result

BEAT, GRACE = 15.0, 120.0  # seconds; eight missed beats are no pause of a file system
FLAPPING = 3  # so many failures and nothing finished: the command itself does not work


class TrialsFail(RuntimeError):
    """The first trials all failed: what they share is at fault, not their points."""


def identity(pid: int) -> dict[str, Any]:
    """A process by host, number and start: numbers are given again, starts are not."""
    return {"host": socket.gethostname(), "pid": pid, "started": _started(pid)}


def _started(pid: int) -> str | None:
    """When a process began, in the kernel's ticks; None: it is gone, or nobody can tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def is_alive(process: Mapping[str, Any] | None) -> bool:
    """Whether a process of this machine, as `identity` named it, still runs."""
    if not process or process["host"] != socket.gethostname():
        return False
    if Path("/proc/self/stat").exists():
        return process["started"] is not None and _started(process["pid"]) == process["started"]
    try:
        os.kill(process["pid"], 0)
    except OSError:
        return False
    return True


@dataclass
class Worker:
    """Runs an engine's trials until its study has as many as it should.

    Args:
        engine: where points come from.
        command: of a trial, with the macros of `tune.command`.
        folder: of all trials; shared by the workers.
        program: what ``${program}`` stands for.
        trials: of the whole study, over all workers.
        say: gets one line per event.
        beat, grace: seconds between heartbeats; until a worker elsewhere is given up.
    """

    engine: OptunaEngine
    command: Sequence[str]
    folder: Path
    trials: int
    program: str = ""
    interpreter: str = "python"
    say: Callable[[str], None] = print
    beat: float = BEAT
    grace: float = GRACE
    _seen: dict[int, tuple[Any, float]] = field(default_factory=dict)
    _failures: int = 0

    def run(self) -> int:
        """Work until the study is complete; how many trials this worker ran.

        Raises:
            TrialsFail: the first trials all failed.
        """
        done = 0
        while True:
            for number in self.engine.resume(self._left):
                self.say(f"trial {number}: its worker is gone; taken up again")
            suggestion = self.engine.suggest(self.trials)
            if suggestion is not None:
                self._one(suggestion)
                done += 1
            elif self.engine.at_work():
                time.sleep(min(self.beat, 2.0))  # the others' trials, should they need taking up
            else:
                return done

    # ---------------------------------------------------------------- one trial

    def _one(self, suggestion: Suggestion) -> None:
        number = suggestion.number
        folder = self.folder / f"trial-{number:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        words = expand(
            self.command,
            suggestion.params,
            program=self.program,
            folder=str(folder),
            interpreter=self.interpreter,
        )
        self.engine.note(number, folder=str(folder), worker=identity(os.getpid()))
        began = time.monotonic()
        with (folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                words,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(folder),
                start_new_session=True,
            )
            self.engine.note(number, process=identity(process.pid))
            try:
                pruned = self._watch(number, process, folder)
            except BaseException:
                end(process)
                self.engine.give_back(number)
                raise
        seconds = time.monotonic() - began
        result = read_result(folder, self.engine.metric)
        if pruned:
            result = Result("pruned", reason="worse than two thirds of its like")
        elif result is None:
            reason = f"exit code {process.returncode}: {last_line(folder / 'log.txt')}"
            if process.returncode == 0:
                key = key_of(self.engine.metric)
                reason = f"it left no metrics.json and no results with {key}"
            result = Result("failed", reason=reason, seconds=seconds)
        self.engine.tell(number, result)
        self._say(suggestion, result.checked(), seconds)

    def _environment(self, folder: Path) -> dict[str, str]:
        """This process's own, in which its Python's commands (accelerate) are found."""
        path = os.pathsep.join([os.path.dirname(self.interpreter), os.environ.get("PATH", "")])
        return os.environ | {FOLDER_VARIABLE: str(folder), "PATH": path.strip(os.pathsep)}

    def _watch(self, number: int, process: subprocess.Popen[bytes], folder: Path) -> bool:
        """Until the process ends: beat, and hear of its curve; True: it was stopped as hopeless."""
        beats, at, since = 0, 0, time.monotonic()
        while True:
            try:
                process.wait(timeout=min(1.0, self.beat))
                return False
            except subprocess.TimeoutExpired:
                points, at = read_curve(folder, at)
            if time.monotonic() - since >= self.beat:
                beats, since = beats + 1, time.monotonic()
                self.engine.note(number, beat=beats)
            if any([self.engine.report(number, step, value) for step, value in points]):
                end(process)
                return True

    def _say(self, suggestion: Suggestion, result: Result, seconds: float) -> None:
        point = ", ".join(f"{k} {_short(v)}" for k, v in suggestion.params.items())
        value = f"{result.value:.4f}" if result.value is not None else result.state
        why = f" ({result.reason})" if result.reason else ""
        self.say(f"trial {suggestion.number}: {value}{why}  {seconds:.0f} s  {point}")
        self._failures = self._failures + 1 if result.state == "failed" else 0
        finished = any(t["state"] == "complete" for t in self.engine.trials())
        if self._failures >= FLAPPING and not finished:
            raise TrialsFail(
                f"{self._failures} trials failed and none finished; the last one: {result.reason}"
            )

    # ---------------------------------------------------------------- the others' trials

    def _left(self, number: int, notes: Mapping[str, Any]) -> Result | None:
        """What a trial's worker left; None while somebody is at it."""
        worker, process = notes.get("worker"), notes.get("process")
        if is_alive(worker) or is_alive(process):
            return None
        here = worker is not None and worker["host"] == socket.gethostname()
        if not here and not self._stands_still(number, notes.get("beat")):
            return None
        result = read_result(notes["folder"], self.engine.metric) if "folder" in notes else None
        return result or Result("failed", reason=LOST)

    def _stands_still(self, number: int, beat: Any) -> bool:
        """Whether a heartbeat has not moved for as long as this worker looked on."""
        now = time.monotonic()
        known, since = self._seen.setdefault(number, (beat, now))
        if known != beat:
            self._seen[number] = (beat, now)
            return False
        return now - since > self.grace


def end(process: subprocess.Popen[bytes], patience: float = 10.0) -> None:
    """End a process and all that it started: asked first, killed after `patience` seconds."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=patience)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(path: Path, reach: int = 4096) -> str:
    """The last line that was written to a log."""
    data = path.read_bytes()[-reach:] if path.is_file() else b""
    lines = [line.strip() for line in data.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
