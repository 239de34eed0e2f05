"""Do processes, or a process's workers, draw the same augmentation?

A generator that a data set keeps is copied into every worker, and again in every epoch; and where
rows are read in the processes themselves, all of them were seeded alike. Then each picture is
varied, but all of a step are varied the same way. So one row is read over and over as each worker
and process would, and the draws are compared. Nothing is started: the workers' seeds are set here.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch

from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.held import held_generators, kept, state_of
from hf_recipe.instruments.subject import Subject

DRAWS = 16  # of a coin: two fair ones agree in all by chance once in 65,536
FEWEST, SECONDS = 6, 0.5  # rows that are slow to read are read less often
LOADER, DRAWN = "train_dataloader", "drawn_noise"  # keys of a subject's cache


@dataclass(frozen=True)
class SharedNoise(Measurement):
    """One row, read over and over as each process and worker would.

    Attributes:
        ranks: processes.
        workers: of each process; 0: rows are read in the process itself.
        draws: how often it was read; 0: nothing is drawn at random.
        distinct: different rows that came out.
        workers_alike, ranks_alike: whether two of them drew the very same sequence.
        in_rows: whether rows themselves vary; False: only what the collator makes of them.
        sources: the generators that were drawn from.
    """

    ranks: int
    workers: int
    draws: int
    distinct: int
    workers_alike: bool
    ranks_alike: bool
    in_rows: bool
    sources: tuple[str, ...]


Drawn = dict[str, Any]


def take(subject: Subject) -> Iterator[Measurement]:
    """Leave this process's draws in the subject's cache; they are compared over all ranks."""
    loader = subject.cache.get(LOADER)
    loader = getattr(loader, "base_dataloader", loader)
    dataset = getattr(loader, "dataset", None)
    if loader is None or dataset is None or isinstance(dataset, torch.utils.data.IterableDataset):
        raise Skip("rows of the training data cannot be read by their index")
    if int(getattr(subject.args, "world_size", 1)) == 1 and loader.num_workers < 2:
        raise Skip("there is one process, and fewer than two workers read its rows")
    if not len(dataset):
        raise Skip("there are no rows")
    subject.cache[DRAWN] = draw(loader)
    yield from ()


def draw(loader: Any) -> Drawn:
    """What this process's first two workers (or itself) draw; call it inside the quiet guard."""
    held = held_generators(loader.dataset, loader.collate_fn)
    workers = int(loader.num_workers)
    base = int(torch.empty((), dtype=torch.int64).random_())
    drawn: Drawn = {"workers": workers, "rows": [], "batches": [], "sources": []}
    for worker in range(max(1, min(2, workers))):
        with kept(held):
            if workers:
                _become(worker, base, loader.worker_init_fn)
            _read(loader, held, drawn)
        if not drawn["sources"] and len(set(drawn["batches"][0])) < 2:
            drawn["rows"], drawn["batches"] = [], []
            break
    return drawn


def _become(worker: int, base: int, init: Any) -> None:
    """Seed the global generators as torch does in a worker."""
    seed = (base + worker) % 2**63
    random.seed(seed)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    if init is not None:
        init(worker)


def _read(loader: Any, held: list[Any], drawn: Drawn) -> None:
    dataset, index = loader.dataset, len(loader.dataset) // 2
    fetch = getattr(dataset, "__getitems__", None)
    rows, batches = [], []
    before, start = _states(held), time.perf_counter()
    for count in range(DRAWS):
        row = fetch([index])[0] if fetch is not None else dataset[index]
        rows.append(fingerprint(row))
        batches.append(fingerprint(loader.collate_fn([row])))
        if count == 1:
            moved = [n for n, state in _states(held).items() if state != before[n]]
            drawn["sources"] = sorted({*drawn["sources"], *moved})
            if not moved and len(set(batches)) == 1:
                break  # nothing is drawn
        if count + 1 >= FEWEST and time.perf_counter() - start > SECONDS:
            break
    drawn["rows"].append(rows)
    drawn["batches"].append(batches)


def _states(held: list[Any]) -> dict[str, str]:
    states = {
        "python's generator": random.getstate(),
        "numpy's generator": np.random.get_state(),
        "torch's generator": torch.get_rng_state(),
    }
    if held:
        states["a generator kept in the data set or the collator"] = [state_of(g) for g in held]
    return {name: fingerprint(state) for name, state in states.items()}


def fingerprint(value: Any) -> str:
    """A hash of tensors, arrays, pictures, numbers and texts, however they are nested."""
    digest = hashlib.sha1(usedforsecurity=False)
    _digest(value, digest)
    return digest.hexdigest()[:16]


def _digest(value: Any, digest: Any) -> None:
    if isinstance(value, torch.Tensor):
        _digest(value.detach().cpu().float().numpy(), digest)
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            _digest(value[key], digest)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _digest(item, digest)
    elif hasattr(value, "tobytes"):  # a picture
        digest.update(value.tobytes())
    elif isinstance(value, (str, int, float, bool, type(None))):
        digest.update(repr(value).encode())


def compared(drawn: list[Drawn]) -> SharedNoise:
    """All ranks' draws, compared."""
    first = drawn[0]
    in_rows = any(len(set(worker)) > 1 for each in drawn for worker in each["rows"])
    level = "rows" if in_rows else "batches"
    sequences = [[tuple(worker) for worker in each[level]] for each in drawn]
    length = min((len(worker) for each in sequences for worker in each), default=0)
    sequences = [[worker[:length] for worker in each] for each in sequences]
    firsts = [each[0] for each in sequences if each]
    return SharedNoise(
        ranks=len(drawn),
        workers=int(first["workers"]),
        draws=len(firsts[0]) if firsts else 0,
        distinct=len(set(firsts[0])) if firsts else 0,
        workers_alike=any(len(each) > 1 and each[0] == each[1] for each in sequences),
        ranks_alike=len(set(firsts)) < len(firsts),
        in_rows=in_rows,
        sources=tuple(sorted({name for each in drawn for name in each["sources"]})),
    )


def shared(
    noise: SharedNoise,
    *,
    draws: Annotated[int, "of a fair coin that agree by chance once in 65,536"] = DRAWS,
    different: Annotated[int, "rows that came out, where fewer draws say as much"] = 5,
) -> Iterator[Fault]:
    """The very same sequence of draws, twice."""
    if noise.distinct < 2 or (noise.draws < draws and noise.distinct < different):
        return
    if not (noise.workers_alike or noise.ranks_alike):
        return
    who = "workers" if noise.workers_alike else "processes"
    kept_one = any("kept" in source for source in noise.sources)
    fix = "rng = np.random.default_rng(torch.initial_seed())  # in __getitem__: each worker's own"
    if not kept_one and noise.ranks_alike:
        fix = "TrainingArguments(..., dataloader_num_workers=2)  # each worker has its own seed"
    yield Fault(
        f"two {who} drew the same variation of a row {noise.draws} times out of {noise.draws}"
        + ("" if noise.in_rows else ", in the collator")
        + (f", from {', '.join(noise.sources)}" if noise.sources else ""),
        subject=who,
        severity=None if noise.in_rows else "note",
        fix=fix,
        evidence={
            "seen": f"{noise.draws} of {noise.draws} draws alike",
            "expected": "different draws",
            "ranks": noise.ranks,
            "workers": noise.workers,
        },
    )


DRAW_NOISE = Probe("draw as each worker does", "ranks", (SharedNoise,), take)

RANKS_SHARE_NOISE = Check(
    name="ranks-share-noise",
    stage="complexify",
    severity="warning",
    moments=("ranks",),
    why="Rows that are varied in step are varied less: workers or processes that draw alike see "
    "one variation where there should be many.",
    fix="rng = np.random.default_rng(torch.initial_seed())  # in __getitem__",
    source="transformers issue 37932 (2025); pytorch issue 5059 (2018)",
    unsure="Masking in a collator that repeats over processes is a note: their rows differ.",
    judges=(shared,),
)

__all__ = ["DRAW_NOISE", "RANKS_SHARE_NOISE", "SharedNoise", "compared", "draw"]
