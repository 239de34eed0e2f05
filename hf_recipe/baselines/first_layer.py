"""The recipe's line "visualise first-layer weights": before and after training.

"Nice smooth filters are a sign of a well-trained network; noisy ones of one that was not trained
long enough, or of too little regularisation" (Stanford CS231n; Tuning Playbook). The first layer
that the inputs meet is found, a few of its filters are remembered before step 1 and drawn beside
the ones after; filters that are dead (almost zero beside the others), saturated (far larger than
the others) or noisy (no smoother than when they were drawn, though pictures are) are named. There
is no alarm: what filters should look like depends on the data.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hf_recipe.core.exhibit import Answer, Cell, Curve, Exhibit, Line, Picture, Table
from hf_recipe.instruments.heads import bare

FILTERS = 64  # drawn and compared
NUMBERS = 1 << 22  # of a table of embeddings that is looked at: every n-th row beyond
TILE = 64  # pixels of a drawn filter's side, at least
DEAD, SATURATED = 0.05, 8.0  # of the median norm: fresh layers lie within 0.6 and 1.6 of it
SMOOTH_SIDE = 4  # a filter smaller than this has no smoothness to speak of
NOISY = 0.1  # correlation of neighbours: independent draws have 0 +- 1 / sqrt(pairs)

Images = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


@dataclass(frozen=True)
class FirstLayer:
    """The first layer's weights at one moment.

    Attributes:
        name: its dotted name in the model.
        kind: "filters" (out, channels, height, width), "weights" (out, in) or "embeddings".
        weights: the first filters; of embeddings, evenly spaced rows.
        norms: of every filter, or of the rows looked at.
        rows: which rows of a table of embeddings.
    """

    name: str
    kind: str
    weights: torch.Tensor
    norms: torch.Tensor
    rows: tuple[int, ...] = ()


@dataclass
class FirstLayerAlbum:
    """Remembers the first layer before training; draws it beside the one after."""

    before: FirstLayer | None = None
    steps: int = field(default=0)

    def begin(self, model: nn.Module) -> None:
        """A run begins on fresh or loaded weights."""
        self.before = first_layer(model)

    def exhibits(self, model: nn.Module) -> list[Exhibit | Answer]:
        """What to draw at the end of training; nothing where no layer was found."""
        after = first_layer(model)
        if after is None:
            return []
        before = self.before if self.before and self.before.name == after.name else None
        drawn: list[Exhibit | Answer] = [*_drawn(before, after), answer(before, after)]
        return drawn


def first_layer(model: nn.Module) -> FirstLayer | None:
    """The layer that the inputs meet first; None where there is none, or it is sharded."""
    body = bare(model)
    embeddings = getattr(body, "get_input_embeddings", None)
    if callable(embeddings):
        try:
            table = embeddings()
        except NotImplementedError:  # a model of transformers that embeds no tokens
            table = None
        if isinstance(table, nn.Embedding):
            return _taken(model, table, "embeddings")
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Embedding)
    for module in body.modules():
        if isinstance(module, kinds):
            kind = "weights" if isinstance(module, nn.Linear) else "filters"
            return _taken(model, module, "embeddings" if isinstance(module, nn.Embedding) else kind)
    return None


def _taken(model: nn.Module, module: nn.Module, kind: str) -> FirstLayer | None:
    weight = module.weight
    if not isinstance(weight, torch.Tensor) or isinstance(weight, DTensor) or weight.ndim < 2:
        return None
    name = next((n for n, m in model.named_modules() if m is module), "")
    weight = weight.detach()
    stride = max(1, -(-weight.numel() // NUMBERS))
    looked_at = weight[::stride].float().cpu()
    norms = looked_at.flatten(1).norm(dim=1)
    chosen = range(min(FILTERS, len(looked_at)))
    rows = tuple(range(0, len(weight), stride)) if kind == "embeddings" else ()
    kept = looked_at if kind == "embeddings" else looked_at[list(chosen)]
    return FirstLayer(name, kind, kept.clone(), norms, rows)


# ---------------------------------------------------------------- what is wrong with a filter


def odd_filters(layer: FirstLayer) -> dict[str, list[int]]:
    """Filters that are "dead", "saturated" or "noisy", by number.

    Noise is told for pictures' filters of side 4 and more: of a filter whose neighbours are not
    alike, while training has moved it.
    """
    norms, found = layer.norms, {"dead": [], "saturated": [], "noisy": []}  # type: ignore[var-annotated]
    finite = norms[norms.isfinite()]
    middle = float(finite.median()) if len(finite) else math.nan
    numbers = layer.rows or range(len(norms))
    for number, norm in zip(numbers, norms.tolist(), strict=True):
        if not math.isfinite(norm) or norm > SATURATED * middle:
            found["saturated"].append(int(number))
        elif norm <= DEAD * middle:
            found["dead"].append(int(number))
    odd = {*found["dead"], *found["saturated"]}
    for number, smooth in enumerate(smoothness(layer)):
        if smooth < NOISY and number not in odd:
            found["noisy"].append(number)
    return found


def smoothness(layer: FirstLayer) -> list[float]:
    """Correlation of neighbouring weights in each drawn filter; empty where it says nothing."""
    weights = layer.weights
    if layer.kind != "filters" or weights.ndim != 4 or min(weights.shape[-2:]) < SMOOTH_SIDE:
        return []
    centred = weights - weights.mean((-2, -1), keepdim=True)
    power = centred.square().mean((1, 2, 3)).clamp(min=1e-30)
    down = (centred[..., 1:, :] * centred[..., :-1, :]).mean((1, 2, 3))
    across = (centred[..., 1:] * centred[..., :-1]).mean((1, 2, 3))
    return [float(v) for v in (down + across) / (2 * power)]


def answer(before: FirstLayer | None, after: FirstLayer) -> Answer:
    """Which filters are odd, in words."""
    odd = odd_filters(after)
    smooth = smoothness(after)
    if before is not None and smooth:
        start = smoothness(before)
        smoother = sum(smooth) / len(smooth) - sum(start) / len(start)
        # Where none got smoother the pictures, not the filters, may be rough.
        odd["noisy"] = odd["noisy"] if smoother > NOISY else []
    what = "rows" if after.kind == "embeddings" else "filters"
    parts = [f"{len(v)} {kind} ({_numbers(v)})" for kind, v in odd.items() if v]
    count = len(after.norms)
    text = f"{count} {what} of {after.name}: " + ("; ".join(parts) if parts else "none is odd")
    if before is not None and before.weights.shape == after.weights.shape:
        moved = float((after.weights - before.weights).norm() / before.weights.norm().clamp(1e-30))
        text += f"; training moved them by {moved:.2g} of their size"
    evidence = {kind: numbers[:FILTERS] for kind, numbers in odd.items()}
    return Answer("What did the first layer learn?", "baselines", text, evidence)


def _numbers(numbers: Sequence[int]) -> str:
    return ", ".join(str(n) for n in numbers[:8]) + (", ..." if len(numbers) > 8 else "")


# ---------------------------------------------------------------- drawing


def _drawn(before: FirstLayer | None, after: FirstLayer) -> list[Exhibit]:
    layers = [("before", before)] if before is not None else []
    named = [*layers, ("after", after)]
    if after.kind == "embeddings":
        return _embeddings(named)
    pngs, labels = [], []
    for moment, layer in named:
        assert layer is not None
        pngs.append(sheet(layer))
        labels.append(f"{moment} training")
    title = f"First layer: {after.name}"
    caption = f"{len(after.weights)} of {len(after.norms)} filters, each on its own scale."
    return [Picture(title, "baselines", tuple(pngs), tuple(labels), caption, private=False)]


def sheet(layer: FirstLayer) -> str:
    """The drawn filters side by side, a PNG in base64; colours where there are three channels."""
    from PIL import Image

    tiles = [_tile(weights) for weights in layer.weights]
    columns = math.ceil(math.sqrt(len(tiles)))
    height, width = tiles[0].shape[:2]
    rows = math.ceil(len(tiles) / columns)
    page = np.full((rows * (height + 1), columns * (width + 1), 3), 255, dtype=np.uint8)
    for number, tile in enumerate(tiles):
        top, left = divmod(number, columns)
        top, left = top * (height + 1), left * (width + 1)
        page[top : top + height, left : left + width] = tile
    buffer = io.BytesIO()
    Image.fromarray(page).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _tile(weights: torch.Tensor) -> Images:
    """One filter as a small picture (height, width, 3) of bytes."""
    plane = weights.nan_to_num()
    if plane.ndim == 3 and plane.shape[0] == 3:
        plane = plane.movedim(0, -1)
    elif plane.ndim == 3:
        plane = plane.mean(0)[..., None]
    elif plane.ndim == 1 and math.isqrt(plane.numel()) ** 2 == plane.numel() >= 16:
        side = math.isqrt(plane.numel())
        plane = plane.reshape(side, side, 1)  # flattened square pictures
    else:
        plane = plane.reshape(1, -1, 1)[:, :256]
    low, high = plane.min(), plane.max()
    scaled = (plane - low) / (high - low) if high > low else torch.full_like(plane, 0.5)
    pixels = (scaled * 255).to(torch.uint8).expand(*scaled.shape[:2], 3).numpy()
    times = max(1, TILE // max(pixels.shape[:2]) // 2)
    grown: Images = pixels.repeat(times, 0).repeat(times, 1)
    return grown


def _embeddings(named: Sequence[tuple[str, FirstLayer]]) -> list[Exhibit]:
    """Sorted norms of the rows, and the shares of variance of their principal directions."""
    norms, spectra = [], []
    for moment, layer in named:
        ordered = layer.norms.sort(descending=True).values
        stride = max(1, len(ordered) // 256)
        kept = ordered[::stride]
        norms.append(Line(moment, tuple(map(float, range(0, len(ordered), stride))), _floats(kept)))
        spectra.append(principal_shares(layer.weights))
    name = named[-1][1].name
    rows: list[tuple[Cell, ...]] = [
        (place + 1, *(shares[place] if place < len(shares) else None for shares in spectra))
        for place in range(min(10, max(len(s) for s in spectra)))
    ]
    columns = ("direction", *(moment for moment, _ in named))
    return [
        Curve(
            f"First layer: norms of {name}", "baselines", "row, by its norm", "norm", tuple(norms)
        ),
        Table(
            f"First layer: principal directions of {name}",
            "baselines",
            columns,
            tuple(rows),
            "Share of the rows' variance; after training a few directions carry much of it.",
        ),
    ]


def principal_shares(weights: torch.Tensor, most: int = 2048) -> list[float]:
    """Share of variance along each principal direction, largest first.

    Args:
        weights: (rows, width).
        most: rows that are used, evenly spaced.
    """
    sample = weights[:: max(1, len(weights) // most)].double().nan_to_num()
    centred = sample - sample.mean(0)
    values = torch.linalg.eigvalsh(centred.T @ centred).flip(0).clamp(min=0)
    total = float(values.sum())
    return [float(v) / total for v in values] if total > 0 else []


def _floats(values: torch.Tensor) -> tuple[float, ...]:
    return tuple(float(v) for v in values)
