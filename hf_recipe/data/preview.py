"""A batch as the network gets it: after the collator, nothing before it.

Karpathy: the only place to look is right before ``y_hat = model(x)``. Tokens are decoded back,
with what is masked and what is supervised; images are un-normalised; every tensor's range is
shown as it stands.
"""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hf_recipe.core.exhibit import Cell, Exhibit, Picture, Table
from hf_recipe.instruments.batches import Batch
from hf_recipe.instruments.subject import Subject

IGNORED = -100
LONGEST = 2_000  # characters of a cell


def preview(subject: Subject, split: str = "train", *, rows: int = 8) -> tuple[Exhibit, ...]:
    """The first exhibits of the data: one batch of `rows` evenly spaced rows.

    Call it quietly: the collator may draw random numbers. Raises Skip where rows cannot be read
    without disturbing the run.
    """
    return preview_batch(subject.batch(split, size=rows), subject.processing_class, split)


def preview_batch(
    batch: Batch, processing_class: Any = None, split: str = "train", *, rows: int = 8
) -> tuple[Exhibit, ...]:
    """`batch` as tables and pictures; those that show the user's rows are private."""
    exhibits: list[Exhibit] = [tensor_table(batch, split)]
    ids = batch.inputs.get("input_ids")
    if isinstance(ids, torch.Tensor) and ids.ndim == 2:
        exhibits += [
            text_table(batch, processing_class, split, rows),
            token_table(batch, processing_class, split),
        ]
    for name, value in batch.inputs.items():
        if isinstance(value, torch.Tensor) and is_image(value):
            exhibits.append(picture(batch, name, processing_class, split, rows))
        elif name not in ("labels", "input_ids", "attention_mask") and _is_numeric(value):
            exhibits.append(numeric_table(batch, name, split, rows))
    return tuple(exhibits)


def tensor_table(batch: Batch, split: str) -> Table:
    """Every tensor of the batch: shape, type and range, as the network gets it."""
    rows: list[tuple[Cell, ...]] = []
    for name, value in batch.inputs.items():
        if not isinstance(value, torch.Tensor):
            rows.append((name, type(value).__name__, "", None, None, None, None))
            continue
        real = value.detach().double() if value.numel() else torch.zeros(0)
        low, high, mean, spread = (
            (real.min(), real.max(), real.mean(), real.std(correction=0))
            if value.numel()
            else (math.nan,) * 4
        )
        shape = " x ".join(str(size) for size in value.shape)
        dtype = str(value.dtype).removeprefix("torch.")
        rows.append((name, dtype, shape, *(_cell(float(v)) for v in (low, high, mean, spread))))
    head = ("tensor", "type", "shape", "low", "high", "mean", "deviation")
    return Table(f"A batch of {split}, as the network gets it", "data", head, tuple(rows))


def text_table(batch: Batch, processing_class: Any, split: str, rows: int) -> Table:
    """One line per example: how long, how much attended and supervised, and both as text."""
    ids = batch.inputs["input_ids"].detach().cpu()
    mask = _like(batch.inputs.get("attention_mask"), ids, fill=1)
    labels = batch.inputs.get("labels")
    table = []
    for i in range(min(rows, len(ids))):
        attended = ids[i][mask[i] != 0]
        target: Any = ""
        supervised: int | None = None
        if isinstance(labels, torch.Tensor):
            one = labels[i].detach().cpu()
            if one.ndim == 1 and not one.is_floating_point():
                kept = one[one != IGNORED]
                supervised, target = len(kept), decoded(processing_class, kept.tolist())
            else:
                target = str(one.tolist())
        table.append((
            batch.rows[i] if batch.rows else i,
            len(attended),
            ids.shape[1] - len(attended),
            supervised,
            decoded(processing_class, attended.tolist()),
            target[:LONGEST],
        ))  # fmt: skip
    head = ("row", "tokens", "padding", "supervised", "input", "target")
    return Table(f"Examples of {split}, decoded", "data", head, tuple(table), private=True)


def token_table(batch: Batch, processing_class: Any, split: str, longest: int = 256) -> Table:
    """The batch's first example token by token: what is attended to, what is supervised."""
    ids = batch.inputs["input_ids"].detach().cpu()
    mask = _like(batch.inputs.get("attention_mask"), ids, fill=1)
    labels = batch.inputs.get("labels")
    aligned = (
        labels.detach().cpu()
        if isinstance(labels, torch.Tensor)
        and labels.shape == ids.shape
        and not labels.is_floating_point()
        else None
    )
    table = []
    for place, (token, seen) in enumerate(zip(ids[0].tolist(), mask[0].tolist(), strict=True)):
        label = None if aligned is None else int(aligned[0, place])
        supervised = label is not None and label != IGNORED
        table.append((
            place,
            token,
            decoded(processing_class, [token]),
            bool(seen),
            label if supervised else None,
        ))  # fmt: skip
        if place + 1 == longest:
            break
    head = ("position", "id", "token", "attended", "label")
    return Table(
        f"One example of {split}, token by token", "data", head, tuple(table), private=True
    )


def numeric_table(batch: Batch, name: str, split: str, rows: int, columns: int = 16) -> Table:
    """The first values of a numeric input, one line per example."""
    value = batch.inputs[name].detach().cpu().float().reshape(len(batch), -1)
    labels = batch.labels
    table = tuple(
        (
            batch.rows[i] if batch.rows else i,
            *(_cell(float(v)) for v in value[i, :columns]),
            str(labels[i].tolist())[:LONGEST] if isinstance(labels, torch.Tensor) else "",
        )
        for i in range(min(rows, len(value)))
    )
    head = ("row", *(str(i) for i in range(min(columns, value.shape[1]))), "target")
    return Table(f"{name} of {split}", "data", head, table, private=True)


def picture(batch: Batch, name: str, processing_class: Any, split: str, rows: int) -> Picture:
    """The images of a batch, un-normalised where the processor says how it normalised them."""
    pixels = batch.inputs[name].detach().cpu().float()[:rows]
    mean, std = (getattr(processing_class, key, None) for key in ("image_mean", "image_std"))
    low, high = float(pixels.min()), float(pixels.max())
    if mean is not None and std is not None and len(np.atleast_1d(mean)) == pixels.shape[1]:
        shape = (1, -1, 1, 1)
        pixels = pixels * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
        how = "un-normalised by the processor's mean and deviation"
    elif low >= 0 and high <= 1:
        how = "as they stand, in 0..1"
    else:
        pixels = (pixels - low) / max(high - low, 1e-12)
        how = "stretched from their own range to 0..1"
    labels = batch.labels
    texts = [
        str(labels[i].tolist()) if isinstance(labels, torch.Tensor) and labels.ndim else ""
        for i in range(len(pixels))
    ]
    caption = f"{how}; the network gets {low:.3g}..{high:.3g}"
    title = f"Images of {split}, as the network gets them"
    return Picture(title, "data", tuple(png(image) for image in pixels), tuple(texts), caption)


def is_image(value: torch.Tensor) -> bool:
    """Whether a tensor is a batch of images: (rows, 1 or 3 channels, height, width)."""
    return (
        value.ndim == 4
        and value.is_floating_point()
        and value.shape[1] in (1, 3)
        and min(value.shape[2:]) >= 4
    )


def png(image: torch.Tensor) -> str:
    """An image (channels, height, width) in 0..1 as a PNG in base64."""
    from PIL import Image

    scaled: npt.NDArray[np.uint8] = (
        (image.nan_to_num().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    )
    drawn = Image.fromarray(scaled[:, :, 0] if scaled.shape[2] == 1 else scaled)
    drawn.thumbnail((96, 96))
    file = io.BytesIO()
    drawn.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def decoded(processing_class: Any, ids: list[int]) -> str:
    """Token ids as text, at most 2,000 characters; as numbers where there is no tokenizer."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if tokenizer is None or not hasattr(tokenizer, "decode"):
        return " ".join(str(i) for i in ids)[:LONGEST]
    known = [i for i in ids if 0 <= i < len(tokenizer)]
    lost = len(ids) - len(known)
    text = str(tokenizer.decode(known, skip_special_tokens=False))[:LONGEST]
    return text + (f" [{lost} ids outside the vocabulary]" if lost else "")


def _like(mask: Any, ids: torch.Tensor, fill: int) -> torch.Tensor:
    if isinstance(mask, torch.Tensor) and mask.shape == ids.shape:
        return mask.detach().cpu()
    return torch.full_like(ids, fill)


def _is_numeric(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim in (2, 3)


def _cell(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None
