"""Do tokens that were added to the vocabulary learn their embedding?

A resized table gives new tokens a row that says nothing yet (the mean of the others). Where the
table is frozen, as under adapters that do not save it, those rows stay so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.checkpoints import checkpoint_of
from hf_recipe.instruments.heads import bare
from hf_recipe.instruments.subject import Subject

ROWS = 256  # examples in which new tokens are looked for
NEAR = 0.05  # of the usual distance to the mean row: nearer than any trained or drawn row comes


@dataclass(frozen=True)
class NewTokens(Measurement):
    """Embedding rows that were added, and whether they train.

    Attributes:
        rows: of the embedding table.
        first_new: id of the first added row; equal to `rows` where none was added.
        trains: whether any part of the table trains.
        examples, with_new: examples looked at, and those of them that hold a new token.
        used: different new tokens in them.
        adapted: whether adapters (PEFT) are on the model.
    """

    rows: int
    first_new: int
    trains: bool
    examples: int = 0
    with_new: int = 0
    used: int = 0
    adapted: bool = False


def measure_new_tokens(subject: Subject) -> Iterator[NewTokens]:
    """Find added rows, and count the new tokens in evenly spaced examples."""
    from transformers import PreTrainedModel

    model = bare(subject.model)
    table = None
    if isinstance(model, PreTrainedModel):
        with contextlib.suppress(NotImplementedError):  # images, tables
            table = model.get_input_embeddings()
    weight = getattr(table, "weight", None)
    if not isinstance(table, nn.Module) or not isinstance(weight, torch.Tensor) or weight.ndim != 2:
        raise Skip("the model has no table of embeddings")
    rows = len(weight)
    trains = any(p.requires_grad for p in _table_parameters(subject.model, weight, table))
    first = rows if trains else min(_known_rows(subject, rows), mean_rows(weight.detach()))
    if first >= rows:
        yield NewTokens(rows, rows, trains)
        return
    ids = [
        batch.inputs["input_ids"]
        for batch in subject.batches("train", rows=ROWS)
        if isinstance(batch.inputs.get("input_ids"), torch.Tensor)
    ]
    new = [x[x >= first] for x in ids]
    yield NewTokens(
        rows=rows,
        first_new=first,
        trains=trains,
        examples=sum(len(x) for x in ids),
        with_new=sum(int((x >= first).reshape(len(x), -1).any(-1).sum()) for x in ids),
        used=len({int(i) for part in new for i in part.tolist()}),
        adapted=hasattr(subject.model, "peft_config"),
    )


def _table_parameters(
    model: nn.Module, weight: torch.Tensor, table: nn.Module
) -> Iterator[nn.Parameter]:
    """The table's own, and what an adapter put beside it under the same name."""
    yield from table.parameters()
    name = next((n for n, p in model.named_parameters() if p is weight), "")
    stem = name.removesuffix(".weight").split(".original_module")[0].split(".base_layer")[0]
    if stem:
        yield from (p for n, p in model.named_parameters() if n.startswith(f"{stem}."))


def _known_rows(subject: Subject, rows: int) -> int:
    """Rows of the table in the checkpoint that the model came from; `rows` where unknown."""
    checkpoint = checkpoint_of(subject.config)
    if checkpoint is None:
        return rows
    marks = ("embed_tokens.weight", "word_embeddings.weight", "wte.weight", "shared.weight")
    sizes = [s[0] for n, s in checkpoint.shapes.items() if n.endswith(marks) and len(s) == 2]
    return min(sizes[0], rows) if len(set(sizes)) == 1 else rows


def mean_rows(weight: torch.Tensor) -> int:
    """First of the last rows that all lie at the mean of the table, as resizing leaves them."""
    values = weight.float()
    distance = (values - values.mean(0)).norm(dim=-1)
    near = (distance < NEAR * distance.median()).cpu()
    if not bool(near[-1]):
        return len(values)
    far = (~near).nonzero()
    return int(far.max()) + 1 if len(far) else len(values)


def untrained_tokens(tokens: NewTokens) -> Iterator[Fault]:
    """Rows that were added, stand in the data and do not train."""
    if tokens.trains or tokens.first_new >= tokens.rows or not tokens.with_new:
        return
    yield Fault(
        f"{tokens.rows - tokens.first_new} rows were added to the embedding (from id "
        f"{tokens.first_new}), the table is frozen, and {tokens.with_new} of {tokens.examples} "
        f"examples use {tokens.used} of them",
        subject="input embedding",
        fix=None if tokens.adapted else "model.get_input_embeddings().requires_grad_(True)",
        evidence={
            "seen": "added rows are frozen",
            "expected": "added rows train",
            "added": tokens.rows - tokens.first_new,
            "used": tokens.used,
        },
    )


NEW_TOKENS = Probe("look for new tokens", "probe", (NewTokens,), measure_new_tokens)

NEW_TOKEN_UNTRAINED = Check(
    name="new-token-untrained",
    stage="baselines",
    severity="warning",
    moments=("probe",),
    why="A new token's row starts as the mean of the others: frozen, the token means nothing, and "
    "is never told from the other new ones.",
    fix="LoraConfig(..., trainable_token_indices=new_ids)",
    source="peft issue 334 (2023); transformers, resize_token_embeddings (2024)",
    unsure="Rows are seen as added where the checkpoint on this machine has fewer, or where they "
    "lie at the mean of the table.",
    judges=(untrained_tokens,),
)
