"""A teacher that was asked once: its answers in an Arrow data set, found again by content.

    cached = cache_teacher(teacher, dataset, collate, "teacher_cache", temperature=2.0)
    trainer = DistillationTrainer(student, args, train_dataset=dataset, teacher=cached, ...)

A row is known by what the teacher saw of it (its tokens without padding, or its pixels), so the
answers survive shuffling, other batches and other padding; a row that was tokenised otherwise or
augmented is not there, and is named, not guessed. The teacher's own weights are part of the key.

A vocabulary is kept as `samples` tokens per position, drawn from the teacher's distribution at
temperature T: the gradient of the soft loss with them is that of the whole distribution, in
expectation, which it is not with the top k alone (Anshumann et al. 2025, Sparse Logit Sampling).
The draws stay the same in every epoch: where few rows are seen many times,
the student learns the draws, and more `samples` (or `top`) are wanted.
With `top` the k largest probabilities are kept and the rest is spread over the other tokens. A
head of few classes is kept whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from hf_recipe.core.report import write_atomically
from hf_recipe.instruments.distributed import from_rank_0, rank
from hf_recipe.tune import distillation_heads as heads
from hf_recipe.tune import distillation_models as models

ABOUT, ROWS = "teacher.json", "rows.arrow"
WHOLE_UP_TO = 64  # classes; below, the whole distribution takes little more room than its samples


class NotCached(KeyError):
    """A row that the teacher was not asked about."""

    def __str__(self) -> str:
        return str(self.args[0])


def teacher_hash(teacher: nn.Module) -> str:
    """A name for the teacher's weights: the same for the same numbers."""
    digest = hashlib.sha256()
    for name, value in sorted(teacher.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()[:16]


def _bytes(value: Tensor) -> bytes:
    flat = value.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def row_keys(inputs: Mapping[str, Any], pad: int | None = None) -> list[str]:
    """What the teacher sees of each row of a batch, hashed; padding is not part of it.

    Args:
        pad: the decoder's padding token, cut off the end of ``decoder_input_ids``.
    """
    asked = sorted(models.questions(inputs).items())
    seen = {k: v for k, v in asked if isinstance(v, Tensor)}
    mask = seen.pop("attention_mask", None)
    decoder_mask = seen.pop("decoder_attention_mask", None)
    del decoder_mask  # it follows from the padding
    keys = []
    for row in range(heads.batch_rows(inputs)):
        digest = hashlib.sha256()
        for name, value in seen.items():
            one = value[row]
            if name == "decoder_input_ids":
                one = one[: decoder_length(one, pad)]
            elif mask is not None and one.shape[: mask[row].ndim] == mask[row].shape:
                one = one[mask[row].bool()]
            digest.update(f"{name} {tuple(one.shape)}".encode())
            kept = one.float() if one.is_floating_point() else one.long()
            digest.update(_bytes(kept))
        keys.append(digest.hexdigest()[:24])
    return keys


def decoder_length(ids: Tensor, pad: int | None) -> int:
    """Positions up to the last one that is no padding; the first always counts."""
    if pad is None:
        return len(ids)
    real = (ids[1:] != pad).nonzero()
    return 1 + (int(real.max()) + 1 if len(real) else 0)


def positions(inputs: Mapping[str, Any], row: int, length: int, pad: int | None) -> Tensor:
    """Which of a row's `length` positions are real: bool, (length,)."""
    decoder = inputs.get("decoder_input_ids")
    if isinstance(decoder, Tensor):
        return torch.arange(length) < decoder_length(decoder[row], pad)
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask[row].shape == (length,):
        return mask[row].bool().cpu()
    return torch.ones(length, dtype=torch.bool)


# ------------------------------------------------------------------ writing


def cache_teacher(
    teacher: nn.Module,
    dataset: Any,
    collate: Callable[[list[Any]], Mapping[str, Any]],
    path: str | Path,
    *,
    temperature: float = 1.0,
    samples: int = 12,
    top: int = 0,
    batch_size: int = 16,
    seed: int = 0,
) -> CachedTeacher:
    """Ask `teacher` about every row once; a cache of the same teacher that is there is used.

    Args:
        dataset: rows as the Trainer's data collator takes them.
        collate: the Trainer's data collator.
        path: folder of the cache.
        temperature: the ``distill_temperature`` it will be used at.
        samples: tokens drawn per position, of a vocabulary.
        top: keep the k largest instead, with the rest as a tail.

    Raises:
        ValueError: the folder holds another teacher's cache, or one made otherwise.
    """
    path = Path(path)
    asked = {
        "teacher": teacher_hash(teacher),
        "temperature": temperature,
        "samples": 0 if top else samples,
        "top": top,
        "seed": seed,
    }
    if not from_rank_0((path / ABOUT).is_file()):
        if rank() == 0:
            _write(path, teacher, dataset, collate, asked, batch_size)
        from_rank_0(None)  # the others wait until it is whole
    known = CachedTeacher(path)
    other = next((k for k in asked if known.about[k] != asked[k]), None)
    if other is not None:
        raise ValueError(
            f"{path} was made with {other} {known.about[other]}, not {asked[other]}; "
            "give another folder"
        )
    return known


def _write(
    path: Path,
    teacher: nn.Module,
    dataset: Any,
    collate: Any,
    asked: Mapping[str, Any],
    batch_size: int,
) -> None:
    """Ask, and write row after row; what says that the cache is whole comes last."""
    from datasets.arrow_writer import ArrowWriter

    about = {**asked, **_heading(teacher)}
    path.mkdir(parents=True, exist_ok=True)
    with ArrowWriter(path=str(path / ROWS)) as writer:
        for row in _asked(teacher, dataset, collate, about, batch_size):
            writer.write(row)
        writer.finalize()
    write_atomically(path / ABOUT, json.dumps(about, indent=1))


def _heading(teacher: nn.Module) -> dict[str, Any]:
    """What of the teacher itself is needed to look its answers up."""
    config, head = getattr(teacher, "config", None), models.output_head(teacher)
    named = getattr(config, "id2label", None) or {}
    if head is not None:  # a vocabulary; what its config names are classes of another head
        named = {i: f"LABEL_{i}" for i in range(head.weight.shape[0])}
    return {
        "pad": getattr(config, "pad_token_id", None),
        "id2label": {str(k): v for k, v in named.items()},
    }


def _asked(
    teacher: nn.Module, dataset: Any, collate: Any, about: dict[str, Any], batch_size: int
) -> Iterator[dict[str, Any]]:
    draw = torch.Generator().manual_seed(about["seed"])
    home, mode = next(teacher.parameters()).device, teacher.training
    teacher.eval()
    for start in range(0, len(dataset), batch_size):
        chosen = range(start, min(start + batch_size, len(dataset)))
        batch = models.with_decoder(teacher, collate([dataset[i] for i in chosen]))
        seen = models.accepted(teacher, models.questions(batch))
        about.setdefault("inputs", sorted(k for k, v in seen.items() if isinstance(v, Tensor)))
        moved = {k: v.to(home) if isinstance(v, Tensor) else v for k, v in seen.items()}
        with torch.no_grad():
            outputs = teacher(**moved)
        named = {k: outputs[k].float().cpu() for k in _names(outputs)}
        for row, key in enumerate(row_keys(seen, about["pad"])):
            kept: dict[str, Any] = {"key": key}
            for name, logits in named.items():
                kept |= _packed(name, logits[row], seen, row, about, draw)
            yield kept
    teacher.train(mode)


def _names(outputs: Any) -> list[str]:
    return [n for n in ("logits", "start_logits", "end_logits") if outputs.get(n) is not None]


def _packed(
    name: str, logits: Tensor, seen: Mapping[str, Any], row: int, about: dict[str, Any], draw: Any
) -> dict[str, Any]:
    """One row's answer as columns: its shape and numbers, or tokens of each real position."""
    if name != "logits" or (logits.ndim == 2 and logits.shape[0] == _length(seen)):
        real = positions(seen, row, len(logits), about["pad"])
        logits = logits[real]
    shape = list(logits.shape)
    if logits.ndim != 2 or shape[-1] <= WHOLE_UP_TO:
        numbers = logits.flatten().numpy()
        return {f"{name}_shape": shape, f"{name}_numbers": numbers, f"{name}_tokens": []}
    chances = (logits / about["temperature"]).softmax(-1)
    if about["top"]:
        values, tokens = chances.topk(min(about["top"], shape[-1]), -1)
    else:
        tokens = torch.multinomial(chances, about["samples"], replacement=True, generator=draw)
        values = torch.empty(0)
    return {
        f"{name}_shape": shape,
        f"{name}_numbers": values.flatten().numpy(),
        f"{name}_tokens": tokens.flatten().int().numpy(),
    }


def _length(seen: Mapping[str, Any]) -> int:
    name = "decoder_input_ids" if "decoder_input_ids" in seen else "input_ids"
    value = seen.get(name)
    return int(value.shape[1]) if isinstance(value, Tensor) and value.ndim == 2 else -1


# ------------------------------------------------------------------ reading


class CachedTeacher(nn.Module):
    """A teacher for `DistillationTrainer` that looks its answers up.

    Args:
        path: folder that `cache_teacher` wrote.
        fallback: a teacher to ask about rows that are not there (augmented ones); default: none,
            and such a row is an error.

    Attributes:
        about: how the cache was made.
    """

    def __init__(self, path: str | Path, fallback: nn.Module | None = None) -> None:
        super().__init__()
        import datasets

        self.about = json.loads((Path(path) / ABOUT).read_text(encoding="utf-8"))
        rows = datasets.Dataset.from_file(str(Path(path) / ROWS))
        self._index = {key: i for i, key in enumerate(rows["key"])}
        self._rows = rows.with_format("numpy")
        if fallback is not None and teacher_hash(fallback) != self.about["teacher"]:
            raise ValueError(f"{path} was made by another teacher than the fallback")
        self._fallback = [fallback] if fallback is not None else []  # not a submodule
        self.config = SimpleNamespace(
            id2label={int(k): v for k, v in self.about["id2label"].items()}
        )
        # Where and as what inputs are wanted is read off a model's parameters; by name, off its
        # forward: the Trainer drops columns that nobody names.
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)
        if self.about.get("inputs"):
            models.name_inputs(self, self.about["inputs"])

    def __len__(self) -> int:
        return len(self._index)

    def check(self, temperature: float, divergence: str) -> None:
        """Raise ValueError where what was kept does not serve such a loss."""
        if "logits_tokens" not in self._rows.column_names or not len(self):
            return
        if not len(self._rows[0]["logits_tokens"]):
            return  # whole distributions serve any
        if temperature != self.about["temperature"]:
            raise ValueError(
                f"the teacher was cached at temperature {self.about['temperature']}; "
                f"distill_temperature is {temperature}"
            )
        if self.about["samples"] and divergence != "forward_kl":
            raise ValueError(
                f"sampled tokens give the gradient of forward_kl, not of {divergence}; cache "
                "with top=... instead"
            )

    def forward(self, **inputs: Any) -> ModelOutput:
        """The logits by name, aligned with the batch; padded positions are zeros.

        Raises:
            NotCached: a row that is not there, where there is no fallback.
        """
        keys = row_keys(inputs, self.about["pad"])
        missing = [row for row, key in enumerate(keys) if key not in self._index]
        if missing and not self._fallback:
            raise NotCached(
                f"row {missing[0]} of the batch is not among the {len(self)} that the teacher was "
                "asked about: it was tokenised or augmented otherwise; cache it too, or give "
                "CachedTeacher(path, fallback=teacher)"
            )
        if missing:
            with torch.no_grad():
                return self._fallback[0].eval()(**models.accepted(self._fallback[0], inputs))
        found = [self._rows[self._index[key]] for key in keys]
        names = [n for n in ("logits", "start_logits", "end_logits") if f"{n}_shape" in found[0]]
        return ModelOutput({name: self._logits(name, found, inputs) for name in names})

    def _logits(self, name: str, found: list[Any], inputs: Mapping[str, Any]) -> Tensor:
        each = [self._one(name, kept) for kept in found]
        length = _length(inputs)
        per_position = name != "logits" or (each[0].ndim == 2 and length > 0)
        if not per_position:
            return torch.stack(each).to(self.place.device)
        out = torch.zeros(len(each), length, *each[0].shape[1:])
        for row, logits in enumerate(each):
            out[row, positions(inputs, row, length, self.about["pad"])] = logits
        return out.to(self.place.device)

    def _one(self, name: str, kept: Mapping[str, Any]) -> Tensor:
        """One row's logits over its real positions; tokens that were not drawn have none."""
        shape = [int(n) for n in kept[f"{name}_shape"]]
        tokens = torch.from_numpy(np.array(kept[f"{name}_tokens"], dtype=np.int64))
        numbers = torch.from_numpy(np.array(kept[f"{name}_numbers"], dtype=np.float32))
        if not len(tokens):
            return numbers.reshape(shape)
        rows, classes = shape
        tokens = tokens.reshape(rows, -1)
        if self.about["top"]:
            values = numbers.reshape(rows, -1)
            rest = (1 - values.sum(-1, keepdim=True)).clamp(min=0) / max(
                1, classes - len(tokens[0])
            )
            chances = rest.expand(rows, classes).clone().scatter_(1, tokens, values)
        else:
            share = torch.full(tokens.shape, 1 / tokens.shape[1])
            chances = torch.zeros(rows, classes).scatter_add_(1, tokens, share)
        # softmax(logits / T) is then what was kept, at the temperature it was drawn at.
        logits: Tensor = chances.log() * self.about["temperature"]
        return logits
