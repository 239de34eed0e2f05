"""The recipe's line "use backprop to chart dependencies", along a sequence.

A causal model whose outputs see later tokens reaches a loss that no text allows and is useless
when it generates. A batch whose padding reaches the outputs gives a row another answer for every
other row it is batched with. Neither stops the loss from falling; each is one gradient that must
be exactly 0: through a random projection of the outputs, in evaluation mode, next to the gradient
on what the outputs may depend on.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch

from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.exhibit import Matrix
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.heads import bare, read_head
from hf_recipe.instruments.padding import pad_positions
from hf_recipe.instruments.subject import Subject
from hf_recipe.instruments.trace import Leaf, Trace, few_rows, trace

PERMUTED = ("xlnet",)  # their language models are bidirectional by design
FUTURE_SEEN = "outputs depend on later tokens"  # key of a subject's cache


@dataclass(frozen=True)
class OrderDependence(Measurement):
    """How much outputs of a causal model depend on later tokens, by the largest gradient.

    Attributes:
        positions: of the sequences.
        own: gradient on the tokens up to the position that was looked at (the smallest).
        later: gradient on the tokens behind it (the largest).
        looked_at: positions that were looked at.
    """

    positions: int
    own: float
    later: float
    looked_at: tuple[int, ...]


@dataclass(frozen=True)
class PaddingDependence(Measurement):
    """How much outputs at real positions depend on padding, by the largest gradient.

    Attributes:
        real, padded: positions of each kind in the batch.
        own, padding: gradient on real positions, and on padding.
        mask: what reached the model: "absent", "all ones", "inverted", "right", "differs" from
            where the padding is, or "shaped" (not one number per token).
        takes_mask: whether the model's forward names an attention mask.
        library: whether the model's class is one of transformers' own.
        later: whether all padding stands behind the tokens of a causal model whose outputs were
            seen to depend on later positions: padding is then one of them.
    """

    real: int
    padded: int
    own: float
    padding: float
    mask: str
    takes_mask: bool
    library: bool
    later: bool = False


# ---------------------------------------------------------------- the probes


def measure_order(subject: Subject) -> Iterator[OrderDependence | Matrix]:
    """Two backward passes; each row is looked at from another position."""
    made, leaf = _sequences(subject)
    logits = made.logits
    assert logits is not None
    supervised = _supervised(subject, made)
    allowed = ~_padding(subject, made, leaf) & supervised
    if leaf.name != "input_ids":  # a decoder's: its ids are not in the batch
        allowed = supervised
    chosen: list[tuple[int, int]] = []
    for row, line in enumerate(allowed):
        places = line[:-1].nonzero()[:, 0].tolist()
        if len(places) > 1:
            chosen += [(row, places[(len(places) * k) // 3]) for k in (1, 2)]
    if not chosen:
        raise Skip("no row has two positions to look from")
    own, later, lines = [], [], []
    for turn in (0, 1):
        turns = chosen[turn::2]
        picked = torch.zeros_like(logits)
        for row, place in turns:
            picked[row, place] = torch.randn_like(picked[row, place])
        sizes = made.along(leaf, (logits * picked).sum())
        for row, place in turns:
            own.append(float(sizes[row, : place + 1].max()))
            later.append(float(sizes[row, place + 1 :].max()))
            lines.append((row, place, sizes[row]))
    places = tuple(sorted({place for _, place in chosen}))
    seen = OrderDependence(logits.shape[1], min(own), max(later), places)
    subject.cache[FUTURE_SEEN] = any(sees_the_future(seen))
    yield seen
    yield _chart(lines)


def _chart(lines: list[tuple[int, int, torch.Tensor]]) -> Matrix:
    lines = sorted(lines, key=lambda line: line[1])
    width = len(lines[0][2])
    bins = min(width, 64)
    edges = [round(i * width / bins) for i in range(bins + 1)]
    largest = max(max(float(sizes.max()) for _, _, sizes in lines), 1e-30)
    return Matrix(
        "Which position's output depends on which token",
        "baselines",
        tuple(f"output at {place} (row {row})" for row, place, _ in lines),
        tuple(f"token {edges[i]}" for i in range(bins)),
        tuple(
            tuple(float(sizes[edges[i] : edges[i + 1]].max()) / largest for i in range(bins))
            for _, _, sizes in lines
        ),
        "Largest gradient, relative to the largest of all: behind a causal model's own position "
        "it must be 0.",
    )


def measure_padding(subject: Subject) -> Iterator[PaddingDependence]:
    """One backward pass, from the outputs at real positions of every row."""
    batch = few_rows(subject)
    given = batch.inputs.get("attention_mask")
    mask = given if isinstance(given, torch.Tensor) else None
    pads = pad_positions(subject, batch.inputs, mask)
    if pads is None or not bool(pads.any()):
        raise Skip("the rows looked at hold no padding that can be told from tokens")
    made = trace(subject, batch)
    leaf = next((x for x in made.leaves if x.name == "input_ids" and x.tensor.ndim == 3), None)
    logits = made.logits
    if leaf is None or logits is None or logits.shape[0] != len(pads):
        raise Skip("the outputs cannot be followed back to the tokens")
    if leaf.tensor.shape[:2] != pads.shape:
        raise Skip("the embedded tokens are not the batch's own")
    picked = torch.randn(logits.shape[1:], device=logits.device).to(logits.dtype)
    picked = picked.expand(logits.shape).clone()
    if logits.ndim > 2 and logits.shape[1] == pads.shape[1]:
        picked[pads] = 0
    sizes = made.along(leaf, (logits * picked).sum())
    own = torch.where(pads, 0.0, sizes).amax(1)
    yield PaddingDependence(
        real=int((~pads).sum()),
        padded=int(pads.sum()),
        own=float(own.max()),
        padding=float(torch.where(pads, sizes, 0.0).max()),
        mask=_kind(made.received.get("attention_mask"), pads),
        takes_mask="attention_mask" in inspect.signature(bare(subject.model).forward).parameters,
        library=type(bare(subject.model)).__module__.startswith("transformers."),
        later=bool(subject.cache.get(FUTURE_SEEN))
        and not bool((pads[:, :-1] & ~pads[:, 1:]).any()),
    )


def _behind(pads: torch.Tensor) -> bool:
    """Whether all padding stands behind the tokens."""
    return not bool((pads[:, :-1] & ~pads[:, 1:]).any())


def _kind(mask: Any, pads: torch.Tensor) -> str:
    if not isinstance(mask, torch.Tensor):
        return "absent"
    if mask.shape != pads.shape:
        return "shaped"
    seen = mask != 0
    if bool((seen == ~pads).all()):
        return "right"
    if bool(seen.all()):
        return "all ones"
    return "inverted" if float(seen[~pads].float().mean()) < 0.5 else "differs"


def _sequences(subject: Subject) -> tuple[Trace, Leaf]:
    """A pass of a causal model, and its tokens; raises Skip for any other model."""
    config, name = subject.config, type(bare(subject.model)).__name__
    if getattr(config, "model_type", "") in PERMUTED:
        raise Skip("the model is bidirectional by design")
    made = trace(subject, few_rows(subject))
    leaf, logits = made.token_leaf, made.logits
    if leaf is None or logits is None or logits.ndim != 3:
        raise Skip("the outputs do not run along the tokens")
    if getattr(config, "is_encoder_decoder", False):
        if leaf.name == "input_ids":
            raise Skip("the decoder's tokens cannot be followed")
        return made, leaf
    if name.endswith(("ForCausalLM", "LMHeadModel")) or getattr(config, "is_decoder", False):
        return made, leaf
    observed = float(made.loss.detach())
    head = read_head(subject.model, made.batch.inputs, made.outputs, observed=observed)
    if head.task == "causal":
        return made, leaf
    raise Skip("the model predicts no next token, so it may see all of them")


def _supervised(subject: Subject, made: Trace) -> torch.Tensor:
    """Positions whose output the loss compares with a label: (rows, positions) bool."""
    logits, labels = made.logits, made.batch.labels
    assert logits is not None
    everything = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    if not isinstance(labels, torch.Tensor) or labels.shape != logits.shape[:2]:
        return everything
    counted = labels != -100
    if getattr(subject.config, "is_encoder_decoder", False):
        return counted
    return torch.cat([counted[:, 1:], counted[:, :1] & False], 1)


def _padding(subject: Subject, made: Trace, leaf: Leaf) -> torch.Tensor:
    mask = made.received.get("attention_mask")
    mask = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
    pads = pad_positions(subject, made.batch.inputs, mask)
    assert leaf.ids is not None
    fits = pads is not None and pads.shape == leaf.ids.shape
    return pads if pads is not None and fits else torch.zeros_like(leaf.ids, dtype=torch.bool)


# ---------------------------------------------------------------- the checks


def sees_the_future(
    order: OrderDependence,
    *,
    tolerance: Annotated[float, "of the own gradient: fused kernels leave about 1e-6"] = 1e-5,
) -> Iterator[Fault]:
    """An output that is to predict the next token depends on later ones."""
    if order.later <= tolerance * order.own or order.own == order.later == 0:
        return
    yield Fault(
        f"outputs have a gradient of {order.later:.2e} on later tokens "
        f"(on their own and earlier ones: {order.own:.2e})",
        evidence={
            "seen": f"gradient {order.later:.2e} on later tokens",
            "expected": "exactly 0",
            "own": order.own,
            "later": order.later,
        },
    )


def padding_reaches_outputs(
    padding: PaddingDependence,
    *,
    tolerance: Annotated[float, "of the own gradient: fused kernels leave about 1e-6"] = 1e-5,
) -> Iterator[Fault]:
    """Outputs of real positions depend on what stands in the padding."""
    if padding.padding <= tolerance * padding.own or padding.own == padding.padding == 0:
        return
    ratio = padding.padding / padding.own if padding.own else float("inf")
    causes = {
        "absent": "no attention_mask reaches the model"
        if padding.takes_mask
        else "the model takes no mask",
        "all ones": "the attention_mask that reaches the model is 1 on padding",
        "inverted": "the attention_mask that reaches the model is 0 on tokens and 1 on padding",
        "differs": "the attention_mask that reaches the model is not where the padding is",
        "right": "although the attention_mask is right",
        "shaped": "although an attention_mask is given",
    }
    by_design = (not padding.takes_mask) or (
        padding.library and padding.mask in ("right", "shaped")
    )
    by_design = by_design or padding.later  # future-leak's affair: where it ends, so does this
    yield Fault(
        f"outputs depend on {padding.padded} padded positions: gradient {padding.padding:.2e}, "
        f"{ratio:.2g} of that on tokens; {causes[padding.mask]}",
        severity="note" if by_design else "error",
        evidence={
            "seen": f"gradient {padding.padding:.2e} on padding",
            "expected": "exactly 0",
            "own": padding.own,
            "padding": padding.padding,
            "mask": padding.mask,
        },
        fix=None
        if padding.takes_mask
        else "h = (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)",
    )


CHART_ORDER = Probe("chart positions", "probe", (OrderDependence,), measure_order)
FOLLOW_PADDING = Probe("follow padding", "probe", (PaddingDependence,), measure_padding)

FUTURE_LEAK = Check(
    name="future-leak",
    stage="baselines",
    severity="error",
    moments=("probe",),
    why="A model that sees the token it is to predict learns to copy it, and cannot generate.",
    fix="torch.triu(scores.new_full((T, T), float('-inf')), diagonal=1)  # added to the scores",
    source="Karpathy, A Recipe for Training Neural Networks, 2019",
    unsure="A language model that is bidirectional on purpose and still predicts the next token.",
    judges=(sees_the_future,),
    explains=("padding-leak",),
)

PADDING_LEAK = Check(
    name="padding-leak",
    stage="baselines",
    severity="error",
    moments=("probe",),
    why="A row's answer then changes with the length of the rows it is batched with.",
    fix='model(input_ids=..., attention_mask=batch["attention_mask"])',
    source="transformers issue 29419 (2024); Karpathy (2019)",
    unsure="Models that take no mask by design, or that convolve over padding, are a note. Where "
    "no tokenizer is given, padding is told by runs of the config's padding token.",
    judges=(padding_reaches_outputs,),
    explains=("padded-loss-differs", "input-without-gradient"),
)
