"""Early stopping: "stop training based on validation loss", without being fooled by its noise.

The Trainer's own callback counts evaluations that are not better than the best one: one noisy
evaluation costs patience, steady gains under its threshold count as none, a NaN looks like no
improvement, and a decay of the learning rate that is still to come, the part of a run that gains
most, is cut off. `StoppingRule` asks instead where the curve is heading: it stops when neither
the best value is recent nor the line through the last evaluations leads below it, and never
before a decay that has not run. `EarlyStopping` is a thin callback around it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback

from hf_recipe.core.check import Skip
from hf_recipe.instruments.distributed import from_rank_0
from hf_recipe.instruments.rates import decay_done, simulate
from hf_recipe.regularize.stopping_rule import StoppingRule

__all__ = ["STATE", "EarlyStopping", "StoppingRule"]

logger = logging.getLogger(__name__)

STATE = "hf_recipe.early_stopping"  # our key in TrainerState.stateful_callbacks


class EarlyStopping(TrainerCallback):  # type: ignore[misc]
    """Stops the Trainer by `StoppingRule`; needs an ``eval_strategy`` and nothing else.

    Works with ``load_best_model_at_end`` off. With several evaluation sets it follows the one whose
    metric it is told, e.g. ``metric="eval_validation_loss"``, or all of several: then it stops when
    none of them has anything to gain. Its state rides in ``TrainerState.stateful_callbacks`` as a
    plain dict, so patience and history survive a resume.

    Args:
        metric: name in the logs, or several of one direction; default: the arguments'
            ``metric_for_best_model``, else the loss.
        greater_is_better: default: the arguments' (False for a loss).
        rule: settings of the rule, as in `StoppingRule`.
        standard_error_of: evaluation metrics -> standard error of the metric, where it is known.
        cool_down: where the curve has turned but the rate's decay is still to come: begin it now,
            linearly to 0 over this share of the steps done, and stop at its end; None: wait.

    Attributes:
        rule: the (first) metric's rule with its history, `reason` included; None before training.
        rules: all of them, by metric.
    """

    def __init__(
        self,
        metric: str | Sequence[str] | None = None,
        *,
        greater_is_better: bool | None = None,
        cool_down: float | None = None,
        standard_error_of: Callable[[dict[str, float]], float | None] | None = None,
        **rule: Any,
    ) -> None:
        StoppingRule(**rule)  # a bad setting is told now, not at the first evaluation
        if cool_down is not None and not 0 < cool_down <= 1:
            raise ValueError(f"cool_down is a share of the steps done, in (0, 1]; got {cool_down}")
        self.metrics = (metric,) if isinstance(metric, str) else tuple(metric or ())
        self.metric = self.metrics[0] if self.metrics else None
        self.greater_is_better = greater_is_better
        self.cool_down = cool_down
        self.standard_error_of = standard_error_of
        self.settings = rule
        self.rules: dict[str, StoppingRule] = {}
        self._turned: set[str] = set()  # metrics whose latest evaluation said stop
        self._cooling: list[int] | None = None  # first and last step of an early cool-down
        self._decay: list[float] | None = None  # share done, at every `_every`-th step
        self._every = 1
        self._steps: dict[str, int] = {}  # at which each was evaluated last

    @property
    def rule(self) -> StoppingRule | None:
        """The rule of the (first) metric; None before training."""
        return next(iter(self.rules.values()), None)

    def names_of(self, args: Any) -> tuple[str, ...]:
        """All metrics' names in the logs."""
        rest = (n if n.startswith("eval_") else f"eval_{n}" for n in self.metrics[1:])
        return (self.name_of(args), *rest)

    def name_of(self, args: Any) -> str:
        """The metric's name in the logs."""
        name = self.metric or args.metric_for_best_model or "loss"
        return name if name.startswith("eval_") else f"eval_{name}"

    def _greater(self, args: Any) -> bool:
        if self.greater_is_better is not None:
            return self.greater_is_better
        if self.metric is None and args.metric_for_best_model is not None:
            return bool(args.greater_is_better)
        return not self.name_of(args).endswith("loss")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up a stored history, or begin one and look at the schedule to come."""
        kept = state.stateful_callbacks.get(STATE) if state.global_step else None
        if kept is not None:
            self.rules = {n: StoppingRule.from_state(r) for n, r in kept["rules"].items()}
            self._decay, self._every, self._steps = kept["decay"], kept["every"], kept["steps"]
            self._turned, self._cooling = set(kept["turned"]), kept["cooling"]
            return
        greater = self._greater(args)
        self.rules = {n: StoppingRule(greater, **self.settings) for n in self.names_of(args)}
        self._decay, self._steps, self._turned, self._cooling = None, {}, set(), None
        scheduler = kwargs.get("lr_scheduler")
        if scheduler is None or state.global_step:
            return
        try:
            shares = decay_done(simulate(scheduler, state.max_steps))
        except Skip as reason:
            logger.info("early stopping takes the learning rate as constant: %s", reason)
            return
        if shares is not None:
            self._every = -(-len(shares) // 256)
            self._decay = shares[:: self._every] + shares[-1:]

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        """Ask the rules, once for each step, and stop on all ranks if all say so."""
        asked = False
        for name, rule in self.rules.items():
            value, step = metrics.get(name), int(state.global_step)
            if value is None or step <= self._steps.get(name, 0):
                continue  # another evaluation set, a second one at this step, or before training
            asked, self._steps[name] = True, step
            error = self.standard_error_of(metrics) if self.standard_error_of else None
            stops = from_rank_0(rule.update(value, error, self._share(state)), args.device)
            (self._turned.add if stops else self._turned.discard)(name)
        if not asked:
            return
        if len(self._turned) == len(self.rules) and self._cooling is None:
            control.should_training_stop = True
            logger.info("stopped at step %d: %s", state.global_step, self._why())
        elif self.cool_down is not None and self._cooling is None and self._waits():
            length = max(1, round(self.cool_down * state.global_step))
            self._cooling = [int(state.global_step), int(state.global_step) + length]
            logger.info("cooling down over %d steps: %s", length, self._why())
        self._keep(state)

    def _why(self) -> str:
        return "; ".join(rule.reason for rule in self.rules.values())

    def _waits(self) -> bool:
        """Whether nothing but the decay to come speaks against stopping."""
        waiting = {n for n, r in self.rules.items() if r.reason.startswith("not stopped")}
        return len(waiting | self._turned) == len(self.rules)

    def _keep(self, state: Any) -> None:
        state.stateful_callbacks[STATE] = {
            "rules": {name: rule.state() for name, rule in self.rules.items()},
            "decay": self._decay,
            "every": self._every,
            "steps": dict(self._steps),
            "turned": sorted(self._turned),
            "cooling": self._cooling,
        }

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """In a cool-down: the scheduler's rate, times what is left of it."""
        if self._cooling is None or optimizer is None:
            return
        begin, end = self._cooling
        left = max(0.0, 1 - (state.global_step - begin) / (end - begin))
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * left  # the scheduler sets it anew after every step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A cool-down that is over ends the run, after one more evaluation."""
        if self._cooling is not None and state.global_step >= self._cooling[1]:
            control.should_training_stop = control.should_evaluate = True
            logger.info("stopped at step %d, cooled down", state.global_step)

    def _share(self, state: Any) -> float | None:
        if self._decay is None:
            return None
        last = int(state.global_step) - 1  # the step whose rate was used last
        if last >= state.max_steps - 1:
            return 1.0
        return self._decay[min(last // self._every, len(self._decay) - 1)]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say so where stopping could not work."""
        if self.rule is not None and not self.rule.evaluations:
            what = (
                f"never finite ({self.rule.invalid} evaluations)"
                if self.rule.invalid
                else "never reported"
            )
            logger.error("early stopping did not work: %s was %s", self.name_of(args), what)
