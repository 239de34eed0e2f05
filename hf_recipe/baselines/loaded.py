"""Did the pretrained weights arrive?

Loading under other names than the file's leaves the model as it was drawn, with a line in the log
at most; and an initialisation that runs after loading writes over what was loaded. The file is
compared with the model: which names it holds, and a few thousand values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import nn

from hf_recipe.baselines.frozen import is_loaded
from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.checkpoints import Checkpoint, checkpoint_of
from hf_recipe.instruments.heads import bare
from hf_recipe.instruments.subject import Subject

COMPARED = 24  # tensors, evenly spaced
VALUES = 4_096  # of each: a chance correlation is then 0.016
FEW = 64  # values under which a correlation says nothing


@dataclass(frozen=True)
class LoadedWeights(Measurement):
    """The model's tensors against the checkpoint that its config names.

    Attributes:
        tensors: of the model, each counted once.
        in_file: tensors of the checkpoint.
        loaded: model tensors that transformers filled from a checkpoint.
        renamed: others for which the file holds an unused tensor of that shape and last name.
        moved: of those, tensors in a numbered block whose like lies unused in the file's block of
            the same number: no new head is numbered.
        offered: others that the file holds under their own name.
        compared: loaded matrices whose values were compared with the file's.
        unlike: those of them that do not correlate with the file (below one half).
        examples_unlike: their names, at most five.
        examples_renamed: names of model tensors that found no file tensor, at most five.
    """

    tensors: int
    in_file: int
    loaded: int
    renamed: int
    offered: int
    compared: int
    unlike: int
    examples_unlike: tuple[str, ...] = ()
    examples_renamed: tuple[str, ...] = ()
    moved: int = 0


def measure_loaded(subject: Subject) -> Iterator[LoadedWeights]:
    """Compare names, and the values of a few tensors."""
    checkpoint = checkpoint_of(subject.config)
    if checkpoint is None:
        raise Skip("no safetensors checkpoint named by the model's config lies on this machine")
    model = bare(subject.model)
    named = {n.replace(".base_layer.", "."): p for n, p in model.named_parameters()}
    at = {name: _in_file(name, model, checkpoint) for name in named}
    used = {key for key in at.values() if key is not None}
    unused = {key: shape for key, shape in checkpoint.shapes.items() if key not in used}
    fresh = [name for name, p in named.items() if not is_loaded(p)]
    lacking = {name: tuple(named[name].shape) for name in fresh if at[name] is None}
    renamed = _matched(lacking, unused, numbered=False)
    known = {n: key for n, key in at.items() if key is not None and is_loaded(named[n])}
    compared, unlike = _compare(named, known, checkpoint)
    by_hand = _filled_by_hand(named, fresh, at, checkpoint)
    if by_hand:  # by load_state_dict, which leaves no mark
        fresh, renamed = [name for name in fresh if name not in by_hand], []
    yield LoadedWeights(
        tensors=len(named),
        in_file=len(checkpoint.shapes),
        loaded=len(named) - len(fresh),
        renamed=len(renamed),
        offered=sum(at[name] is not None for name in fresh),
        compared=compared,
        unlike=len(unlike),
        examples_unlike=tuple(unlike[:5]),
        examples_renamed=tuple(renamed[:5]),
        moved=len(_matched(lacking, unused, numbered=True)) if renamed else 0,
    )


def _matched(
    lacking: Mapping[str, tuple[int, ...]],
    unused: Mapping[str, tuple[int, ...]],
    *,
    numbered: bool,
) -> list[str]:
    """Names of the model's tensors that have their like, by shape and last name, in the file.

    Args:
        numbered: compare the number of the block too, and leave out what stands in none.
    """

    def look(name: str, shape: tuple[int, ...]) -> tuple[Any, ...]:
        parts = name.split(".")
        return (shape, parts[-1], *([p for p in parts if p.isdigit()] if numbered else []))

    spare = Counter(look(name, shape) for name, shape in unused.items())
    found = []
    for name, shape in lacking.items():
        like = look(name, shape)
        if spare[like] > 0 and (not numbered or len(like) > 2):
            spare[like] -= 1
            found.append(name)
    return found


def _filled_by_hand(
    named: dict[str, nn.Parameter],
    fresh: list[str],
    at: dict[str, str | None],
    checkpoint: Checkpoint,
) -> set[str]:
    """Unmarked tensors that stand in the file, by their own name or a longer or shorter one.

    Empty where the matrices among them hold other values than the file's.
    """
    keys = {}
    for name in fresh:
        ends = [k for k in checkpoint.shapes if k.endswith(f".{name}") or name.endswith(f".{k}")]
        key = at[name] or (ends[0] if len(ends) == 1 else None)
        if key is not None:
            keys[name] = key
    compared, unlike = _compare(named, keys, checkpoint)
    return set(keys) if compared and not unlike else set()


def _in_file(name: str, model: nn.Module, checkpoint: Checkpoint) -> str | None:
    """The file's name for a tensor: the same, or with or without the base model's prefix."""
    prefix = f"{getattr(model, 'base_model_prefix', '') or '?'}."
    choices = (name, name.removeprefix(prefix), prefix + name)
    return next((key for key in choices if key in checkpoint.shapes), None)


def _compare(
    named: dict[str, nn.Parameter], known: dict[str, str], checkpoint: Checkpoint
) -> tuple[int, list[str]]:
    """How many matrices were compared, and the names of those unlike the file's."""
    fitting = [
        name
        for name, key in known.items()
        if named[name].ndim >= 2
        and tuple(named[name].shape[1:]) == checkpoint.shapes[key][1:]
        and named[name].numel() >= FEW
        and named[name].is_floating_point()
    ]
    chosen = fitting[:: max(1, -(-len(fitting) // COMPARED))]
    count, unlike = 0, []
    for name in chosen:
        theirs = checkpoint.values(known[name], VALUES).double()
        ours = named[name].detach().reshape(-1)[: len(theirs)].cpu().double()
        theirs = theirs[: len(ours)]
        if len(ours) < FEW or not float(theirs.std()) > 0:
            continue
        count += 1
        if not _correlation(ours, theirs) > 0.5:
            unlike.append(name)
    return count, unlike


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size > 0 else 0.0


def weights_not_loaded(
    weights: LoadedWeights,
    *,
    share: Annotated[
        float, "of the tensors; a new head with a pooler is under 10 % of a small model's; judged"
    ] = 0.25,
    blocks: Annotated[int, "tensors of numbered blocks: one may be a layer that was meant"] = 2,
    rewritten: Annotated[
        float, "of the matrices; re-drawing the top layers on purpose stays below; judged"
    ] = 0.5,
) -> Iterator[Fault]:
    """Names that did not meet, or values that were written over."""
    evidence = {
        "seen": f"{weights.loaded} of {weights.tensors} tensors loaded",
        "expected": "all but a new head's",
        "in_file": weights.in_file,
        "unlike": weights.unlike,
        "compared": weights.compared,
    }
    if weights.renamed >= share * weights.tensors or weights.moved >= blocks:
        yield Fault(
            f"{weights.renamed} of {weights.tensors} tensors are as drawn: the checkpoint "
            "named in the config holds tensors of their shapes, but under other names; first "
            f"{weights.examples_renamed[0] if weights.examples_renamed else '?'}",
            subject="names",
            evidence=evidence,
        )
    elif not weights.loaded and weights.offered >= share * weights.tensors:
        yield Fault(
            f"the checkpoint named in the config holds {weights.offered} of {weights.tensors} of "
            "the model's tensors, and none was loaded: the model starts from random weights",
            subject="from_config",
            severity="note",
            evidence=evidence,
        )
    if weights.unlike and weights.unlike >= rewritten * weights.compared:
        yield Fault(
            f"{weights.unlike} of {weights.compared} matrices compared have nothing in common with "
            "the checkpoint they were loaded from: written over after loading (first "
            f"{weights.examples_unlike[0]})",
            subject="values",
            fix="initialise new layers alone: model.classifier.reset_parameters()",
            evidence=evidence,
        )
    elif weights.unlike:
        yield Fault(
            f"{weights.unlike} of {weights.compared} matrices compared were drawn anew after "
            f"loading (first {weights.examples_unlike[0]})",
            subject="values",
            severity="note",
            evidence=evidence,
        )


LOADED_WEIGHTS = Probe(
    "compare the model with its checkpoint",
    "static",
    (LoadedWeights,),
    measure_loaded,
    needs=("fresh", "unsharded"),
)

WEIGHTS_NOT_LOADED = Check(
    name="weights-not-loaded",
    stage="baselines",
    severity="error",
    moments=("static",),
    why="Training goes on from random weights, slowly and to a worse loss; the log says so in a "
    "line, if at all.",
    fix="model, info = AutoModel.from_pretrained(name, output_loading_info=True); print(info)",
    source="transformers issues 48722 (2026) and 46620 (2026)",
    unsure="Only safetensors on this machine are compared. Re-drawing top layers on purpose is a "
    "note; so is a model built from a pretrained model's config.",
    judges=(weights_not_loaded,),
    explains=("initial-loss-unexpected", "loss-not-decreasing"),
)
