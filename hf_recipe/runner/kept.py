"""The weights of the best runs so far: what an ensemble is made of, and nothing trained twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from filelock import FileLock

from hf_recipe.core.report import write_atomically
from hf_recipe.instruments.compare import Variant
from hf_recipe.instruments.distributed import from_rank_0, rank

MOST = 3  # members: the gain of each further one falls off, and each is asked at every step


class Kept:
    """At most `most` models, those with the lowest validation loss; others' weights are deleted.

    So many for each size of the input: an ensemble's members must see the same.

    Args:
        folder: of all saved models, each in a folder of its own.
    """

    def __init__(self, folder: Path, most: int = MOST) -> None:
        self.folder, self.most = folder, most

    def place(self, variant: Variant) -> Path:
        return self.folder / variant.key

    def wants(self, variant: Variant, loss: float) -> bool:
        """Whether these weights are worth keeping. A collective: all ranks hear rank 0's word."""
        known = self._read(_share(variant)) if rank() == 0 else {}
        known.pop(variant.key, None)
        better = sum(not other > loss for other in known.values())
        return from_rank_0(_comparable(variant) and loss == loss and better < self.most)

    def add(self, variant: Variant, loss: float) -> None:
        """Note that the weights are saved, on rank 0; the worst beyond `most` are deleted."""
        if rank() != 0:
            return
        share = _share(variant)
        with FileLock(self.folder / "best.lock"):  # trainings may run side by side
            known = self._read(share) | {variant.key: loss}
            ordered = sorted(known, key=lambda key: known[key])
            best = {key: known[key] for key in ordered[: self.most]}
            write_atomically(self._index(share), json.dumps(best))
        for key in ordered[self.most :]:
            shutil.rmtree(self.folder / key, ignore_errors=True)

    def best(self, share: float = 1.0) -> list[Path]:
        """Folders of the kept models that see this share of the input, the best first.

        A collective.
        """
        return from_rank_0([self.folder / key for key in self._read(share)] if rank() == 0 else [])

    def _index(self, share: float) -> Path:
        return self.folder / ("best.json" if share == 1 else f"best-{share:g}.json")

    def _read(self, share: float) -> dict[str, float]:
        """Losses by key, lowest first; models that somebody has deleted are not among them."""
        index = self._index(share)
        if not index.is_file():
            return {}
        known = json.loads(index.read_text(encoding="utf-8"))
        return {key: loss for key, loss in known.items() if (self.folder / key).is_dir()}


def _comparable(variant: Variant) -> bool:
    """Whether a run learned from all training rows; the smallest models are no teachers."""
    settings = variant.settings
    whole = settings["part"] == "train" and settings["model"] not in ("simplest", "student")
    return whole and not (settings["rows"] or settings["without"] or settings["teacher"])


def _share(variant: Variant) -> float:
    return float(variant.settings["share"])
