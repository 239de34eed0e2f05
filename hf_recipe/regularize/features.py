"""Which inputs earn their place? "Remove features that may contain spurious signal".

An input that the model does not need is one more thing to overfit. Importance is measured on
held-out rows: the rise of their loss when one field is exchanged between rows (which keeps each
value real), with an interval over rows and exchanges. Fields that carry the same thing hide each
other in that, so what looks unneeded is left out and the model trained again (`drop_fields`) before
it is called unhelpful.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
from torch import nn

from hf_recipe.core.check import Check, Measurement
from hf_recipe.core.exhibit import Cell, Ladder, Matrix, Table
from hf_recipe.core.finding import Fault
from hf_recipe.data.preview import is_image
from hf_recipe.instruments.compare import Gain, Outcome, Variant, compare
from hf_recipe.instruments.row_losses import row_losses

Values = Mapping[str, Any]
Losses = Callable[[dict[str, Any]], "torch.Tensor | Sequence[float]"]
Exchange = Callable[[Values, torch.Tensor], dict[str, Any]]
MOST_FIELDS = 64


@dataclass(frozen=True)
class Field:
    """One field.

    Attributes:
        name: a column, a text field, "region 1,2" of a picture, "tokens 8-15".
        rise: of the mean loss when the field is exchanged between rows.
        low, high: its 95 % interval.
        cost: fall in performance (rise of the loss) of a model trained without it, with its
            interval; None: not tried.
    """

    name: str
    rise: float
    low: float
    high: float
    cost: float | None = None
    cost_low: float | None = None
    cost_high: float | None = None


@dataclass(frozen=True)
class FieldUse(Measurement):
    """What each field of the input is worth, on `rows` held-out rows with this mean loss."""

    rows: int
    loss: float
    fields: tuple[Field, ...]


def fields_of(
    batch: Values, *, names: Sequence[str] = (), grid: int = 4, spans: int = 8
) -> dict[str, Exchange]:
    """The fields of a collated batch: name -> exchange of that field between rows.

    Columns of 2-D numbers (named by `names`), a grid of regions of images, spans of token
    positions (with their attention), and every other 1-D number.
    """
    found: dict[str, Exchange] = {}
    for key, value in batch.items():
        if not isinstance(value, torch.Tensor) or key in ("labels", "label", "attention_mask"):
            continue
        if is_image(value):
            found |= _regions(key, value, grid)
        elif key == "input_ids" and value.ndim == 2:
            found |= _spans(batch, value.shape[1], spans)
        elif value.is_floating_point() and value.ndim == 2:
            for place in range(min(value.shape[1], MOST_FIELDS)):
                name = names[place] if place < len(names) else f"{key} {place}"
                found[name] = _exchange(key, (slice(None), place))
        elif value.ndim == 1:
            found[key] = _exchange(key, (slice(None),))
    return found


def _exchange(key: str, where: tuple[Any, ...], *others: str) -> Exchange:
    def exchange(batch: Values, order: torch.Tensor) -> dict[str, Any]:
        changed = dict(batch)
        for name in (key, *others):
            value = batch[name].clone()
            value[where] = value[order.to(value.device)][where]
            changed[name] = value
        return changed

    return exchange


def _regions(key: str, pixels: torch.Tensor, grid: int) -> dict[str, Exchange]:
    cuts = [np.linspace(0, size, min(grid, size) + 1).astype(int) for size in pixels.shape[2:]]
    return {
        f"region {r},{c}": _exchange(
            key, (slice(None), slice(None), slice(*cuts[0][r : r + 2]), slice(*cuts[1][c : c + 2]))
        )
        for r in range(len(cuts[0]) - 1)
        for c in range(len(cuts[1]) - 1)
    }


def _spans(batch: Values, length: int, spans: int) -> dict[str, Exchange]:
    cuts = np.linspace(0, length, min(spans, length) + 1).astype(int)
    shape = batch["input_ids"].shape
    others = [
        name
        for name in ("attention_mask", "token_type_ids")
        if isinstance(batch.get(name), torch.Tensor) and batch[name].shape == shape
    ]
    return {
        f"tokens {a}-{b - 1}": _exchange("input_ids", (slice(None), slice(a, b)), *others)
        for a, b in itertools.pairwise(cuts)
        if b > a
    }


def field_use(
    losses: Losses,
    batch: Values,
    fields: Mapping[str, Exchange],
    *,
    repeats: int = 3,
    seed: int = 0,
) -> FieldUse:
    """Exchange each field between the rows of a held-out batch, and see what it does to the loss.

    Args:
        losses: batch -> the loss of each of its rows.
        fields: as `fields_of` gives them, or own ones (a modality, a group of columns).
        repeats: exchanges per field.

    Raises:
        ValueError: fewer than two rows, no field, or losses that are not one per row.
    """
    plain = torch.as_tensor(losses(dict(batch)), dtype=torch.float64)
    count = len(plain)
    if count < 2 or plain.ndim != 1 or not fields:
        raise ValueError(
            f"one loss for each of two rows or more, and a field, are needed; got losses of shape "
            f"{tuple(plain.shape)} and {len(fields)} fields"
        )
    draw = torch.Generator().manual_seed(seed)
    # A shift along a random order leaves no row its own value.
    orders = []
    for _ in range(repeats):
        around = torch.randperm(count, generator=draw)
        order = torch.empty(count, dtype=torch.long)
        order[around] = around.roll(1)
        orders.append(order)
    found = []
    for name, exchange in fields.items():
        changed = [torch.as_tensor(losses(exchange(batch, o)), dtype=torch.float64) for o in orders]
        rises = torch.stack(changed) - plain
        by_row = rises.mean(0)
        error = math.sqrt(float(by_row.var()) / count)
        mean = float(by_row.mean())
        found.append(Field(name, mean, mean - 1.96 * error, mean + 1.96 * error))
    return FieldUse(count, float(plain.mean()), tuple(found))


def losses_of(model: nn.Module) -> Losses:
    """A `losses` of a model with labels in its batch, in evaluation mode; for `field_use`.

    Raises (when called): ValueError where the head's loss cannot be taken apart by rows.
    """

    def losses(batch: dict[str, Any]) -> torch.Tensor:
        mode = model.training
        model.eval()
        try:
            with torch.no_grad():
                outputs = model(**batch)
        finally:
            model.train(mode)
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs.loss
        each = row_losses(outputs, batch.get("labels"), float(loss))
        if each is None:
            raise ValueError(f"the loss of {type(model).__name__} cannot be taken apart by rows")
        return each

    return losses


def drop_fields(
    train: Callable[[tuple[str, ...], int], Sequence[float]],
    use: FieldUse,
    names: Sequence[str] | None = None,
    *,
    seeds: Sequence[int] = (0, 1, 2),
) -> tuple[FieldUse, Ladder]:
    """Train without each of `names`, one at a time, against training with everything.

    Args:
        train: (names left out, seed) -> losses of the held-out rows.
        names: default: the fields whose exchange did not raise the loss (see `unneeded`).

    Returns:
        `use` with the costs filled in, and the ladder of the comparison.
    """
    asked = tuple(unneeded(use) if names is None else names)
    unknown = sorted(set(asked) - {field.name for field in use.fields})
    if unknown:
        raise ValueError(f"no such field: {', '.join(unknown)}")

    def run(variant: Variant) -> Outcome:
        without = tuple(variant.settings["without"])
        return Outcome(tuple(float(loss) for loss in train(without, variant.seed)))

    variants = [Variant(f"without {name}", {"without": [name]}) for name in asked]
    base = Variant("all fields", {"without": []})
    ladder = compare(run, base, variants, seeds, title="Fields left out, one at a time")
    gains = {
        name: Gain(rung.gain, rung.low, rung.high)
        for name, rung in zip(asked, ladder.rungs[1:], strict=True)
        if rung.gain is not None and rung.low is not None and rung.high is not None
    }
    return with_costs(use, gains), ladder


def with_costs(use: FieldUse, gains: Mapping[str, Gain]) -> FieldUse:
    """`use` with what leaving a field out was seen to cost: the gain of doing so, turned."""
    fields = tuple(
        replace(
            f, cost=-gains[f.name].mean, cost_low=-gains[f.name].high, cost_high=-gains[f.name].low
        )
        if f.name in gains and math.isfinite(gains[f.name].mean)
        else f
        for f in use.fields
    )
    return replace(use, fields=fields)


def unneeded(use: FieldUse, tolerance: float = 0.05) -> list[str]:
    """Fields whose exchange raises the loss by less than `tolerance` of it, interval included."""
    return [f.name for f in use.fields if f.high < tolerance * max(use.loss, 1e-12)]


def exhibits(use: FieldUse) -> tuple[Table | Matrix, ...]:
    """A table of all fields, most needed first; image regions also as a map."""
    ordered = sorted(use.fields, key=lambda f: -f.rise)
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (f.name, round(f.rise, 5), round(f.low, 5), round(f.high, 5), f.cost) for f in ordered
    )
    head = ("field", "rise of the loss", "low", "high", "cost of leaving it out")
    table = Table("What each field is worth", "regularize", head, rows)
    places = {f.name.removeprefix("region "): f.rise for f in use.fields if "region " in f.name}
    if not places:
        return (table,)
    side = sorted({int(v) for p in places for v in p.split(",")[:1]})
    across = sorted({int(v) for p in places for v in p.split(",")[1:]})
    values = tuple(tuple(places.get(f"{r},{c}", 0.0) for c in across) for r in side)
    names = tuple(map(str, side)), tuple(map(str, across))
    return table, Matrix("What each region is worth", "regularize", *names, values)


def feature_unhelpful(
    use: FieldUse,
    *,
    tolerance: Annotated[
        float, "2 % of the loss: what a turn of validation must reach to count"
    ] = 0.02,
    exchanged: Annotated[float, "5 % of the loss: an overfit model leans on noise a little"] = 0.05,
) -> Iterator[Fault]:
    """Fields that the model does not need, and does not miss when it is trained without them."""
    quiet = set(unneeded(use, exchanged))
    limit = tolerance * max(use.loss, 1e-12)
    named = [
        f for f in use.fields if f.name in quiet and f.cost_high is not None and f.cost_high < limit
    ]
    for field in named:
        assert field.cost is not None
        yield Fault(
            f"{field.name}: trained without it, the loss changes by {field.cost:+.4f} "
            f"[{field.cost_low:+.4f}, {field.cost_high:+.4f}]; exchanged between {use.rows:,} "
            f"rows, by {field.rise:+.4f} [{field.low:+.4f}, {field.high:+.4f}]",
            subject=field.name,
            evidence={
                "seen": f"{field.cost:+.4g} without it",
                "expected": f"more than {limit:.2g} lost",
                "cost": field.cost,
                "rise": field.rise,
            },
        )


FEATURE_UNHELPFUL = Check(
    name="feature-unhelpful",
    stage="regularize",
    severity="note",
    moments=("end",),
    why="An input that is not needed is one more thing to overfit, to collect and to break.",
    fix="dataset = dataset.remove_columns([name])",
    source="Karpathy, A Recipe for Training Neural Networks (2019); Breiman (2001)",
    unsure="Fields that stand in for each other each look unhelpful; leave out one, then measure.",
    judges=(feature_unhelpful,),
    call="hf_recipe.regularize.features.drop_fields(train, use)",
)
