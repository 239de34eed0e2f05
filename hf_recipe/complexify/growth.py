"""Grow the input slowly, and verify that each growth helps.

"Plug signals in one by one, and every time make sure that you get the boost you expect." So an
input begins small (pictures of a lower resolution, shorter texts, fewer columns) and grows by one
change at a time; each is kept only where a paired test on held-out rows sees its gain.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import TrainerCallback

from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.exhibit import Ladder, Rung
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.compare import Gain, Outcome, paired_gain

SEQUENCES = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def coarser(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Pictures (rows, channels, height, width) with the detail of `side` pixels, size as it was.

    The model needs no change: what is dropped is what the finer pixels say.
    """
    height, width = pixels.shape[-2:]
    if side >= max(height, width):
        return pixels
    small = F.adaptive_avg_pool2d(pixels, (min(side, height), min(side, width)))
    return F.interpolate(small, (height, width), mode="bilinear", align_corners=False)


def shorter(batch: Mapping[str, Any], length: int, labelled: bool) -> dict[str, Any]:
    """A collated batch cut to its first `length` tokens; labels too where each token has one."""
    made = dict(batch)
    for name in (*SEQUENCES, *(("labels",) if labelled else ())):
        value = made.get(name)
        if isinstance(value, torch.Tensor) and value.ndim >= 2:
            made[name] = value[:, :length]
    return made


def fewer(features: torch.Tensor, columns: Sequence[int]) -> torch.Tensor:
    """Standardised numbers (rows, columns) with all but `columns` at their mean, zero."""
    made = torch.zeros_like(features)
    made[:, list(columns)] = features[:, list(columns)]
    return made


class GrowInput(TrainerCallback):  # type: ignore[misc]
    """Lets the input grow while training: low resolution or short texts first.

    Args:
        sizes: the size from each share of the steps on, e.g. ``{0.0: 16, 0.5: 32}``: pixels of a
            side (batches with ``pixel_values``) or tokens (batches with ``input_ids``). From the
            last share on, give the full size.

    With ``dataloader_num_workers`` a change comes with the next epoch's workers. Evaluation is
    left at full size.

    Raises:
        ValueError: no sizes, shares outside of 0..1, or sizes that shrink.
    """

    def __init__(self, sizes: Mapping[float, int]) -> None:
        pairs = sorted(sizes.items())
        if not pairs or pairs[0][0] != 0 or pairs[-1][0] > 1:
            raise ValueError(f"sizes need shares of the steps, 0 among them; got {dict(sizes)}")
        if any(b[1] < a[1] for a, b in itertools.pairwise(pairs)) or pairs[0][1] < 1:
            raise ValueError(f"sizes must be positive and must not shrink; got {dict(sizes)}")
        self.sizes = pairs
        self.size = pairs[0][1]
        self._loader: Any = None
        self._collate: Any = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        loader = getattr(train_dataloader, "base_dataloader", train_dataloader)
        self._loader, self._collate = loader, loader.collate_fn
        loader.collate_fn = self._grown
        self._follow(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._follow(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._loader is not None:
            self._loader.collate_fn, self._loader = self._collate, None

    def _follow(self, state: Any) -> None:
        done = state.global_step / max(1, state.max_steps)
        self.size = [size for share, size in self.sizes if share <= done][-1]

    def _grown(self, rows: Any) -> Any:
        batch = self._collate(rows)
        if "pixel_values" in batch:
            return {**batch, "pixel_values": coarser(batch["pixel_values"], self.size)}
        if "input_ids" in batch:
            labels = batch.get("labels")
            each = isinstance(labels, torch.Tensor) and labels.shape == batch["input_ids"].shape
            return shorter(batch, self.size, each)
        raise ValueError(f"GrowInput needs pixel_values or input_ids; got {', '.join(batch)}")


# -------------------------------------------------------------------- one growth at a time


@dataclass(frozen=True)
class Growth(Measurement):
    """One growth of the input, judged on the same held-out rows.

    Attributes:
        what: of the input.
        before, after: its size.
        gain, low, high: paired fall of the held-out loss, with its 95 % interval.
        seeds: of each side.
        cost: seconds of training after over before.
    """

    what: str
    before: str
    after: str
    gain: float
    low: float
    high: float
    seeds: int
    cost: float


Train = Callable[[Any], Sequence[Outcome]]
Judge = Callable[[Sequence[Outcome], Sequence[Outcome]], Gain]


def _paired(before: Sequence[Outcome], after: Sequence[Outcome]) -> Gain:
    return paired_gain([o.row_losses for o in before], [o.row_losses for o in after])


def climb(
    train: Train,
    sizes: Sequence[tuple[str, Any]],
    *,
    what: str = "input",
    gain: Judge = _paired,
    metric_name: str = "loss",
) -> tuple[Any, Ladder, list[Growth]]:
    """Grow through `sizes`, each compared with the largest that was kept.

    Args:
        train: a size -> outcomes, one per seed, on the same held-out rows.
        sizes: (name, size), smallest first.
        what: is grown.
        gain: the paired comparison; default: over rows and these seeds.

    Returns:
        The size that stands, the ladder, and what each growth gave. With one seed nothing is
        told apart but by rows, as the intervals say.
    """
    (name, standing), *further = sizes
    outcomes = train(standing)
    rungs = [Rung(f"{what} {name}", _loss(outcomes), metric=outcomes[0].metric, kept=True)]
    grown = []
    for larger_name, larger in further:
        tried = train(larger)
        made = gain(outcomes, tried)
        costs = [max(1e-9, sum(o.cost for o in group)) for group in (outcomes, tried)]
        finite = abs(made.mean) < float("inf")
        rungs.append(
            Rung(
                f"{what} {larger_name}",
                _loss(tried),
                made.mean if finite else None,
                made.low if finite else None,
                made.high if finite else None,
                tried[0].metric,
                costs[1],
                made.verdict is True,
                "" if made.verdict is True else "no gain that the paired test can see",
            )
        )
        grown.append(
            Growth(
                what=what,
                before=name,
                after=larger_name,
                gain=made.mean,
                low=made.low,
                high=made.high,
                seeds=made.seeds,
                cost=costs[1] / costs[0],
            )
        )
        if made.verdict is True:
            name, standing, outcomes = larger_name, larger, tried
    title = f"Growing the input: {what}"
    return standing, Ladder(title, "complexify", tuple(rungs), metric_name), grown


def _loss(outcomes: Sequence[Outcome]) -> float:
    return sum(o.loss for o in outcomes) / len(outcomes)


def unhelpful(growth: Growth) -> Iterator[Fault]:
    """A larger input whose gain the paired test does not see."""
    if growth.low > 0:
        return
    interval = f"{growth.gain:+.4f} [{growth.low:+.4f}, {growth.high:+.4f}]"
    yield Fault(
        f"{growth.what} {growth.after} instead of {growth.before} changes the held-out loss by "
        f"{interval}, at {growth.cost:.1f} times the cost: {growth.before} is kept",
        subject=f"{growth.what} {growth.after}",
        evidence={
            "seen": interval,
            "expected": "a gain whose interval excludes 0",
            "cost": growth.cost,
            "seeds": growth.seeds,
        },
    )


def take(subject: object) -> Iterator[Growth]:
    """Only trainings tell."""
    raise Skip("it takes trainings: hf-recipe run")


GROW = Probe("grow the input", "end", (Growth,), take)

GROWTH_UNHELPFUL = Check(
    name="growth-unhelpful",
    stage="complexify",
    severity="note",
    moments=("end",),
    why="Input that brings no gain costs time and memory at every step from here on, and hides "
    "which signal helped.",
    fix="GrowInput({0.0: small})  # or leave the signal out",
    source="Karpathy, A Recipe for Training Neural Networks (2019)",
    judges=(unhelpful,),
    call="hf-recipe run",
    unsure="Trained briefly: a larger input may need more steps before it pays.",
)
