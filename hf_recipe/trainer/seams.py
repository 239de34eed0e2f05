"""The seams on a Trainer instance: where the recorder looks on, and nothing is changed.

Each seam is an attribute of the instance that calls the class's own method and hands its result
through untouched. `Seams.remove` deletes the attributes, so that nothing is left.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import zip_longest
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer

from hf_recipe.instruments.answers import Answers, AnswerSheet
from hf_recipe.instruments.batches import labels_in
from hf_recipe.instruments.distributed import from_all_ranks
from hf_recipe.instruments.record import RowRecorder
from hf_recipe.instruments.row_losses import row_losses
from hf_recipe.instruments.window import Evaluation

if TYPE_CHECKING:
    from hf_recipe.trainer.recipe import Recipe

SEAMS = (
    "training_step",
    "get_batch_samples",
    "_get_grad_norm",
    "prediction_step",
    "_load_optimizer_and_scheduler",
)


# Who overrides one of these may call neither `get_batch_samples` nor `_get_grad_norm`.
LOOPS = ("_inner_training_loop", "_run_epoch")
MOST_ROWS = 65_536  # of one evaluation, whose losses are kept


def has_a_loop_of_its_own(trainer: Any) -> bool:
    """Whether a Trainer's steps are taken by a loop that nobody here knows: events tell of them."""
    mine = type(trainer)
    return any(getattr(mine, name, None) is not getattr(Trainer, name, None) for name in LOOPS)


class EvaluationRecorder:
    """Collects one evaluation: each batch's loss and, where it can be had, each row's.

    Attributes:
        answers: what the last evaluation that was read answered; None where it is not known.
        latest: the last evaluation that was read.
    """

    def __init__(self) -> None:
        self.loader: Any = None
        self.batch_losses: list[Tensor] = []
        self.row_losses: list[Tensor] | None = []
        self.sheet = AnswerSheet()
        self.answers: Answers | None = None
        self.latest: Evaluation | None = None

    def start(self, loader: Any) -> None:
        """Forget what an evaluation that broke off, or a prediction, has left."""
        self.loader, self.batch_losses, self.row_losses = loader, [], []
        self.sheet.clear()

    def add(self, loss: Tensor, rows: Tensor | None) -> None:
        """Take in one batch; one without row losses makes the whole set's unknown."""
        self.batch_losses.append(loss)
        if rows is None:
            self.row_losses = None
        elif self.row_losses is not None:
            self.row_losses.append(rows)

    def read(self, step: int, metrics: Mapping[str, Any], unit: float) -> Evaluation:
        """What `take` gives, with the evaluation's name and the Trainer's own metrics."""
        prefix = next((k[: -len("_runtime")] for k in metrics if k.endswith("_runtime")), "eval")
        split = prefix.removeprefix("eval_") if prefix != "eval" else "validation"
        self.answers = self.sheet.take(_length(self.loader)) if self.sheet.wanted else None
        rows, batches = self.take(MOST_ROWS, unit)
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, (int, float))}
        self.latest = Evaluation(step, split, rows, batches, numbers)
        return self.latest

    def take(self, limit: int, unit: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The row losses in the set's order, and the batch losses, over all ranks; then forget.

        Accelerate deals out batches to ranks in turn; so batch 0 of every rank comes before
        batch 1 of any. A collective where there are several processes: all ranks call it.

        Args:
            limit: most rows that are kept, evenly spaced.
            unit: what a batch's loss is divided by to give the model's own mean.
        """
        batches = [value / unit for value in _host(self.batch_losses)]
        rows = None
        if self.row_losses:
            rows = [part.tolist() for part in self.row_losses]
        everyone = from_all_ranks((batches, rows))
        self.start(self.loader)
        all_batches = [b for same in zip_longest(*(e[0] for e in everyone)) for b in same]
        kept = tuple(b for b in all_batches if b is not None)
        if any(e[1] is None for e in everyone):
            return (), kept
        dealt = zip_longest(*(e[1] or [] for e in everyone), fillvalue=[])
        flat = [value for same in dealt for part in same for value in part]
        size = _length(self.loader)
        flat = flat[:size] if size else flat
        stride = -(-len(flat) // limit) if len(flat) > limit else 1
        return tuple(flat[::stride]), kept


class Seams:
    """Installs and removes the recorder's seams on one Trainer.

    Args:
        trainer: the Trainer.
        recipe: the recipe whose recorder takes losses, norms, rows and waiting times, and whose
            evaluation takes evaluation batches. It is told of the inputs of the first training
            step before it runs; of a step to look at as it begins, before its first micro-batch
            and when its gradients are clipped; of a micro-batch whose loss is not finite, before
            its update (on a CPU alone, where reading the loss makes nobody wait); and of the
            folder that a run resumes from.
    """

    def __init__(self, trainer: Any, recipe: Recipe) -> None:
        self.trainer = trainer
        self.recipe = recipe
        self.recorder = recipe.recorder
        self.evaluation = recipe.evaluation
        self.closer_look = recipe.closer_look
        self.rows: RowRecorder | None = None
        self.before_first = True
        self._wrapped_sampler: tuple[Any, Any] | None = None
        self._installed: dict[str, Any] = {}
        self._earlier: dict[str, Any] = {}

    def install(self) -> None:
        """Wrap the instance's methods; again is the same as once."""
        for name in SEAMS:
            if name in self._installed or not hasattr(self.trainer, name):
                continue
            if name in vars(self.trainer):
                self._earlier[name] = vars(self.trainer)[name]
            inner = getattr(self.trainer, name)
            wrapper = functools.wraps(inner)(getattr(self, f"_{name.lstrip('_')}")(inner))
            self._installed[name] = wrapper
            setattr(self.trainer, name, wrapper)

    def remove(self) -> None:
        """Take every seam off again."""
        for name, wrapper in self._installed.items():
            if vars(self.trainer).get(name) is not wrapper:
                continue  # someone wrapped it after us; taking it away would undo theirs too
            if name in self._earlier:
                setattr(self.trainer, name, self._earlier[name])
            else:
                delattr(self.trainer, name)
        self._installed, self._earlier = {}, {}
        self.unwatch_rows()

    # ---------------------------------------------------------------- rows

    def watch_rows(self, dataloader: Any) -> None:
        """Remember which rows the inner batch sampler of a prepared dataloader hands out."""
        self.unwatch_rows()
        inner = getattr(dataloader, "base_dataloader", dataloader)
        sampler = getattr(inner, "batch_sampler", None)
        if sampler is None:
            return
        self.rows = RowRecorder(sampler)
        self.recorder.drawn = self.rows.drawn
        # DataLoader refuses to set it after construction; reading it back is all it guards.
        object.__setattr__(inner, "batch_sampler", self.rows)
        self._wrapped_sampler = (inner, sampler)

    def unwatch_rows(self) -> None:
        """Put the dataloader's own batch sampler back."""
        if self._wrapped_sampler is not None:
            inner, sampler = self._wrapped_sampler
            if inner.batch_sampler is self.rows:
                object.__setattr__(inner, "batch_sampler", sampler)
        self.rows, self.recorder.drawn, self._wrapped_sampler = None, [], None

    # ---------------------------------------------------------------- wrappers

    def _training_step(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        recorder, look = self.recorder, self.closer_look
        heard = look.heard

        def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if recorder.closely:
                return self._looked_at(inner, model, inputs, args, kwargs)
            if heard:  # outside of a step
                heard.clear()
            loss = inner(model, inputs, *args, **kwargs)
            if isinstance(loss, Tensor) and not recorder.add(loss):
                look.not_finite(inputs)
            if heard:
                look.hear(inputs, recorder.rows[-1])
            return loss

        return training_step

    def _looked_at(
        self, inner: Callable[..., Any], model: Any, inputs: Any, args: Any, kwargs: Any
    ) -> Any:
        """A micro-batch of the first step, of one to look at, or of a run that is not watched."""
        recorder, look = self.recorder, self.closer_look
        if not recorder.active:
            loss = inner(model, inputs, *args, **kwargs)
            if recorder.drawn:
                recorder.drawn.pop(0)
            return loss
        if self.before_first:
            self.before_first = False
            self.recipe.first_step(inputs)
        watching: AbstractContextManager[None] = nullcontext()
        if look.due:
            if not recorder.micro_batches:
                self.recipe.before_backward(inputs)
            look.micro_batch(inputs)
            watching = look.watching(model)
        look.heard.clear()
        with watching:
            loss = inner(model, inputs, *args, **kwargs)
        if isinstance(loss, Tensor):
            if not recorder.add(loss):
                look.not_finite(inputs)
            look.hear(inputs, recorder.rows[-1])
        return loss

    def _get_batch_samples(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        recorder = self.recorder

        def get_batch_samples(*args: Any, **kwargs: Any) -> Any:
            start = perf_counter()
            samples = inner(*args, **kwargs)
            recorder.began = now = perf_counter()
            recorder.waiting += now - start
            if recorder.closely and not self.recipe.by_events:
                self.recipe.step_begin(self.trainer.state.global_step + 1)
            return samples

        return get_batch_samples

    def _get_grad_norm(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        recorder = self.recorder

        def _get_grad_norm(*args: Any, **kwargs: Any) -> Any:
            norm = inner(*args, **kwargs)
            recorder.take_norm(norm)
            if recorder.closely and not self.recipe.by_events:
                self.recipe.before_update(self.trainer.optimizer)
            return norm

        return _get_grad_norm

    def _load_optimizer_and_scheduler(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def load(checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
            self.closer_look.checkpoint = Path(checkpoint) if checkpoint is not None else None
            return inner(checkpoint, *args, **kwargs)

        return load

    def _prediction_step(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def prediction_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.recorder.active:
                return inner(model, inputs, *args, **kwargs)
            loader = self.trainer.callback_handler.eval_dataloader
            if loader is not self.evaluation.loader:
                self.evaluation.start(loader)
                self.evaluation.sheet.wanted = self.closer_look.recounts()
            labels = labels_in(inputs, self.trainer.label_names)
            seen: list[Any] = []
            hook = model.register_forward_hook(lambda _m, _a, outputs: seen.append(outputs))
            try:
                result = inner(model, inputs, *args, **kwargs)
            finally:
                hook.remove()
            if result[0] is not None:
                self._take_rows(result[0], seen[0] if len(seen) == 1 else None, labels)
            if result[1] is not None:
                self.evaluation.sheet.add(result[1], result[2])
            return result

        return prediction_step

    def _take_rows(self, loss: Tensor, outputs: Any, labels: Any) -> None:
        evaluation = self.evaluation
        rows = None
        if outputs is not None and evaluation.row_losses is not None:
            mean = float(loss) / self.recipe.units.evaluation()
            smoothing = float(self.trainer.args.label_smoothing_factor or 0.0)
            rows = row_losses(outputs, labels, mean, smoothing=smoothing)
        evaluation.add(loss, rows)


def _host(losses: list[Tensor]) -> list[float]:
    """Losses as floats, read with one copy."""
    return torch.stack([loss.float() for loss in losses]).tolist() if losses else []


def _length(loader: Any) -> int | None:
    dataset: Any = getattr(loader, "dataset", None)
    return len(dataset) if hasattr(dataset, "__len__") else None
