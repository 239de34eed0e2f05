"""What a user asks for by name, since it trains, takes time or changes something."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from hf_recipe.baselines.augmentation_off import without_augmentation
from hf_recipe.baselines.batch_search import find_batch_size
from hf_recipe.baselines.batch_size import BatchSize
from hf_recipe.baselines.determinism import Determinism, answer, check_determinism
from hf_recipe.baselines.one_batch import OneBatch, overfit_one_batch
from hf_recipe.baselines.reference_models import ReferenceLines
from hf_recipe.baselines.seed import seed_everything
from hf_recipe.complexify.checkpoint_reload import CheckpointReload, check_checkpoint
from hf_recipe.core.check import Measurement, Probe, Skip
from hf_recipe.core.finding import Moment
from hf_recipe.examiner import Examiner
from hf_recipe.instruments.distributed import from_all_ranks
from hf_recipe.instruments.subject import Subject
from hf_recipe.regularize.simple_model import AgainstSimple, compare_with_simple_models
from hf_recipe.trainer import preflight

if TYPE_CHECKING:
    from hf_recipe.trainer.closing import Closing

M = TypeVar("M", bound=Measurement)
MOST_ROWS = 128  # of one batch to be memorised in the steps that are given


class OwnCalls:
    """Calls of a `Recipe` that never run by themselves."""

    trainer: Any
    examiner: Examiner
    closing: Closing

    def _before_training(self) -> AbstractContextManager[Subject]:
        raise NotImplementedError

    def overfit_one_batch(
        self, *, rows: int | Literal["largest"] | None = None, max_steps: int = 150
    ) -> OneBatch | None:
        """Train on one fixed batch until its floor, then put every weight back, bit for bit.

        Args:
            rows: rows of the batch; default: the per-device batch size, at most 16; "largest":
                as many as `find_batch_size` finds room for, at most 128.
            max_steps: steps of each attempt; a second attempt follows a ladder of rates.

        Returns:
            How it went; None where it could not be tried (``report.skipped`` says why).
        """
        size = self._largest_rows() if rows == "largest" else rows
        return self._ask(OneBatch, lambda s: [overfit_one_batch(s, rows=size, max_steps=max_steps)])

    def find_batch_size(
        self, *, memory: int | None = None, seconds: float = 60.0, noise: bool = True
    ) -> BatchSize | None:
        """Find the largest micro-batch that fits and the fewest rows that are fast.

        On the data's longest rows, with gradients and the optimizer's state in place. Weights,
        optimizer and random state are put back, bit for bit. The batch a step learns from is kept
        by accumulation: nothing is tuned for quality.

        Args:
            memory: bytes that weights, optimizer and step may take together; default: what an
                accelerator gives, or 80 % of what is free on a CPU.
            seconds: to spend, about.
            noise: whether to estimate the gradient noise scale too.

        Returns:
            What was found, with ``advised`` (rows, accumulation); None where it could not be
            tried (``report.skipped`` says why).
        """
        if memory is not None and memory <= 0:
            raise ValueError(f"memory is a number of bytes above 0; got {memory}")
        return self._ask(
            BatchSize,
            lambda s: find_batch_size(s, memory=memory, seconds=seconds, noise=noise),
        )

    def check_determinism(self, steps: int = 3) -> Determinism | None:
        """Take a few steps twice from one seed and say whether they agree, or what differs.

        Batches, losses, gradients, weights and buffers are compared bit by bit, with the run's own
        optimizer; then everything is put back, bit for bit. The report gets an answer.

        Args:
            steps: of each of the two runs.

        Returns:
            What was compared, of the first process that differs; None where it could not be tried
            (an answer in the report says why).
        """
        with self._before_training() as subject, preflight.guard_of(subject):
            try:
                outcome: Determinism | str = check_determinism(subject, steps=steps)
            except Skip as reason:
                outcome = str(reason)
        everyone = from_all_ranks(outcome)
        told = [each for each in everyone if isinstance(each, Determinism)]
        found = min(told, key=lambda each: each.equal) if len(told) == len(everyone) else None
        refused = next((each for each in everyone if isinstance(each, str)), "")
        self.examiner.report.answer(answer(found if found is not None else refused))
        self.closing.write()
        return found

    def check_checkpoint(self, path: str | Path | None = None) -> CheckpointReload | None:
        """Load a checkpoint again and compare its outputs with the model's.

        Args:
            path: a folder that `save_model`, `save_pretrained` or a run wrote; None: the model
                as it stands is saved to a temporary folder, as the Trainer saves it.

        Returns:
            What was compared; None where it could not be (``report.skipped`` says why).

        Raises:
            FileNotFoundError: there is no such folder.
        """
        if path is not None and not Path(path).is_dir():
            raise FileNotFoundError(f"check_checkpoint: there is no folder {str(path)!r}")
        return self._ask(CheckpointReload, lambda s: check_checkpoint(s, path), moment="end")

    def compare_with_simple_models(
        self, split: str | None = None
    ) -> AgainstSimple | ReferenceLines | None:
        """Train the simplest models on the run's own rows, as lines to compare the model with.

        Args:
            split: an evaluation set; default: the first.

        Returns:
            Once the model is trained, the comparison; before, the reference lines, with which
            every evaluation is compared from then on. None where no simple model fits
            (``report.skipped`` says why).
        """
        self.examiner.latest.pop(AgainstSimple.kind(), None)
        lines = self._ask(
            ReferenceLines,
            lambda s: compare_with_simple_models(s, split),
            moment="eval",
            judged=AgainstSimple,
        )
        found = self.examiner.latest.get(AgainstSimple.kind())
        return found if isinstance(found, AgainstSimple) else lines

    def seed_everything(self, seed: int, *, deterministic: bool = False) -> None:
        """Seed Python, numpy and torch, and let the Trainer begin from the same seed.

        The model's fresh weights are drawn already: `hf_recipe.seed_everything` before the model
        is made covers them too.

        Args:
            seed: 0 to 2**32 - 1.
            deterministic: also make CUDA's kernels repeatable, at some cost in speed.
        """
        seed_everything(seed, deterministic=deterministic)
        if self.trainer is not None:
            self.trainer.args.seed = seed
            if self.trainer.args.data_seed is not None:
                self.trainer.args.data_seed = seed

    def without_augmentation(
        self, transform: Any = None
    ) -> AbstractContextManager[tuple[str, ...]]:
        """A context in which training rows come out one way: the recipe's baselines want that.

        Args:
            transform: what to use in the place of the training rows' transform; default: that
                of the evaluation rows, or the transform without its random members, or draws
                fixed for each row.

        Yields:
            What was switched off, in words; empty where nothing draws at random.

        Raises:
            ValueError: a callback alone cannot reach the data.
        """
        if self.trainer is None:
            raise ValueError("a callback alone cannot do this: use hf_recipe.attach(trainer)")
        return without_augmentation(self.trainer, transform)

    # ---------------------------------------------------------------- inside

    def _largest_rows(self) -> int | None:
        known = self.examiner.latest.get(BatchSize.kind())
        found = known if isinstance(known, BatchSize) else self.find_batch_size(noise=False)
        return None if found is None or not found.largest else min(found.largest, MOST_ROWS)

    def _ask(
        self,
        kind: type[M],
        take: Any,
        moment: Moment = "probe",
        judged: type[Measurement] | None = None,
    ) -> M | None:
        """Run one probe now, in the guard; what it measured, or None where it could not.

        A call by name runs even where its check was not selected; then nothing is judged.
        """
        probe = Probe(f"measure {kind.kind()}", moment, (judged or kind,), take)
        self.examiner.latest.pop(kind.kind(), None)
        with self._before_training() as subject:
            if not self.examiner.judging((judged or kind,)):
                with preflight.guard_of(subject):
                    taken = list(take(subject))
                measured = [item for item in taken if isinstance(item, Measurement)]
                self.examiner.latest.update({item.kind(): item for item in measured})
                return next((item for item in measured if isinstance(item, kind)), None)
            self.examiner.examine(probe, subject, lambda: preflight.guard_of(subject))
        self.closing.write()
        found = self.examiner.latest.get(kind.kind())
        return found if isinstance(found, kind) else None
