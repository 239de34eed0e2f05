"""Are the numbers that the network gets of unit scale?

Weights are drawn for inputs with a spread of about one. Raw pixels (0 to 255) and raw units
(square metres, dollars) saturate the first layer; pixels divided by 255 twice leave it hardly
anything to tell apart. What counts is what the first layer gets, not what stands in the data: a
model may scale its inputs itself. So a suspicious input is followed into the model, up to the
first layer with weights that depends on it; a normalising layer there settles the matter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import nn

from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.data.column_numbers import Columns
from hf_recipe.instruments.subject import Subject

ROWS = 64
LARGE, SMALL = 10.0, 0.02
# One or two numbers of a feature, so many times as large as any other, are outliers (a check of
# their own shows them) and say nothing of its scale; looked for among no more rows than this.
STRAY, FEWEST, MOST = 8.0, 32, 4096
# Tensors beside the input proper: places, marks, weights, answers, and vectors already embedded.
BESIDE = re.compile(
    r"label|target|mask|bbox|box|position|weight|embed|hidden|state|noise|timestep|(^|_)(y|ids?|"
    r"idx|index|indices|length|lengths|size|sizes|scale|loc|grid|type|rows?)($|_)",
    re.IGNORECASE,
)
NORMALISING = re.compile(r"(norm|standardi[sz]e|rescal|scaler)", re.IGNORECASE)


@dataclass(frozen=True)
class TensorScale:
    """One input tensor, by feature (last axis; channels for a convolution).

    Attributes:
        name: of the input; layer: the first layer that it reaches ("" where none was told apart).
        rows, features: how many were looked at.
        largest: the largest root mean square of a feature (without a stray row or two), and where:
            largest_feature.
        large: features whose root mean square lies beyond `LARGE`.
        whole: the root mean square over all features: the scale of a fresh layer's outputs.
        typical: the median of the features' root mean squares.
        peak: the largest absolute value of all.
        mean, deviation: over everything.
        normalised: whether that layer normalises what it gets.
    """

    name: str
    rows: int
    features: int
    largest: float
    largest_feature: int
    large: int
    peak: float
    mean: float
    deviation: float
    layer: str = ""
    normalised: bool = False
    whole: float = 0.0
    typical: float = 0.0


@dataclass(frozen=True)
class InputScales(Measurement):
    """The numeric inputs of one batch, as the network's first layers get them."""

    version = 2

    tensors: tuple[TensorScale, ...]


def take_input_scales(subject: Subject) -> Iterator[InputScales]:
    """Measure the numeric inputs of a batch; those far from unit scale in the model itself."""
    batch = subject.batch("train", size=ROWS)
    candidates = {
        name: value
        for name, value in batch.inputs.items()
        if isinstance(value, torch.Tensor) and value.ndim and _is_quantity(name, value)
    }
    if not candidates:
        raise Skip("the batches carry no numeric input (token ids have no scale)")
    found = []
    for name, value in candidates.items():
        scale = scale_of(name, value)
        if scale.largest > LARGE or scale.peak < SMALL:
            scale = _followed(subject, batch.inputs, name, value, scale)
        found.append(scale)
    yield InputScales(tuple(found))


def _is_quantity(name: str, value: torch.Tensor) -> bool:
    if BESIDE.search(name) or value.dtype == torch.bool or value.is_complex():
        return False
    return value.is_floating_point() or (name == "pixel_values" and value.ndim >= 3)


def scale_of(name: str, value: torch.Tensor, axis: int = -1, layer: str = "") -> TensorScale:
    """The scale of a batch (rows, ..., features); non-finite numbers are another check's."""
    flat = value.detach().float()
    flat = torch.where(torch.isfinite(flat), flat, torch.zeros_like(flat))
    flat = flat.reshape(-1, 1) if flat.ndim == 1 else flat.movedim(axis, -1).flatten(0, -2)
    mean_square = _mean_square(flat)
    if not flat.numel():
        return TensorScale(name, len(value), 0, 0.0, 0, 0, math.nan, math.nan, math.nan, layer)
    worst = int(mean_square.argmax())
    return TensorScale(
        name=name,
        rows=len(value),
        features=flat.shape[1],
        largest=math.sqrt(float(mean_square[worst])),
        largest_feature=worst,
        large=int((mean_square.sqrt() > LARGE).sum()),
        peak=float(flat.abs().max()),
        mean=float(flat.mean()),
        deviation=float(flat.std(correction=0)),
        layer=layer,
        whole=math.sqrt(float(mean_square.mean())),
        typical=float(mean_square.sqrt().median()),
    )


def _mean_square(flat: torch.Tensor) -> torch.Tensor:
    """(features,) of (rows, features), outliers aside."""
    rows = len(flat)
    mean = flat.square().mean(0)
    if not FEWEST <= rows <= MOST:
        return mean
    sizes, order = flat.abs().topk(3, dim=0)
    for strays in (1, 2):
        apart = (sizes[strays] > 0) & (sizes[strays - 1] > STRAY * sizes[strays])
        rest = flat.scatter(0, order[:strays], 0.0).square().sum(0) / (rows - strays)
        mean = torch.where(apart, rest, mean)
    return mean


class _Arrived(Exception):
    """Raised inside the forward at the first layer that depends on the input."""


@dataclass
class _Entry:
    layer: str = ""
    module: nn.Module | None = None
    value: torch.Tensor | None = None


def _followed(
    subject: Subject,
    inputs: Mapping[str, Any],
    name: str,
    value: torch.Tensor,
    scale: TensorScale,
) -> TensorScale:
    """The scale of `name` where it enters the first layer with weights."""
    model = subject.model
    model.eval()
    for parameter in model.parameters():  # so that only what depends on the input asks for one
        parameter.requires_grad_(False)
    marked = value.detach().clone()
    if marked.is_floating_point():
        marked.requires_grad_(True)
    entry = _Entry()
    with _watching(model, marked, entry), suppress(_Arrived):
        subject.compute_loss({**inputs, name: marked})
    if entry.module is None or entry.value is None:
        return scale
    kind = type(entry.module).__name__
    axis = 1 if "Conv" in kind and kind != "Conv1D" and entry.value.ndim > 2 else -1
    seen = scale_of(name, entry.value, axis, entry.layer)
    normalised = bool(NORMALISING.search(kind) or NORMALISING.search(entry.layer))
    return TensorScale(**{**vars(seen), "rows": len(value), "normalised": normalised})


@contextmanager
def _watching(model: nn.Module, marked: torch.Tensor, entry: _Entry) -> Iterator[None]:
    """Stop the forward at the first layer with weights of its own that `marked` reaches."""

    def look(layer: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            for value in (*args, *kwargs.values()):
                if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                    continue
                if value.requires_grad or (
                    not marked.requires_grad and value.numel() == marked.numel()
                ):
                    entry.layer, entry.module, entry.value = layer, module, value.detach()
                    raise _Arrived

        return hook

    handles = [
        module.register_forward_pre_hook(look(layer), with_kwargs=True)
        for layer, module in model.named_modules()
        if _has_own_weights(module)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _has_own_weights(module: nn.Module) -> bool:
    """Layers and normalisations, those without learned weights too; no containers."""
    if next(module.children(), None) is not None:
        return False
    own = next(module.parameters(recurse=False), None) is not None
    return own or bool(NORMALISING.search(type(module).__name__))


# ---------------------------------------------------------------- verdicts


def _entering(seen: InputScales) -> Iterator[tuple[str, TensorScale]]:
    """What enters the network, and under which names: inputs that are joined before the first
    layer are one there."""
    places: dict[tuple[object, ...], list[TensorScale]] = {}
    for scale in seen.tensors:
        place = (scale.layer, scale.largest, scale.peak) if scale.layer else (scale.name,)
        places.setdefault(place, []).append(scale)
    for joined in places.values():
        yield ", ".join(scale.name for scale in joined), joined[0]


def unscaled_input(
    seen: InputScales,
    *,
    large: Annotated[
        float,
        "root mean square of all inputs, or of one feature over the typical one's; ten times the "
        "unit that weights are drawn for (a digit's 0..16 has 8 and trains well, 0..255 has 85)",
    ] = LARGE,
    small: Annotated[
        float, "largest absolute value; pixels over 255 twice reach .004, a 0..1 image 1"
    ] = SMALL,
) -> Iterator[Fault]:
    """Inputs far larger than one, a feature far above the others, or next to nothing at all."""
    for name, scale in _entering(seen):
        if scale.normalised:
            continue
        where = f" where it enters {scale.layer}" if scale.layer else ""
        numbers = f"mean {scale.mean:.3g}, standard deviation {scale.deviation:.3g}"
        if scale.whole > large or scale.largest > large * max(1.0, scale.typical):
            which = (
                f"{max(scale.large, 1)} of {scale.features} features"
                if scale.features > 1
                else "its values"
            )
            message = (
                f"{name}: {which} lie far beyond unit scale{where}: root mean square up to "
                f"{scale.largest:.4g} ({numbers})"
            )
        elif 0 < scale.peak < small:
            message = (
                f"{name}: no value is larger than {scale.peak:.3g}{where} ({numbers}): "
                "scaled twice?"
            )
        else:
            continue
        yield Fault(
            message=message,
            subject=name,
            evidence={
                "seen": f"{numbers}, largest {scale.peak:.3g}",
                "expected": "spread of about 1",
                "largest": scale.largest,
                "peak": scale.peak,
                "features": scale.large,
            },
        )


def unscaled_columns(
    seen: Columns,
    *,
    large: Annotated[float, "root mean square of a column; as for batches"] = LARGE,
    small: Annotated[float, "largest absolute value; as for batches"] = SMALL,
) -> Iterator[Fault]:
    """A note on raw columns: nobody has scaled them yet, and the network may get them so."""
    if not seen.raw or not seen.training:
        return
    far = []
    for column in seen.columns:
        quantity = column.kind == "number" and not column.categories and not column.constant
        if column.role != "input" or not quantity or not column.low < column.high:
            continue
        peak = max(abs(column.low), abs(column.high))
        if math.hypot(column.mean, column.deviation) > large or peak < small:
            far.append(column.name)
    if far:
        named = ", ".join(far[:5]) + (", ..." if len(far) > 5 else "")
        yield Fault(
            message=f"{len(far)} numeric input columns are far from unit scale as they stand: "
            f"{named}; standardise them before the network gets them",
            subject=named,
            severity="note",
            evidence={"seen": f"{len(far)} columns in raw units", "expected": "spread of about 1"},
        )


INPUT_SCALES = Probe("measure input scales", "probe", (InputScales,), take_input_scales)

UNSCALED_INPUT = Check(
    name="unscaled-input",
    stage="data",
    severity="warning",
    moments=("dataset", "batch"),
    why="Weights are drawn for inputs of unit scale: raw pixels or raw units saturate the first "
    "layer, inputs scaled twice hardly reach it.",
    fix="x = (x - train_mean) / train_std  # images: image_processor(images), once",
    source="LeCun et al. 1998, Efficient BackProp; TheDeepChecker 2022",
    judges=(unscaled_input, unscaled_columns),
    unsure="Networks that were trained on raw pixels, and models that scale by a function after "
    "their first layer.",
    explains=(
        "initial-loss-unexpected",
        "output-bias-unset",
        "dead-unit",
        "exploding-gradient",
        "vanishing-gradient",
        "loss-not-decreasing",
        "loss-spike",
        "loss-diverged",
        "clipping-dominates",
        "one-batch-not-overfit",
        "update-too-small",
        "update-too-large",
        "input-ignored",
        "hockey-stick",
    ),
)
