"""The N best checkpoints, and choosing among them afterwards.

The playbook: keep the N best checkpoints of a run and select one in retrospect, instead of trusting
whichever was the latest. ``save_total_limit`` alone keeps the latest ones, best or not.

    best = hf_recipe.BestCheckpoints(3)
    trainer = Trainer(..., callbacks=[best])   # eval_strategy and save_strategy alike
    trainer.train()
    best.choose(trainer)                       # loads the best of them
    best.choose(trainer, larger_set)           # or the best on rows that did not choose so far
"""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hf_recipe.instruments.distributed import from_rank_0
from hf_recipe.regularize.metric_names import chosen_direction, chosen_metric

logger = logging.getLogger(__name__)

STATE = "hf_recipe.best_checkpoints"  # our key in TrainerState.stateful_callbacks


class BestCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Keeps the `count` best ordinary checkpoints of a run, and its latest one to resume from.

    Where ``save_total_limit`` is set there are never more than it says, the latest among them: this
    callback then deletes in the Trainer's stead, the worst instead of the oldest. What is kept is
    remembered with the Trainer's state, so that a resumed run goes on with it.

    Args:
        count: of best checkpoints.
        metric: name in the logs; default: the arguments' ``metric_for_best_model``, else the loss.
        greater_is_better: default: the arguments', False for a loss.

    Attributes:
        kept: (value, step) of each checkpoint that is kept, best first; a step without an
            evaluation is not among them.
    """

    def __init__(
        self, count: int = 3, *, metric: str | None = None, greater_is_better: bool | None = None
    ) -> None:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"at least one checkpoint is kept; got count={count!r}")
        self.count, self.metric, self.greater_is_better = count, metric, greater_is_better
        self.kept: list[tuple[float, int]] = []
        self._latest: tuple[int, float] | None = None  # step and value of the last evaluation
        self._limit: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up what an earlier part of the run has kept; take deletion over."""
        self._limit, args.save_total_limit = args.save_total_limit, None
        self._latest, known = None, state.stateful_callbacks.get(STATE, {"kept": []})
        if not state.global_step:
            known = {"kept": []}
        found = [(float(v), int(s)) for v, s in known["kept"]]
        self.kept = [(v, s) for v, s in found if self._folder(args, s).is_dir()]

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        """Remember the value of this step; one that is not finite is no candidate."""
        name = self._name(args)
        if name in metrics and math.isfinite(metrics[name]):
            self._latest = (int(state.global_step), float(metrics[name]))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Rank the new checkpoint; delete what is neither among the best nor the latest."""
        step = int(state.global_step)
        if self._latest is not None and self._latest[0] == step:
            greater = self._greater(args)
            value = float(from_rank_0(self._latest[1], args.device))
            self.kept = [pair for pair in self.kept if pair[1] != step] + [(value, step)]
            self.kept.sort(key=lambda pair: (-pair[0] if greater else pair[0], pair[1]))
        most = self.count if self._limit is None else min(self.count, max(1, self._limit))
        self.kept = self.kept[:most]
        if self._limit is not None and len(self.kept) == self._limit and step not in self._steps():
            self.kept = self.kept[: self._limit - 1]  # one place is the latest checkpoint's
        state.stateful_callbacks[STATE] = {"kept": [list(pair) for pair in self.kept]}
        if not args.should_save:
            return
        state.save_to_json(str(self._folder(args, step) / "trainer_state.json"))
        staying = {*self._steps(), step}
        for path in Path(args.output_dir).glob("checkpoint-*"):
            number = path.name.rpartition("-")[2]
            best = state.best_model_checkpoint
            is_best = best is not None and Path(best).name == path.name
            if number.isdigit() and int(number) not in staying and not is_best:
                shutil.rmtree(path, ignore_errors=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The limit stands again; say so where nothing could be kept."""
        args.save_total_limit = self._limit
        if not self.kept:
            logger.error(
                "no checkpoint could be ranked: %s was never evaluated at a step that was saved "
                "(eval_steps and save_steps must fall together)",
                self._name(args),
            )

    def choose(self, trainer: Any, eval_dataset: Any = None) -> tuple[int, float]:
        """Load the best checkpoint's weights into the Trainer's model.

        Args:
            eval_dataset: judges the kept checkpoints anew; None: the values they were kept by.

        Returns:
            Step and value of the one that was chosen.

        Raises:
            ValueError: none is kept, or none has a finite value on `eval_dataset`.
        """
        if not self.kept:
            raise ValueError("no checkpoint is kept: nothing to choose from")
        value, step = self.kept[0]
        if eval_dataset is not None:
            name, found = self._name(trainer.args), []
            for _, each in self.kept:
                self._load(trainer, each)
                metrics = trainer.evaluate(eval_dataset)
                if name not in metrics:
                    raise ValueError(f"the evaluation has no {name}: {', '.join(metrics)}")
                found.append((float(from_rank_0(float(metrics[name]), trainer.args.device)), each))
            finite = [pair for pair in found if math.isfinite(pair[0])]
            if not finite:
                raise ValueError(f"{name} is finite for none of {len(found)} checkpoints")
            value, step = (max if self._greater(trainer.args) else min)(finite)
        self._load(trainer, step)
        return step, value

    def _load(self, trainer: Any, step: int) -> None:
        before = trainer.state.best_model_checkpoint
        trainer.state.best_model_checkpoint = str(self._folder(trainer.args, step))
        trainer._load_best_model()  # knows adapters and sharded weights
        trainer.state.best_model_checkpoint = before

    def _steps(self) -> set[int]:
        return {step for _, step in self.kept}

    def _folder(self, args: Any, step: int) -> Path:
        return Path(args.output_dir) / f"checkpoint-{step}"

    def _name(self, args: Any) -> str:
        return chosen_metric(self.metric, args)

    def _greater(self, args: Any) -> bool:
        return chosen_direction(self.metric, self.greater_is_better, args)
