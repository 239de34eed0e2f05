"""The recipe's line "use backprop to chart dependencies", between packed documents.

Where positions begin anew inside a row, documents are meant to stay apart. Whether they do depends
on the attention kernel, on a mask that comes along, on a cache: one gradient tells. Rows that are
packed without new positions let documents see each other on purpose, a common pretraining
practice, and are not looked at.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch

from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.subject import Subject
from hf_recipe.instruments.trace import few_rows, trace

SEQUENCE_IDS = ("seq_idx", "segment_ids", "document_ids", "sequence_ids")


@dataclass(frozen=True)
class PackingDependence(Measurement):
    """How much a packed document's outputs depend on the document before it.

    Attributes:
        documents: in the row that was looked at.
        own, other: gradient on the document's own tokens, and on those before it.
        mask: whether an attention mask of one number per token reached the model.
        cache: whether the model's config asks for a cache.
    """

    documents: int
    own: float
    other: float
    mask: bool
    cache: bool


def measure_packing(subject: Subject) -> Iterator[PackingDependence]:
    """One backward pass, from the last document's outputs."""
    batch = few_rows(subject)
    row, starts = _documents(batch.inputs)
    made = trace(subject, batch)
    leaf, logits = made.token_leaf, made.logits
    if leaf is None or logits is None:
        raise Skip("the outputs do not run along the tokens")
    first, start, end = starts[-2], starts[-1][0], starts[-1][1]
    picked = torch.zeros_like(logits)
    picked[row, start:end] = torch.randn_like(picked[row, start:end])
    sizes = made.along(leaf, (logits * picked).sum())[row]
    mask = made.received.get("attention_mask")
    yield PackingDependence(
        documents=len(starts),
        own=float(sizes[start:end].max()),
        other=float(sizes[starts[0][0] : first[1]].max()),
        mask=isinstance(mask, torch.Tensor) and mask.ndim == 2,
        cache=bool(getattr(subject.config, "use_cache", False)),
    )


def _documents(inputs: Mapping[str, Any]) -> tuple[int, list[tuple[int, int]]]:
    """A row with several documents of two tokens or more, and where these begin and end."""
    name = next((n for n in SEQUENCE_IDS if isinstance(inputs.get(n), torch.Tensor)), None)
    positions = inputs.get("position_ids")
    if name is not None:
        ids = inputs[name]
        breaks = ids[..., 1:] != ids[..., :-1]
    elif isinstance(positions, torch.Tensor):
        ids = positions
        breaks = ids[..., 1:] == 0
    else:
        raise Skip("nothing in the batch says where one document ends and the next begins")
    mask = inputs.get("attention_mask")
    if ids.ndim != 2:
        raise Skip("positions are not one number per token")
    for row in range(ids.shape[0]):
        cuts = [0, *(breaks[row].nonzero()[:, 0] + 1).tolist(), ids.shape[1]]
        spans = [(a, b) for a, b in itertools.pairwise(cuts) if b - a > 1]
        if isinstance(mask, torch.Tensor) and mask.shape == ids.shape:
            spans = [(a, b) for a, b in spans if bool((mask[row, a:b] != 0).all())]
        if len(spans) > 1:
            return row, spans
    raise Skip("no row holds two documents whose positions begin anew")


def documents_see_each_other(
    packing: PackingDependence,
    *,
    tolerance: Annotated[float, "of the own gradient: fused kernels leave about 1e-6"] = 1e-5,
) -> Iterator[Fault]:
    """Positions begin anew for each document, and yet it sees the one before."""
    if packing.other <= tolerance * packing.own or packing.own == packing.other == 0:
        return
    cause, fix = "", None
    if packing.mask:
        cause = "; an attention_mask is given, which keeps transformers from looking at positions"
        fix = 'batch.pop("attention_mask")  # position_ids alone tell the documents apart'
    elif packing.cache:
        cause = "; a cache is in use, which keeps transformers from looking at positions"
        fix = "TrainingArguments(..., use_cache=False)"
    yield Fault(
        f"a packed document's outputs have a gradient of {packing.other:.2e} on the documents "
        f"before it (own: {packing.own:.2e}){cause}",
        evidence={
            "seen": f"gradient {packing.other:.2e} across documents",
            "expected": "exactly 0",
            "documents": packing.documents,
        },
        fix=fix,
    )


FOLLOW_DOCUMENTS = Probe("follow documents", "probe", (PackingDependence,), measure_packing)

PACKING_LEAK = Check(
    name="packing-leak",
    stage="baselines",
    severity="error",
    moments=("probe",),
    why="Documents then learn from a neighbour that will not be there when the model is used.",
    fix="DataCollatorWithFlattening()  # position_ids, no attention_mask, use_cache=False",
    source="transformers issue 46634 (2026); trl issue 805 (2023)",
    unsure="Packing without new positions (a common pretraining practice) is not looked at.",
    judges=(documents_see_each_other,),
)
