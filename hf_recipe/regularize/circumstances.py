"""What a run's data, model and settings say about each remedy against overfitting.

The recipe's order: real data first, then augmentation, pretrained weights, fewer inputs, a smaller
model, dropout, weight decay, and stopping early. A list alone helps nobody; each line here says
what this run has of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_recipe.core.check import Measurement
from hf_recipe.data.duplicates import Repeats
from hf_recipe.regularize.augment import Augmentation
from hf_recipe.regularize.dropout import DROPOUTS
from hf_recipe.regularize.more_data import DataCurve

CHANGES = {
    "pixel_values": "Augmentation(Move(), Noise())",
    "input_ids": "Augmentation(TokenDropout(**token_settings(tokenizer)))",
    "": "Augmentation(Jitter(), MixUp())",
}
CAPACITY = 10  # parameters per row from which the model could hold the rows by heart


@dataclass(frozen=True)
class Circumstances(Measurement):
    """What there is to overfit with, and what is already done against it.

    Attributes:
        rows: training rows; 0 where unknown (streams).
        parameters: trained numbers.
        inputs: name of the main input.
        dropout: highest rate among the model's modules.
        dropouts: how many of its modules can drop units; None: not counted.
        decay: highest weight decay.
        augmented: whether `Augmentation` is on this Trainer.
        pretrained: name or folder the weights came from; empty: drawn from a config.
    """

    rows: int = 0
    parameters: int = 0
    inputs: str = ""
    dropout: float = 0.0
    decay: float = 0.0
    augmented: bool = False
    pretrained: bool = False
    dropouts: int | None = None


def take(subject: Any) -> Iterator[Circumstances]:
    """Read them off model, arguments and callbacks."""
    model: nn.Module = subject.model
    trainer = subject.trainer
    callbacks = trainer.callback_handler.callbacks if trainer is not None else []
    rates = [float(m.p) for m in model.modules() if isinstance(m, DROPOUTS)]
    yield Circumstances(
        rows=len(subject.train) if subject.train is not None else 0,
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        inputs=str(getattr(model, "main_input_name", "")),
        dropout=max(rates, default=0.0),
        decay=float(subject.args.weight_decay or 0.0),
        augmented=any(isinstance(c, Augmentation) for c in callbacks),
        pretrained=bool(getattr(subject.config, "_name_or_path", "")),
        dropouts=len(rates),
    )


def advice(seen: Mapping[str, Measurement], stop_at: int) -> tuple[str, ...]:
    """Remedies in the recipe's order, each with what the evidence so far says about it.

    Args:
        seen: the latest measurement of each kind.
        stop_at: step of the best evaluation.
    """
    run = seen.get(Circumstances.kind())
    run = run if isinstance(run, Circumstances) else Circumstances()
    repeats, curve = seen.get(Repeats.kind()), seen.get(DataCurve.kind())
    told = [_data(run, repeats, curve)]
    if run.augmented:
        told.append("augmentation is on: a stronger one")
    else:
        told.append(CHANGES.get(run.inputs, CHANGES[""]))
    if not run.pretrained:
        told.append("pretrained weights")
    if isinstance(repeats, Repeats) and repeats.conflicting:
        told.append(
            f"{repeats.conflicting:,} rows have equal inputs under different labels: mend these"
        )
    if run.rows and run.parameters > CAPACITY * run.rows:
        told.append(f"a smaller model ({run.parameters / run.rows:,.0f} parameters per row)")
    none = run.dropouts == 0
    told.append("dropout (this model has none)" if none else f"dropout (now {run.dropout:g})")
    told.append(f"weight decay (now {run.decay:g})")
    told.append(f"early stopping (at step {stop_at:,})")
    return tuple(told)


def _data(run: Circumstances, repeats: Any, curve: Any) -> str:
    if isinstance(curve, DataCurve):
        mean, low, high = curve.twice
        return f"more data (twice the rows: {curve.now:.3g} to {mean:.3g} [{low:.3g}, {high:.3g}])"
    if not run.rows:
        return "more data"
    text = f"more data ({run.rows:,} rows"
    if isinstance(repeats, Repeats) and repeats.copies:
        text += f", {repeats.copies / max(1, repeats.rows):.0%} of those read are copies"
    return text + ")"
