"""Small pieces of an experiment: callbacks, a part of a data set, losses of rows, curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import Trainer, TrainerCallback

from hf_recipe.core.exhibit import Curve, Line
from hf_recipe.core.finding import Stage
from hf_recipe.instruments.batches import rows_of_trainer
from hf_recipe.instruments.compare import Outcome, Variant
from hf_recipe.instruments.quiet import quiet
from hf_recipe.regularize.features import FieldUse, field_use, fields_of, losses_of
from hf_recipe.runner.ledger import SEEN_BEFORE


class Part:
    """Some rows of a data set."""

    def __init__(self, rows: Any, chosen: range) -> None:
        self.rows, self.chosen = rows, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Any:
        return self.rows[self.chosen[index]]


class Progress(TrainerCallback):  # type: ignore[misc]
    """Tells a `Show` how far a training is."""

    def __init__(self, tell: Any) -> None:
        self.tell = tell

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tell(state.global_step, state.max_steps)


class WholeEvaluation(TrainerCallback):  # type: ignore[misc]
    """``dataloader_drop_last`` would cut evaluation sets too; training's loader stands by now."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        args.dataloader_drop_last = False


def norm_quantile(recipe: Any, share: float = 0.9) -> float | None:
    """A quantile of a watched run's gradient norms before clipping; None: not seen."""
    series = recipe.recorder.curves.get("gradient norm")
    return float(np.quantile(series.y, share)) if series is not None and series.y else None


def worth_of_fields(trainer: Trainer, names: Sequence[str], rows: int = 512) -> FieldUse | None:
    """What each column, region or span is worth to a trained model; None: cannot be told."""
    held = rows_of_trainer(trainer, trainer.eval_dataset, "validation")
    if held is None or held.is_stream or len(held) < 2:
        return None
    model = trainer.model
    batch = held.batch(held.evenly_spaced(rows)).to(next(model.parameters()).device)
    with quiet(model, trainer=trainer):
        try:
            fields = fields_of(batch.inputs, names=names)
            return field_use(losses_of(model), batch.inputs, fields, repeats=2)
        except ValueError:  # a head whose loss cannot be taken apart
            return None


def note_of(variant: Variant, outcome: Outcome) -> str:
    """What the ledger says beside an experiment's numbers."""
    facts = outcome.facts
    if "validation" in variant.settings["part"]:
        return SEEN_BEFORE
    if not np.isfinite(outcome.loss):
        return "diverged"
    stopped = facts["steps"] < facts["planned"]
    if facts.get("shared") and not stopped:
        return "of the same training: nothing to train"
    return f"stopped at step {facts['steps']} of {facts['planned']}" if stopped else ""


def curves(outcome: Outcome, title: str, stage: Stage) -> Curve:
    """Training and validation loss over steps, for the report."""
    lines = []
    for name, key in (("training", "train_curve"), ("validation", "curve")):
        points = outcome.facts[key]
        lines.append(Line(name, tuple(p[0] for p in points), tuple(p[1] for p in points)))
    return Curve(title, stage, "step", "loss", tuple(lines))
