"""Which network? "Don't be a hero": one out of a paper, scaled down to the data.

Each task has a ladder of published configs, from the smallest up. Where one begins on it follows
from the number of training rows; ``--architecture NAME`` begins elsewhere. The next rung is tried
briefly: if it still lowers the training loss, capacity is short.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.exhibit import Table
from hf_recipe.core.finding import Fault

RUNGS = ("student", "base", "large", "larger")
ROWS = 10_000  # up to which the ladder begins at its foot; every tenfold is a rung more
VIT = "Dosovitskiy et al. 2021 (arXiv:2010.11929), its 4-fold MLP kept"
BERT = "Turc et al. 2019 (arXiv:1908.08962)"
GPT2 = "Radford et al. 2019 (GPT-2), its head width of 64 kept"
T5 = "Raffel et al. 2020 (arXiv:1910.10683)"
T5_SCALED = "Tay et al. 2021 (arXiv:2109.10686)"
SEGFORMER = "Xie et al. 2021 (arXiv:2105.15203), its first two stages"
MLP = "Gorishniy et al. 2021 (arXiv:2106.11959)"


@dataclass(frozen=True)
class Design:
    """One rung: a published network, or one scaled down from it.

    Attributes:
        name: what it is called there, or here where it is smaller than any of the paper's.
        paper: where it stands.
        width, depth, heads: of the hidden layers.
    """

    name: str
    paper: str
    width: int
    depth: int
    heads: int

    @property
    def blocks(self) -> int:
        """Numbers in the hidden layers, without embeddings and head: transformer blocks."""
        return 12 * self.depth * self.width**2


LADDERS: dict[str, tuple[Design, ...]] = {
    "image": (
        Design("vit-32x2", VIT, 32, 2, 4),
        Design("vit-64x2", VIT, 64, 2, 4),
        Design("vit-96x2", VIT, 96, 2, 4),
        Design("vit-128x3", VIT, 128, 3, 4),
        Design("vit-tiny", "Touvron et al. 2021 (arXiv:2012.12877)", 192, 12, 3),
        Design("vit-small", "Touvron et al. 2021 (arXiv:2012.12877)", 384, 12, 6),
        Design("vit-base", VIT, 768, 12, 12),
    ),
    "text": (
        Design("bert-64x1", BERT, 64, 1, 2),
        Design("bert-tiny", BERT, 128, 2, 2),
        Design("bert-128x4", BERT, 128, 4, 2),
        Design("bert-mini", BERT, 256, 4, 4),
        Design("bert-small", BERT, 512, 4, 8),
        Design("bert-medium", BERT, 512, 8, 8),
        Design("bert-base", "Devlin et al. 2019 (arXiv:1810.04805)", 768, 12, 12),
    ),
    "causal": (
        Design("gpt2-64x1", GPT2, 64, 1, 1),
        Design("gpt2-128x2", GPT2, 128, 2, 2),
        Design("gpt2-128x4", GPT2, 128, 4, 2),
        Design("gpt2-256x4", GPT2, 256, 4, 4),
        Design("gpt2-384x6", GPT2, 384, 6, 6),
        Design("gpt2-512x8", GPT2, 512, 8, 8),
        Design("gpt2", GPT2, 768, 12, 12),
    ),
    "seq2seq": (
        Design("t5-64x1", T5, 64, 1, 2),
        Design("t5-128x2", T5, 128, 2, 4),
        Design("t5-128x4", T5, 128, 4, 4),
        Design("t5-tiny", T5_SCALED, 256, 4, 4),
        Design("t5-mini", T5_SCALED, 384, 4, 8),
        Design("t5-small", T5, 512, 6, 8),
        Design("t5-base", T5, 768, 12, 12),
    ),
    "segmentation": (
        Design("segformer-16x1", SEGFORMER, 16, 1, 1),
        Design("segformer-32x1", SEGFORMER, 32, 1, 1),
        Design("segformer-32x2", SEGFORMER, 32, 2, 1),
        Design("segformer-64x2", SEGFORMER, 64, 2, 2),
        Design("segformer-64x3", SEGFORMER, 64, 3, 2),
        Design("segformer-128x3", SEGFORMER, 128, 3, 2),
    ),
    "numbers": (
        Design("mlp-16x1", MLP, 16, 1, 1),
        Design("mlp-64x1", MLP, 64, 1, 1),
        Design("mlp-256x2", MLP, 256, 2, 1),
        Design("mlp-512x3", MLP, 512, 3, 1),
        Design("mlp-512x8", MLP, 512, 8, 1),
        Design("mlp-1024x8", MLP, 1024, 8, 1),
    ),
}


def ladder(kind: str, rows: int, begin: str | None = None) -> dict[str, Design]:
    """The rungs "student", "base", "large" and "larger" for a data set.

    Args:
        kind: a name in `LADDERS`.
        rows: training rows.
        begin: name of the design that is "base"; None: by the number of rows.

    Raises:
        ValueError: a design that is not on this ladder.
    """
    designs = LADDERS[kind]
    names = [design.name for design in designs]
    if begin is None:
        base = 1
        while rows >= ROWS * 10**base and base < len(designs) - 3:
            base += 1
    elif begin in names:
        base = names.index(begin)
    else:
        raise ValueError(f"no {kind} architecture {begin!r}; there are {', '.join(names)}")
    at = (max(0, base - 1), base, base + 1, base + 2)
    return {rung: designs[min(i, len(designs) - 1)] for rung, i in zip(RUNGS, at, strict=True)}


def table(rungs: dict[str, Design], parameters: dict[str, int]) -> Table:
    """The ladder as the report shows it; `parameters` by rung, where they were counted."""
    rows = tuple(
        (rung, d.name, d.width, d.depth, d.heads, parameters.get(rung), d.paper)
        for rung, d in rungs.items()
    )
    columns = ("rung", "name", "width", "depth", "heads", "parameters", "paper")
    return Table("Architectures, out of papers", "complexify", columns, rows)


# -------------------------------------------------------------------- is the model large enough?


@dataclass(frozen=True)
class NextRung(Measurement):
    """The model, and the next one of its ladder, trained briefly and alike.

    Attributes:
        name, next_name: the two designs; parameters, next_parameters: their sizes.
        loss: training loss of the smaller one, in evaluation mode.
        gain, low, high: paired fall of it under the larger one, with its 95 % interval.
        seeds: of each.
    """

    name: str
    next_name: str
    parameters: int
    next_parameters: int
    loss: float
    gain: float
    low: float
    high: float
    seeds: int


def capacity_short(
    rung: NextRung,
    *,
    share: Annotated[float, "of the training loss: seeds alone differ by some percent"] = 0.05,
) -> Iterator[Fault]:
    """The larger one fits the same rows better, in as many steps."""
    if not (rung.low > 0 and rung.gain >= share * abs(rung.loss)):
        return
    yield Fault(
        f"{rung.next_name} ({rung.next_parameters:,} parameters) lowers the training loss of "
        f"{rung.name} ({rung.parameters:,}) by {rung.gain:.4f} [{rung.low:.4f}, {rung.high:.4f}] "
        f"from {rung.loss:.4f} in as many steps",
        subject=rung.name,
        evidence={
            "seen": f"{rung.loss:.4f} with {rung.name}",
            "expected": f"{rung.loss - rung.gain:.4f} with {rung.next_name}",
            "gain": rung.gain,
            "low": rung.low,
        },
        fix=f"--architecture {rung.next_name}",
    )


def take(subject: object) -> Iterator[NextRung]:
    """Only a training tells."""
    raise Skip("it takes a training: hf-recipe run")


NEXT_RUNG = Probe("try the next rung", "end", (NextRung,), take)

CAPACITY_SHORT = Check(
    name="capacity-short",
    stage="complexify",
    severity="note",
    moments=("end",),
    why="First a model that can overfit: one that a larger model outdoes on its own training rows "
    "has not reached what the data hold.",
    fix="--architecture bert-small",
    source="Karpathy, A Recipe for Training Neural Networks (2019)",
    judges=(capacity_short,),
    call="hf-recipe run",
    unsure="Trained briefly: a larger model often falls faster at first, and ends where both do.",
)
