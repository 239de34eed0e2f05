"""Token ids and the labels beside them, as the collator hands them to the network.

The end token that is never supervised (a model that never stops), padding that counts in the
loss, labels shifted once too often, two beginnings, ids without an embedding row: none of these
raises, all of them can be read off a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Annotated, Any

import torch

from hf_recipe.core.check import Check, Located, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.data.masks import IGNORED, shifts_labels
from hf_recipe.data.source import splits_of
from hf_recipe.data.targets import targets_misplaced
from hf_recipe.data.tokenizer import (
    Special,
    attended_tokens,
    collated,
    special_ids,
    token_ids,
    trailing,
)
from hf_recipe.instruments.batches import Batch
from hf_recipe.instruments.overrides import overrides
from hf_recipe.instruments.subject import Subject


@dataclass(frozen=True)
class TokenFacts(Measurement):
    """Counts over the token ids and labels of collated batches.

    Attributes:
        rows: rows collated.
        generates: whether the model learns to continue or to answer (causal, seq2seq).
        shifted: whether the model itself compares the output at t with the label at t + 1.
        own_loss: whether the Trainer computes the loss without the model's own, so that labels
            alone do not tell where they are compared.
        padding, padding_labelled: positions of padding, and those that count in the loss.
        ends, ends_labelled: end tokens that are attended to beyond a row's first position, and
            end tokens (any that the model stops at) that count in the loss.
        end_known: whether the tokenizer itself names an end token.
        other_end: share of rows that end with the same other special token: the last supervised
            token, or one of the two before it (chat templates put a line break behind a turn).
        supervised: label positions that count, next to ids they can be compared with.
        aligned, ahead: of these, equal to the id at the same, at the next position.
        answered, given: label positions that count beside a decoder's own inputs in the batch, and
            those of them where that input is the label itself.
        double_begin: rows that start with two beginning-of-sequence tokens.
        highest: largest id; embeddings: rows of the embedding, None where it has none.
        outside: ids without an embedding row; outside_rows: data set rows that hold some.
        examples: data set rows with padding in the loss, or with two beginnings.
    """

    rows: int = 0
    generates: bool = False
    shifted: bool = False
    own_loss: bool = False
    padding: int = 0
    padding_labelled: int = 0
    ends: int = 0
    ends_labelled: int = 0
    end_known: bool = False
    other_end: float = 0.0
    supervised: int = 0
    aligned: int = 0
    ahead: int = 0
    answered: int = 0
    given: int = 0
    double_begin: int = 0
    highest: int = 0
    embeddings: int | None = None
    outside: int = 0
    outside_rows: tuple[int, ...] = ()
    examples: tuple[int, ...] = ()


def take_tokens(subject: Subject) -> Iterator[Located]:
    """Count over every split's batches."""
    reasons = []
    for split in splits_of(subject) or ["train"]:
        try:
            yield Located(token_facts(subject, collated(subject, split)), split)
        except Skip as reason:
            reasons.append(str(reason))
    if len(reasons) == len(splits_of(subject) or ["train"]):
        raise Skip("; ".join(dict.fromkeys(reasons)))


def token_facts(subject: Subject, batches: list[Batch]) -> TokenFacts:
    """The counts over `batches`; raises Skip where there are no token ids."""
    special, embeddings = special_ids(subject), embedding_rows(subject.model)
    shifted = shifts_labels(subject.model)
    answers = bool(getattr(subject.config, "is_encoder_decoder", False))
    totals = {f.name: 0 for f in fields(TokenFacts) if f.type == "int"}
    last: list[int] = []
    outside_rows: list[int] = []
    examples: list[int] = []
    for batch in batches:
        ids = token_ids(batch)
        attended = attended_tokens(batch, ids, special)
        totals["rows"] += len(ids)
        totals["highest"] = max(totals["highest"], int(ids.max()) if ids.numel() else 0)
        if embeddings is not None:
            outside = (ids < 0) | (ids >= embeddings)
            totals["outside"] += int(outside.sum())
            outside_rows += _rows(batch, outside)
        twice = _double_begin(ids, attended, special)
        totals["double_begin"] += int(twice.sum())
        examples += _rows(batch, twice[:, None])
        labels = batch.inputs.get("labels")
        if isinstance(labels, torch.Tensor) and not labels.is_floating_point() and labels.ndim == 2:
            counted = _labels(
                totals, ids, attended, labels.detach().cpu(), special, shifted, answers
            )
            examples += _rows(batch, counted)
            if answers:
                _count_given(totals, batch.inputs.get("decoder_input_ids"), labels.detach().cpu())
            last += _last_labels(labels.detach().cpu(), special)
    common = max(set(last), key=last.count) if last else None
    other = common in special.every and common not in special.ends
    return TokenFacts(
        **totals,
        generates=shifted or answers,
        shifted=shifted,
        own_loss=_loss_of_ones_own(subject.trainer),
        end_known=special.declared,
        embeddings=embeddings,
        other_end=last.count(common) / len(last) if other and common is not None else 0.0,
        outside_rows=tuple(outside_rows[:20]),
        examples=tuple(examples[:20]),
    )


def _loss_of_ones_own(trainer: Any) -> bool:
    if trainer is None:
        return False
    return overrides(trainer, "compute_loss") or trainer.compute_loss_func is not None


def _labels(
    totals: dict[str, int],
    ids: torch.Tensor,
    attended: torch.Tensor,
    labels: torch.Tensor,
    special: Special,
    shifted: bool,
    answers: bool,
) -> torch.Tensor:
    """Add one batch's labels to the totals; returns where padding counts in the loss."""
    counted = labels != IGNORED
    is_end = torch.isin(labels, torch.tensor(sorted(special.ends), dtype=labels.dtype))
    if answers:  # labels are a sequence of their own, padded at its end
        padding = (
            trailing(labels, special.pad) if special.pad not in special.ends else counted & False
        )
        totals["padding"] += int((padding | ~counted).sum())
        totals["padding_labelled"] += int(padding.sum())
        totals["ends"] += int(is_end.sum())
        totals["ends_labelled"] += int(is_end.sum())
        return padding
    if labels.shape != ids.shape:
        return torch.zeros_like(counted)
    if shifted:
        counted = counted.clone()
        counted[:, 0] = False  # the model never predicts a row's first token
    inner = attended.clone()
    inner[:, 0] = False
    ends = inner & torch.isin(ids, torch.tensor(sorted(special.ends), dtype=ids.dtype))
    padding = ~attended & counted
    if special.pad in special.ends:  # one end token just behind the text is an end, not padding
        follows = torch.cat([torch.zeros_like(attended[:, :1]), attended[:, :-1]], dim=1)
        padding &= ~(follows & is_end)
    within = counted & attended
    ahead = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -1)], dim=1)
    inside = within & torch.cat([attended[:, 1:], torch.zeros_like(attended[:, :1])], dim=1)
    totals["padding"] += int((~attended).sum())
    totals["padding_labelled"] += int(padding.sum())
    totals["ends"] += int(ends.sum())
    totals["ends_labelled"] += int((is_end & counted).sum())
    totals["supervised"] += int(inside.sum())
    totals["aligned"] += int((inside & (labels == ids)).sum())
    totals["ahead"] += int((inside & (labels == ahead)).sum())
    return padding


def _count_given(totals: dict[str, int], given: Any, labels: torch.Tensor) -> None:
    """Count where a decoder is handed, as its input, the very token that it is to predict."""
    if not isinstance(given, torch.Tensor) or given.shape != labels.shape:
        return
    counted = labels != IGNORED
    totals["answered"] += int(counted.sum())
    totals["given"] += int((counted & (given.cpu() == labels)).sum())


def _double_begin(ids: torch.Tensor, attended: torch.Tensor, special: Special) -> torch.Tensor:
    """Rows whose first two attended tokens are the same beginning-of-sequence token."""
    if ids.shape[1] < 2 or not special.begins:
        return torch.zeros(len(ids), dtype=torch.bool)
    first = attended.long().argmax(dim=1).clamp(max=ids.shape[1] - 2)
    rows = torch.arange(len(ids))
    one, two = ids[rows, first], ids[rows, first + 1]
    begins = torch.tensor(sorted(special.begins), dtype=ids.dtype)
    return (one == two) & torch.isin(one, begins) & attended[rows, first + 1]


def _last_labels(labels: torch.Tensor, special: Special) -> list[int]:
    """Each row's last supervised token, or the special one just before it."""
    found = []
    for row in labels:
        end = row[row != IGNORED][-3:].tolist()[::-1]
        if end:
            found.append(next((token for token in end if token in special.every), end[0]))
    return found


def _rows(batch: Batch, flags: torch.Tensor) -> list[int]:
    if not batch.rows:
        return []
    return [batch.rows[i] for i in torch.nonzero(flags.any(dim=1)).flatten().tolist()]


def embedding_rows(model: Any) -> int | None:
    """Rows of the model's input embedding, or None where it has none."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return None
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return int(table.num_embeddings) if isinstance(table, torch.nn.Embedding) else None


# ---------------------------------------------------------------- verdicts


def eos_unlabelled(seen: TokenFacts) -> Iterator[Fault]:
    """End tokens are attended to, none counts in the loss, and no other token ends the rows."""
    if not seen.generates or not seen.ends or seen.ends_labelled or not seen.supervised:
        return
    if seen.other_end >= 0.5:
        return
    yield Fault(
        message=f"EOS supervised 0/{seen.ends:,}: the end token stands in the sequences of "
        f"{seen.rows:,} rows and never counts in the loss",
        evidence={"seen": f"EOS supervised 0/{seen.ends}", "expected": "every attended EOS"},
    )


def padding_labelled(seen: TokenFacts) -> Iterator[Fault]:
    """Padding that counts in the loss."""
    if seen.padding_labelled:
        yield Fault(
            message=f"{seen.padding_labelled:,} of {seen.padding:,} padding positions in "
            f"{seen.rows:,} rows count in the loss",
            evidence={"seen": f"{seen.padding_labelled:,} labelled", "expected": "labels of -100"},
            examples=seen.examples,
        )


def labels_shifted(
    seen: TokenFacts,
    *,
    ahead: Annotated[float, "share of labels that equal the next id; copies give 1.0"] = 0.95,
    aligned: Annotated[float, "share equal to the id at their place; right data give 1.0"] = 0.5,
    enough: Annotated[int, "positions compared; judged"] = 32,
) -> Iterator[Fault]:
    """Labels that stand one position early for a model that shifts them, or beside themselves."""
    if seen.answered >= enough and seen.given >= ahead * seen.answered:
        yield Fault(
            message=f"{seen.given / seen.answered:.1%} of {seen.answered:,} labels are the "
            "decoder's input at the same place: it learns to copy it",
            evidence={
                "seen": "decoder_input_ids equal to the labels",
                "expected": "decoder_input_ids one place behind the labels",
            },
            fix='batch.pop("decoder_input_ids")  # the model makes them of the labels',
        )
    if not seen.shifted or seen.own_loss or seen.supervised < enough:
        return  # what a loss of one's own compares is read off its gradient
    shares = seen.ahead / seen.supervised, seen.aligned / seen.supervised
    if shares[0] >= ahead and shares[1] <= aligned:
        yield Fault(
            message=f"{shares[0]:.1%} of {seen.supervised:,} labels equal the next token and "
            f"{shares[1]:.1%} their own: the model shifts them once more and learns the token "
            "after the next",
            evidence={
                "seen": f"{shares[0]:.1%} equal the next token",
                "expected": "labels equal to input_ids at the same place",
            },
        )


def double_bos(
    seen: TokenFacts,
    *,
    share: Annotated[float, "of the rows; a masked LM draws a second one by chance"] = 0.02,
) -> Iterator[Fault]:
    """Rows that begin twice."""
    if seen.double_begin > share * seen.rows:
        yield Fault(
            message=f"{seen.double_begin:,} of {seen.rows:,} rows start with two "
            "beginning-of-sequence tokens",
            evidence={"seen": f"{seen.double_begin:,} rows", "expected": "one at the start"},
            examples=seen.examples,
        )


def token_out_of_range(seen: TokenFacts) -> Iterator[Fault]:
    """Ids without an embedding row."""
    if seen.outside and seen.embeddings is not None:
        yield Fault(
            message=f"{seen.outside:,} token ids lie outside the embedding's {seen.embeddings:,} "
            f"rows (highest id {seen.highest:,})",
            evidence={
                "seen": f"ids up to {seen.highest}",
                "expected": f"ids 0..{seen.embeddings - 1}",
            },
            examples=seen.outside_rows,
        )


TOKENS = Probe("read token ids", "batch", (TokenFacts,), take_tokens)

EOS_UNLABELLED = Check(
    name="eos-unlabelled",
    stage="data",
    severity="error",
    moments=("batch",),
    why="A model that is never taught its end token never stops generating.",
    fix="tokenizer.add_special_tokens({'pad_token': '<pad>'}); "
    "model.resize_token_embeddings(len(tokenizer))",
    source="transformers issue 23530, 2023; trl issues 976 and 1623, 2023-2024",
    judges=(eos_unlabelled,),
    unsure="Models that are stopped by length alone.",
)

PADDING_LABELLED = Check(
    name="padding-labelled",
    stage="data",
    severity="error",
    moments=("batch",),
    why="Padding is easy to predict: it flatters the loss and teaches nothing but itself.",
    fix="labels[attention_mask == 0] = -100",
    source="transformers issues 2946 and 32832, 2020-2024",
    judges=(padding_labelled,),
    explains=("padded-loss-differs",),
    unsure="Models of fixed length that are meant to predict their padding.",
)

LABELS_SHIFTED = Check(
    name="labels-shifted",
    stage="data",
    severity="error",
    moments=("batch", "probe"),
    why="Shifted twice, labels train the token after the next; not shifted at all, the model "
    "learns to copy the token that it reads.",
    fix="labels = input_ids.clone()  # the model shifts them",
    source="transformers issues 32944 and 44642, 2024-2026",
    judges=(labels_shifted, targets_misplaced),
)

DOUBLE_BOS = Check(
    name="double-bos",
    stage="data",
    severity="warning",
    moments=("batch",),
    why="A template and the tokenizer each add a beginning: the model is trained on what it will "
    "not see when it is used.",
    fix="tokenizer(text, add_special_tokens=False)  # the template has them",
    source="trl issue 1400, 2024; alignment-handbook issue 127, 2024",
    judges=(double_bos,),
)

TOKEN_OUT_OF_RANGE = Check(
    name="token-out-of-range",
    stage="data",
    severity="error",
    moments=("batch",),
    why="The embedding is asked for a row that is not there: a crash on the CPU, a device-side "
    "assert on a GPU.",
    fix="model.resize_token_embeddings(len(tokenizer))",
    source="transformers issue 12763, 2021",
    judges=(token_out_of_range,),
)
