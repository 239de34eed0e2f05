"""What processes compare with each other: weights, rows, BatchNorm's statistics, random draws.

Everything here is a collective, at steps that the step's number alone names.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import nn

from hf_recipe.catalogue import PROBES
from hf_recipe.complexify.batchnorm_ranks import RankStatistics, plain, statistics_of
from hf_recipe.complexify.batchnorm_ranks import compared as statistics_compared
from hf_recipe.complexify.rank_noise import DRAW_NOISE, DRAWN, LOADER
from hf_recipe.complexify.rank_noise import compared as noise_compared
from hf_recipe.complexify.ranks import batches_of, checksum, fingerprint, weights_of
from hf_recipe.examiner import Examiner
from hf_recipe.instruments.distributed import from_all_ranks, world_size
from hf_recipe.instruments.subject import Subject
from hf_recipe.trainer import preflight

FINGERPRINTS = 4  # micro-batches of each rank that are compared
WEIGHTS_AT, WEIGHTS_EVERY = (1, 2, 8, 16, 32), 64
NORMS_AT = 4  # the step whose first forward pass is compared: every rank has had its own rows


class RankWatch:
    """Looks for ranks that differ where they must not, and agree where they must not."""

    def __init__(self, examiner: Examiner, trainer: Any) -> None:
        self.examiner = examiner
        self.trainer = trainer
        self._model: nn.Module | None = None
        self._prints: list[str] | None = None  # of the first micro-batches, until compared
        self._norms: Any = None  # BatchNorm's statistics as a forward pass began
        self._norm_hook: Any = None  # on all ranks from that step to the next flush

    def begin(self, model: nn.Module) -> None:
        """A run begins."""
        self._model, self._prints = model, None
        if world_size() == 1:
            self.examiner.skip((RankStatistics,), "there is one process")
        elif not self._model_parallel():
            self._prints = []

    def end(self) -> None:
        """Take the hook off."""
        if self._norm_hook is not None:
            self._norm_hook.remove()
            self._norm_hook = self._norms = None

    def due(self, nth: int) -> bool:
        """Whether the `nth` step of a run has something to compare."""
        return nth <= NORMS_AT or self._prints is not None

    def compare_noise(self, subject: Subject, loader: Any) -> None:
        """Before step 1: do the ranks' workers draw the same variations?"""
        subject.cache[LOADER] = loader
        guard = functools.partial(preflight.guard_of, subject)
        self.examiner.examine(PROBES[DRAW_NOISE.name], subject, guard)
        if self.examiner.judging(DRAW_NOISE.measures):
            everyone = from_all_ranks(subject.cache.get(DRAWN))
            drawn = [each for each in everyone if each is not None]
            if len(drawn) == len(everyone):
                self.examiner.judge(noise_compared(drawn), "ranks")

    def before_backward(self, inputs: Mapping[str, Any], nth: int) -> None:
        """The first micro-batch of a run's `nth` step."""
        if self._prints is None:
            return
        if len(self._prints) < FINGERPRINTS:
            self._prints.append(fingerprint(inputs))
        if nth == NORMS_AT:
            self._read_norms()

    def flushed(self, step: int) -> None:
        """Step `step` is done and read out: all ranks may talk."""
        model = self._model
        if world_size() == 1 or model is None:
            return
        if step in WEIGHTS_AT or step % WEIGHTS_EVERY == 0:
            self.compare_weights(step)
        if self._prints is not None and step >= 2:
            prints = from_all_ranks(self._prints)
            self._prints = None if step >= FINGERPRINTS else self._prints
            self.examiner.judge(batches_of(prints), "ranks", step=step)
        if self._norm_hook is not None:
            self._compare_norms(model, step)

    def compare_weights(self, step: int) -> None:
        """Checksums of all ranks' weights; nothing on one process."""
        sharded = self.trainer is not None and preflight.sharded(self.trainer)
        if world_size() == 1 or self._model is None or sharded or self._model_parallel():
            return
        sums = from_all_ranks(checksum(self._model).tolist())
        self.examiner.judge(weights_of(step, sums), "ranks", step=step)

    # ---------------------------------------------------------------- inside

    def _read_norms(self) -> None:
        """Read BatchNorm's statistics once, as the bare model's next forward pass begins."""
        model = self._model
        if model is None or preflight.compiled(self.trainer):
            return
        if not self.examiner.judging((RankStatistics,)) or not statistics_of(model):
            return

        def look(module: nn.Module, inputs: Any) -> None:
            if self._norms is None:
                self._norms = statistics_of(module)

        self._norm_hook = model.register_forward_pre_hook(look)

    def _compare_norms(self, model: nn.Module, step: int) -> None:
        pair = (plain(self._norms or {}), plain(statistics_of(model)))
        self.end()
        everyone = from_all_ranks(pair)
        if all(began for began, _ in everyone):
            found = statistics_compared(step, [e[0] for e in everyone], [e[1] for e in everyone])
            self.examiner.judge(found, "ranks", step=step)

    def _model_parallel(self) -> bool:
        """Whether processes share rows, or split tensors, on purpose."""
        accelerator = getattr(self.trainer, "accelerator", None)
        return getattr(accelerator, "parallelism_config", None) is not None
