"""A search engine for one process and no further package: quasi-random points, a file of lines.

Where trials run one after another in one process, a study is no more than points by number and
what was told of each. A line is written before `tell` returns; a process that is killed in the
middle of a trial leaves nothing of it, and the next one tries that point again. Several workers,
pruning, and a search that learns from its trials are `tune.engines.OptunaEngine`'s.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_recipe.core.check import plain, unplain
from hf_recipe.instruments.distributed import from_rank_0, rank
from hf_recipe.tune.engines import Engine, Result, Suggestion, as_trial
from hf_recipe.tune.space import quasi_random
from hf_recipe.tune.study import flat


class PointsEngine:
    """Quasi-random points and a file, as an `Engine`.

    Args:
        space: as in a W&B sweep's ``parameters``.
        storage: a file's path; what stands there is gone on with.
        seed: of the points.

    Raises:
        ValueError: a space that makes no sense, or another one than the file was begun with.
    """

    def __init__(self, space: Mapping[str, Any], *, storage: str | Path, seed: int = 0) -> None:
        self.space, self.path, self.seed = dict(space), Path(storage), seed
        asked = {"space": plain(self.space), "seed": seed}
        lines = self._read()
        if lines and lines[0] != asked:
            raise ValueError(f"{storage} holds another search; give the new one another file")
        self._told = {line["number"]: line for line in lines[1:]}
        if not lines:
            quasi_random(space, 1, seed)  # a space that makes no sense is told now
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(asked) + "\n", encoding="utf-8")

    def suggest(self, trials: int) -> Suggestion | None:
        """The first point that nothing was told of; None where there are `trials`."""
        number = next((n for n in range(trials) if n not in self._told), None)
        return None if number is None else Suggestion(number, self._point(number))

    def tell(self, number: int, result: Result) -> bool:
        """Keep what a trial gave; False where it had been told before."""
        if number in self._told:
            return False
        told = asdict(result.checked())
        line = {"number": number, "params": self._point(number), "result": told}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain(line), allow_nan=False) + "\n")
        self._told[number] = line
        return True

    def report(self, number: int, step: int, value: float) -> bool:
        """Nothing is stopped in the middle of its run."""
        return False

    def resume(self, left: Callable[[int, Mapping[str, Any]], Result | None]) -> list[int]:
        """What a dead process was at has left no trace: its point is suggested again."""
        return []

    def trials(self) -> list[dict[str, Any]]:
        """The finished trials, as `tune.analysis.analyse` takes them."""
        told = (self._told[number] for number in sorted(self._told))
        return [as_trial(line["number"], line["params"], line["result"]) for line in told]

    def _point(self, number: int) -> dict[str, Any]:
        """Values by dotted name, as JSON has them."""
        point = flat(quasi_random(self.space, number + 1, self.seed)[-1])
        return {name: plain(value) for name, value in point}

    def _read(self) -> list[dict[str, Any]]:
        """The whole lines of the file; one that a killed process left half written is cut off."""
        if not self.path.is_file():
            return []
        whole, end, rest = self.path.read_text(encoding="utf-8").rpartition("\n")
        if rest:
            self.path.write_text(whole + end, encoding="utf-8")
        return [unplain(json.loads(line)) for line in whole.splitlines()]


class EngineOfRanks:
    """One engine for all processes of one training: rank 0 asks and tells, all hear its word.

    Args:
        make: makes the engine; called on rank 0 alone.
    """

    def __init__(self, make: Callable[[], Engine]) -> None:
        self._engine = make() if rank() == 0 else None

    def suggest(self, trials: int) -> Suggestion | None:
        return from_rank_0(self._engine.suggest(trials) if self._engine else None)

    def tell(self, number: int, result: Result) -> bool:
        return from_rank_0(self._engine.tell(number, result) if self._engine else False)

    def report(self, number: int, step: int, value: float) -> bool:
        return from_rank_0(self._engine.report(number, step, value) if self._engine else False)

    def resume(self, left: Callable[[int, Mapping[str, Any]], Result | None]) -> list[int]:
        return from_rank_0(self._engine.resume(left) if self._engine else [])

    def trials(self) -> list[dict[str, Any]]:
        return from_rank_0(self._engine.trials() if self._engine else [])
