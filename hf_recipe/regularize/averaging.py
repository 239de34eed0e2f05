"""Weight averaging: many checkpoints' worth of ensemble in one model.

Averages of the weights along the end of a run (Izmailov et al. 2018), or exponentially weighted
ones all along it, often generalise better than the last weights, and make the learning rate's
decay matter less. They are kept in torch's `AveragedModel` beside the model that trains, looked at
on the same evaluation rows as the raw weights, and never put in their place unless asked.

    averaging = hf_recipe.average_weights(trainer, "ema", decay=0.99)
    trainer.train()
    print(averaging.gain)      # paired over evaluation rows; positive: the averaged are better
    averaging.apply()          # the model now has the averaged weights
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import TrainerCallback

from hf_recipe.instruments.batches import Rows, rows_of_trainer
from hf_recipe.instruments.compare import Gain, paired_gain
from hf_recipe.instruments.quiet import quiet
from hf_recipe.instruments.row_losses import row_losses

logger = logging.getLogger(__name__)

FILE = "averaged_weights.pt"
STATE = "hf_recipe.weight_averaging"
NORMS = (nn.modules.batchnorm._BatchNorm,)


class WeightAveraging(TrainerCallback):  # type: ignore[misc]
    """Keeps averaged weights of a Trainer's model; made by `average_weights`.

    Costs one copy of the weights, and one more pass over up to `rows` evaluation rows (for the raw
    weights and for the averaged ones) at each evaluation. Saved with every checkpoint and taken up
    again on a resume.

    Attributes:
        count: steps that the average holds.
        gain: paired gain of the averaged weights on the raw ones at the latest evaluation, over
            rows; None before there is one.
        history: (step, raw loss, averaged loss) of each evaluation.
    """

    def __init__(
        self,
        trainer: Any,
        kind: Literal["ema", "tail"] = "ema",
        *,
        decay: float = 0.99,
        start: float = 0.75,
        rows: int = 1024,
    ) -> None:
        if kind not in ("ema", "tail"):
            raise ValueError(f'kind is "ema" or "tail"; got {kind!r}')
        if not 0 < decay < 1 or not 0 <= start < 1:
            raise ValueError(f"decay is in (0, 1), start in [0, 1); got {decay}, {start}")
        self._trainer = weakref.ref(trainer)
        self.kind, self.decay, self.start, self.rows = kind, decay, start, rows
        self.averaged: AveragedModel | None = None
        self._live = nn.ParameterList()  # the model's own parameters
        self.gain: Gain | None = None
        self.history: list[tuple[int, float, float]] = []

    @property
    def trainer(self) -> Any:
        """The Trainer; RuntimeError when it is gone."""
        trainer = self._trainer()
        if trainer is None:
            raise RuntimeError("the Trainer of this WeightAveraging is gone")
        return trainer

    @property
    def model(self) -> nn.Module:
        """The bare model."""
        model: nn.Module = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return model

    @property
    def count(self) -> int:
        """Steps in the average."""
        return 0 if self.averaged is None else int(self.averaged.n_averaged)

    # ---------------------------------------------------------------- events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin with a copy of the model, or with what a checkpoint holds."""
        sharded = [n for n, p in self.model.named_parameters() if hasattr(p, "device_mesh")]
        if sharded or not any(p.numel() for p in self.model.parameters()):
            logger.warning("weights are not averaged: they are sharded (%s)", sharded[:1])
            return
        # The parameters alone: a copy of the whole model would carry everyone's hooks along.
        self._live = nn.ParameterList(self.model.parameters())
        copies = nn.ParameterList([p.detach().clone() for p in self._live])
        self.averaged = AveragedModel(copies.requires_grad_(False), multi_avg_fn=self._average)
        self.gain, self.history = None, []
        if not state.global_step:
            return
        kept = state.stateful_callbacks.get(STATE, {"history": []})
        self.history = [(int(s), float(a), float(b)) for s, a, b in kept["history"]]
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE
        if not path.is_file():
            logger.warning("no averaged weights at %s: the average begins anew", path)
            return
        stored = torch.load(path, weights_only=True, map_location="cpu")
        self.averaged.load_state_dict(stored, strict=False)

    def _average(self, old: Any, new: Any, count: Any) -> None:
        """Move averages towards the latest weights, all of one device and type at once."""
        seen = int(count)
        # of an EMA the first weights say nothing: their share falls as the count grows
        step = (
            1 / (seen + 1) if self.kind == "tail" else 1 - min(self.decay, (1 + seen) / (10 + seen))
        )
        if old[0].is_floating_point():
            torch._foreach_lerp_(old, new, step)
        else:
            torch._foreach_copy_(old, new)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take in the weights of this step."""
        if self.averaged is None:
            return
        if self.kind == "ema" or state.global_step > self.start * state.max_steps:
            self.averaged.update_parameters(self._live)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at both weights on the same rows; once for each step."""
        seen = self.history and self.history[-1][0] == state.global_step
        if not self.count or not self.rows or seen:
            return
        losses = self.compare()
        if losses is None:
            return
        raw, averaged = losses
        self.gain = paired_gain([raw], [averaged])
        means = [math.fsum(side) / len(side) for side in losses]
        self.history.append((int(state.global_step), means[0], means[1]))
        state.stateful_callbacks[STATE] = {"history": self.history}
        state.log_history.append({"step": state.global_step, "averaged_eval_loss": means[1]})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Lay the average beside the checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.averaged is None or not args.should_save or not folder.is_dir():
            return
        torch.save(self.averaged.state_dict(), folder / FILE)

    # ---------------------------------------------------------------- the averaged model

    @contextmanager
    def weights(self) -> Iterator[nn.Module]:
        """The model with averaged weights inside the block; as it was after it.

        BatchNorm's statistics belong to the weights they were measured with, so they are measured
        anew on training rows.

        Raises:
            RuntimeError: nothing has been averaged yet.
        """
        raw = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self._put_in()
        try:
            yield self.model
        finally:
            self._load(raw)

    def apply(self) -> None:
        """Leave the averaged weights in the model, for good."""
        self._put_in()

    def _put_in(self) -> None:
        if self.averaged is None or not self.count:
            raise RuntimeError(
                "nothing has been averaged yet: "
                + (f"the tail begins at {self.start:.0%} of the run" if self.averaged else "train")
            )
        with torch.no_grad():
            pairs = zip(self.model.parameters(), self.averaged.module.parameters(), strict=True)
            for mine, theirs in pairs:
                mine.copy_(theirs)
        self._measure_norms()

    def _load(self, tensors: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                value.copy_(tensors[name])

    def _measure_norms(self) -> None:
        """BatchNorm's running statistics from training rows, as a plain mean over batches."""
        norms = [m for m in self.model.modules() if isinstance(m, NORMS) and m.track_running_stats]
        rows = rows_of_trainer(self.trainer, self.trainer.train_dataset, "train")
        if not norms or rows is None or rows.is_stream:
            return
        kept = [m.momentum for m in norms]
        buffers: list[dict[str, torch.Tensor]] = []
        with quiet(self.model, trainer=self.trainer):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
            self.model.train()
            for inputs in self._batches(rows, self.trainer.args.train_batch_size):
                with torch.no_grad():
                    self.model(**inputs)
            buffers = [{n: b.clone() for n, b in m.named_buffers(recurse=False)} for m in norms]
        for norm, momentum, values in zip(norms, kept, buffers, strict=True):
            norm.momentum = momentum
            for name, buffer in norm.named_buffers(recurse=False):
                buffer.copy_(values[name])

    def _batches(self, rows: Rows, size: int) -> Iterator[dict[str, Any]]:
        chosen = rows.evenly_spaced(self.rows or 1024)
        device = next(self.model.parameters()).device
        for start in range(0, len(chosen), size):
            part = chosen[start : start + size]
            if len(part) > 1 or start == 0:  # BatchNorm cannot take a batch of one
                yield rows.batch(part).to(device).inputs

    def compare(self) -> tuple[list[float], list[float]] | None:
        """Losses of evaluation rows under the raw and the averaged weights; None: not to be had.

        Per row where the head's loss can be taken apart, else per batch.
        """
        data = self.trainer.eval_dataset
        data = next(iter(data.values())) if isinstance(data, dict) else data
        rows = rows_of_trainer(self.trainer, data, "validation")
        if rows is None or rows.is_stream or not len(rows):
            return None
        raw = self.losses(rows)
        with self.weights():
            averaged = self.losses(rows)
        return (raw, averaged) if len(raw) == len(averaged) and raw else None

    def losses(self, rows: Rows) -> list[float]:
        """Losses of rows under the weights that the model has now; of batches where rows' cannot
        be told apart."""
        found: list[float] = []
        with quiet(self.model, trainer=self.trainer), torch.no_grad():
            self.model.eval()
            for inputs in self._batches(rows, self.trainer.args.eval_batch_size):
                loss, outputs = self.trainer.compute_loss(self.model, inputs, return_outputs=True)
                each = row_losses(outputs, inputs.get("labels"), float(loss))
                found += [float(loss)] if each is None else each.tolist()
        return found


def average_weights(
    trainer: Any,
    kind: Literal["ema", "tail"] = "ema",
    *,
    decay: float = 0.99,
    start: float = 0.75,
    rows: int = 1024,
) -> WeightAveraging:
    """Average the weights of a Trainer's run from its next ``train()`` on.

    Args:
        kind: "ema", exponentially weighted from the first step, or "tail", the plain mean of the
            end of the run.
        decay: of "ema": about 1 / (1 - decay) steps are averaged.
        start: of "tail": share of the run after which it begins.
        rows: most evaluation rows that both weights are compared on; 0: they are not compared.
    """
    callback = WeightAveraging(trainer, kind, decay=decay, start=start, rows=rows)
    trainer.add_callback(callback)
    return callback
