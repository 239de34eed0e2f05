"""Changes of images: float tensors (rows, 1 or 3 channels, height, width) in a collated batch.

All but `Flip` leave most pictures what they are; a mirrored digit, letter or road sign is another
one, so it is made only where it is asked for. Strengths are shares of the side or of the pixels'
own spread, so that they mean the same before and after normalisation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hf_recipe.data.preview import is_image
from hf_recipe.regularize.augment import Values, need, per_row_labels, uniform
from hf_recipe.regularize.augment_rows import mixed_labels

Tensor = torch.Tensor


class _ImageChange:
    """Applies `images` to every image tensor of a batch."""

    moves = False  # whether places change, so that labels inside the picture would no longer fit

    def __call__(self, batch: Values, draw: torch.Generator) -> Values:
        if self.moves:
            per_row_labels(batch, type(self).__name__)
        return {
            name: self.images(value, draw)
            if isinstance(value, Tensor) and is_image(value)
            else value
            for name, value in batch.items()
        }

    def images(self, pixels: Tensor, draw: torch.Generator) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Move(_ImageChange):
    """Shifts, turns and zooms each image.

    The defaults are what 8 x 8 digits bear: at twice these their validation loss rises again.

    Args:
        shift: largest, as a share of the side.
        turn: largest, in degrees.
        zoom: largest change of size, as a share; it also crops.
    """

    shift: float = 0.0375
    turn: float = 5.0
    zoom: float = 0.05
    moves = True

    def __post_init__(self) -> None:
        need(
            0 <= self.shift < 1 and 0 <= self.zoom < 1 and 0 <= self.turn <= 180,
            f"shift and zoom are shares in 0..1, turn is in degrees; got {self}",
        )

    def images(self, pixels: Tensor, draw: torch.Generator) -> Tensor:
        count = len(pixels)
        angle = uniform(draw, count) * math.radians(self.turn)
        size = 1 + uniform(draw, count) * self.zoom
        place = uniform(draw, count, 2) * 2 * self.shift  # the grid's side is 2
        return _sampled(pixels, size, angle, place)


@dataclass(frozen=True)
class Crop(_ImageChange):
    """Cuts out a random part of each image and stretches it back to the whole side.

    Args:
        least: smallest side of the part, as a share of the whole.
    """

    least: float = 0.8
    moves = True

    def __post_init__(self) -> None:
        need(0 < self.least <= 1, f"least is a share in 0..1; got {self.least}")

    def images(self, pixels: Tensor, draw: torch.Generator) -> Tensor:
        count = len(pixels)
        size = uniform(draw, count, low=self.least, high=1.0)
        place = uniform(draw, count, 2) * (1 - size)[:, None]
        return _sampled(pixels, size, torch.zeros(count), place)


def _sampled(pixels: Tensor, size: Tensor, angle: Tensor, place: Tensor) -> Tensor:
    """Each image read at an affine grid; beyond the border the border goes on."""
    grid_of = torch.zeros(len(pixels), 2, 3)
    grid_of[:, 0, 0] = grid_of[:, 1, 1] = size * angle.cos()
    grid_of[:, 1, 0] = size * angle.sin()
    grid_of[:, 0, 1] = -grid_of[:, 1, 0]
    grid_of[:, :, 2] = place
    grid = F.affine_grid(grid_of.to(pixels), list(pixels.shape), align_corners=False)
    moved: Tensor = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    return moved


@dataclass(frozen=True)
class Flip(_ImageChange):
    """Mirrors half of the images left to right. Only where a mirrored row keeps its label."""

    share: float = 0.5
    moves = True

    def __post_init__(self) -> None:
        need(0 <= self.share <= 1, f"share must be in 0..1; got {self.share}")

    def images(self, pixels: Tensor, draw: torch.Generator) -> Tensor:
        chosen = (torch.rand(len(pixels), generator=draw) < self.share).to(pixels.device)
        return torch.where(chosen[:, None, None, None], pixels.flip(-1), pixels)


@dataclass(frozen=True)
class Cutout(_ImageChange):
    """Sets a random square of each image to that image's mean (DeVries and Taylor 2017).

    Args:
        side: of the square, as a share of the image's side.
    """

    side: float = 0.25

    def __post_init__(self) -> None:
        need(0 < self.side < 1, f"side is a share in 0..1; got {self.side}")

    def images(self, pixels: Tensor, draw: torch.Generator) -> Tensor:
        inside = _squares(pixels, draw, torch.full((len(pixels),), self.side))
        return torch.where(inside, pixels.mean((1, 2, 3), keepdim=True), pixels)


def _squares(pixels: Tensor, draw: torch.Generator, side: Tensor) -> Tensor:
    """A random rectangle in each image: (rows, 1, height, width), True inside; whole pixels."""
    count, _, height, width = pixels.shape
    inside = torch.ones(count, 1, height, width, dtype=torch.bool)
    for axis, size in ((2, height), (3, width)):
        length = (side * size).round().clamp(0, size)
        start = (torch.rand(count, generator=draw) * (size - length + 1)).floor()
        place = torch.arange(size)[None]
        hit = (place >= start[:, None]) & (place < (start + length)[:, None])
        inside &= hit[:, None, :, None] if axis == 2 else hit[:, None, None, :]
    return inside.to(pixels.device)


@dataclass(frozen=True)
class Noise(_ImageChange):
    """Adds normal noise.

    Args:
        strength: its standard deviation, as a share of the batch's own.
    """

    strength: float = 0.1

    def __post_init__(self) -> None:
        need(self.strength >= 0, f"strength must not be negative; got {self.strength}")

    def images(self, pixels: Tensor, draw: torch.Generator) -> Tensor:
        noise = torch.randn(pixels.shape, generator=draw).to(pixels)
        return pixels + self.strength * pixels.std() * noise


@dataclass(frozen=True)
class Brightness(_ImageChange):
    """Lifts or lowers each image, and stretches or flattens it around its mean.

    Args:
        strength: largest lift, as a share of the batch's spread, and largest stretch.
    """

    strength: float = 0.2

    def __post_init__(self) -> None:
        need(0 <= self.strength < 1, f"strength must be in 0..1; got {self.strength}")

    def images(self, pixels: Tensor, draw: torch.Generator) -> Tensor:
        lift, stretch = (
            (uniform(draw, len(pixels), 1, 1, 1) * self.strength).to(pixels) for _ in range(2)
        )
        mean = pixels.mean((1, 2, 3), keepdim=True)
        return mean + (pixels - mean) * (1 + stretch) + lift * pixels.std()


@dataclass(frozen=True)
class CutMix:
    """Puts a rectangle of another image of the batch into each (Yun et al. 2019).

    The label becomes that of the one or the other, drawn by their areas: the expected loss is
    that of labels mixed in the same shares, and every head takes it.

    Args:
        alpha: of the Beta distribution that areas are drawn from; 1: uniform.
        share: of batches that are changed.
    """

    alpha: float = 1.0
    share: float = 1.0

    def __post_init__(self) -> None:
        need(self.alpha > 0 and 0 <= self.share <= 1, f"alpha > 0 and share in 0..1; got {self}")

    def __call__(self, batch: Values, draw: torch.Generator) -> Values:
        from hf_recipe.regularize.augment_rows import beta

        images = {k: v for k, v in batch.items() if isinstance(v, Tensor) and is_image(v)}
        found = per_row_labels(batch, "CutMix")
        if not images or bool(torch.rand((), generator=draw) >= self.share):
            return batch
        count = len(next(iter(images.values())))
        order = torch.randperm(count, generator=draw)
        side = (1 - beta(self.alpha, self.alpha, count, draw)).sqrt()
        changed, own = dict(batch), torch.ones(count)
        for name, pixels in images.items():
            inside = _squares(pixels, draw, side)
            changed[name] = torch.where(inside, pixels[order], pixels)
            own = 1 - inside.float().mean((1, 2, 3)).cpu()
        if found is not None:
            changed[found[0]] = mixed_labels(found[1], order, own, draw)
        return changed
