"""Transfer: "it rarely ever hurts to use a pretrained network if you can".

A pretrained network is many parts, from what is general (embeddings, first blocks) to what belongs
to its old task (last blocks, head). `parts_of` names them in that order; freezing, unfreezing one
part after the other, and rates that fall from part to part are all said in these terms.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import TrainerCallback

from hf_recipe.instruments.distributed import world_size
from hf_recipe.regularize.weight_decay import is_decayed

logger = logging.getLogger(__name__)

BATCHNORM = (nn.modules.batchnorm._BatchNorm,)


@dataclass(frozen=True)
class Part:
    """Parameters that belong together.

    Attributes:
        name: "embeddings", the name of a block, or "head".
        parameters: their names in the model.
    """

    name: str
    parameters: tuple[str, ...]


def parts_of(model: nn.Module) -> tuple[Part, ...]:
    """The model's parts from input to output: embeddings, blocks, head.

    Blocks are the entries of the longest lists of equal modules (encoder, then decoder); what
    stands before the first is "embeddings", what is outside the base model is "head", and what
    comes after the last block goes with it.

    Raises:
        ValueError: the model has no list of blocks.
    """
    lists = _block_lists(model)
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of blocks to tell its parts by")
    names = [name for name, _ in model.named_parameters()]
    head = {n for n in names if _in_head(model, n, lists)}
    blocks = [f"{path}.{i}" for path, size in lists for i in range(size)]
    owned: dict[str, list[str]] = {"embeddings": [], **{b: [] for b in blocks}, "head": []}
    seen_block = ""
    for name in names:
        if name in head:
            owned["head"].append(name)
            continue
        own = next((b for b in blocks if name.startswith(b + ".")), None)
        if own is not None:
            seen_block = own
            owned[own].append(name)
        else:
            owned[seen_block or "embeddings"].append(name)
    return tuple(Part(name, tuple(found)) for name, found in owned.items() if found)


def _block_lists(model: nn.Module) -> list[tuple[str, int]]:
    """Paths and lengths of the outermost lists of two or more equal modules; or of one."""
    found: list[tuple[str, int, int]] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or not len(module):
            continue
        if any(path.startswith(f"{other}.") for other, _, _ in found):
            continue
        kinds = {type(child) for child in module}
        weights = sum(p.numel() for p in module.parameters())
        if len(kinds) == 1 and weights and not isinstance(module[0], nn.Linear):
            found.append((path, len(module), weights))
    most = max((weights for _, _, weights in found), default=0)
    return [(path, size) for path, size, weights in found if 10 * weights >= most]


def _in_head(model: nn.Module, name: str, lists: Sequence[tuple[str, int]]) -> bool:
    """Outside the base model; without one, outside the module that holds the blocks."""
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and isinstance(getattr(model, prefix, None), nn.Module):
        return not re.match(rf"{re.escape(prefix)}\.", name)
    last = max(
        (i for i, (n, _) in enumerate(model.named_parameters()) if _inside(n, lists)), default=-1
    )
    place = next(i for i, (n, _) in enumerate(model.named_parameters()) if n == name)
    return place > last


def _inside(name: str, lists: Sequence[tuple[str, int]]) -> bool:
    return any(name.startswith(f"{path}.") for path, _ in lists)


# ---------------------------------------------------------------- freezing


def freeze(model: nn.Module, trained: int = 1) -> tuple[str, ...]:
    """Freeze all but the last `trained` parts (1: the head alone); returns the frozen parts.

    Weights that are tied to a trained part stay trained.

    Raises:
        ValueError: `trained` is below 1, or the model has no parts.
    """
    parts = parts_of(model)
    if trained < 1:
        raise ValueError(f"at least one part must be trained; got trained={trained}")
    names = dict(model.named_parameters())
    frozen = parts[: max(0, len(parts) - trained)]
    for part in parts:
        for name in part.parameters:
            names[name].requires_grad_(part not in frozen)
    return tuple(part.name for part in frozen)


class GradualUnfreezing(TrainerCallback):  # type: ignore[misc]
    """Trains the head first, then one part more at a time, from the top (Howard and Ruder 2018).

    Built on the step's number, so that a resumed run stands where it was. The optimizer holds all
    parameters from the start; a frozen one has no gradient and is neither moved nor decayed.
    Frozen BatchNorm keeps its statistics.

    Args:
        until: share of the run after which all parts are trained.
        first: share of the run in which the head alone is trained; default: one equal part.
        parts: "all": one part after the other; "head": after `first` everything at once, the
            warm-up of a new head (linear probing, then fine-tuning: Kumar et al. 2022).

    Attributes:
        trained: parts that are trained now.
    """

    def __init__(
        self, until: float = 0.5, *, first: float | None = None, parts: str = "all"
    ) -> None:
        if not 0 < until <= 1 or (first is not None and not 0 < first <= 1):
            raise ValueError(
                f"until and first are shares of the run in (0, 1]; got {until}, {first}"
            )
        if parts not in ("all", "head"):
            raise ValueError(f'parts is "all" or "head"; got {parts!r}')
        self.until, self.first, self.parts = until, first, parts
        self.trained = 0
        self._asked: dict[str, bool] = {}
        self._momenta: dict[str, float | None] = {}
        self._all: tuple[Part, ...] = ()

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Learn the parts, and freeze."""
        self._all = parts_of(model)
        self._asked = {n: p.requires_grad for n, p in model.named_parameters()}
        self._momenta = {
            path: module.momentum
            for path, module in model.named_modules()
            if isinstance(module, BATCHNORM)
        }
        self._set(model, self.due(state.global_step, state.max_steps))

    def due(self, step: int, total: int) -> int:
        """Parts that are trained in the step after `step` of `total`."""
        count = len(self._all)
        share = step / max(1, total)
        first = self.first if self.first is not None else self.until / max(1, count)
        if share < first:
            return 1
        if self.parts == "head" or share >= self.until or count < 3:
            return count
        return min(count, 2 + math.floor((share - first) / (self.until - first) * (count - 2)))

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Thaw what is due; keep the statistics of frozen BatchNorm."""
        due = self.due(state.global_step, state.max_steps)
        if due != self.trained:
            self._set(model, due)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """On several processes gradients are made for all, and dropped here."""
        if world_size() > 1:
            frozen = self._frozen()
            for name, parameter in model.named_parameters():
                if name in frozen:
                    parameter.grad = None

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Every parameter asks for gradients as it did before."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._asked.get(name, True))
        for path, momentum in self._momenta.items():
            model.get_submodule(path).momentum = momentum

    def _frozen(self) -> set[str]:
        frozen = self._all[: len(self._all) - self.trained]
        return {name for part in frozen for name in part.parameters}

    def _set(self, model: nn.Module, due: int) -> None:
        self.trained = due
        frozen = self._frozen()
        if world_size() == 1:  # DistributedDataParallel waits for every gradient it has seen
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(self._asked[name] and name not in frozen)
        for path, module in model.named_modules():
            if isinstance(module, BATCHNORM):
                own = {f"{path}.{n}" for n, _ in module.named_parameters(recurse=False)}
                module.momentum = 0.0 if own & frozen else self._momenta[path]
        logger.info("training %d of %d parts", due, len(self._all))


def head_warmup(share: float = 0.1) -> GradualUnfreezing:
    """A new head learns alone for the first `share` of the run; then everything does."""
    return GradualUnfreezing(share, first=share, parts="head")


# ---------------------------------------------------------------- rates by depth


def layerwise_rates(
    model: nn.Module, learning_rate: float, *, decay: float = 0.9, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups whose rate falls by `decay` from each part to the one below it.

    Biases and norms do not decay. Give them to the optimizer:
    ``Trainer(..., optimizers=(torch.optim.AdamW(layerwise_rates(model, 1e-4)), None))``.

    Args:
        learning_rate: of the head.
        decay: in (0, 1]; 0.65 to 0.95 are usual (Clark et al. 2020, ELECTRA).

    Raises:
        ValueError: rates that cannot be, or a model without parts.
    """
    if not (0 < decay <= 1 and learning_rate > 0 and weight_decay >= 0):
        raise ValueError(
            "decay is in (0, 1], learning_rate positive, weight_decay not negative; got "
            f"{decay}, {learning_rate}, {weight_decay}"
        )
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    groups: list[dict[str, Any]] = []
    for depth, part in enumerate(reversed(parts_of(model))):
        for decayed in (True, False):
            chosen = [
                parameters[n]
                for n in part.parameters
                if n in parameters and is_decayed(model, n) is decayed
            ]
            if chosen:
                groups.append(
                    {
                        "params": chosen,
                        "lr": learning_rate * decay**depth,
                        "weight_decay": weight_decay if decayed else 0.0,
                        "name": part.name,
                    }
                )
    return groups


# ---------------------------------------------------------------- adapters


def add_adapters(
    model: Any, rank: int = 8, *, alpha: float | None = None, dropout: float = 0.0
) -> Any:
    """`model` with low-rank adapters (LoRA, Hu et al. 2021) on all its linear layers.

    The head is trained whole; all else is frozen. Needs the extra ``adapters``.

    Raises:
        ImportError: peft is not installed; says how to.
        ValueError: a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1; got {rank}")
    try:
        import peft
    except ImportError:
        raise ImportError('adapters need peft: pip install "hf_recipe[adapters]"') from None
    head = {n.split(".")[0] for part in parts_of(model)[-1:] for n in part.parameters}
    ties = bool(getattr(model.config, "tie_word_embeddings", False))
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha if alpha is not None else 2 * rank,
        lora_dropout=dropout,
        target_modules="all-linear",
        exclude_modules=sorted(head) or None,
        modules_to_save=None if ties and "lm_head" in head else sorted(head) or None,
    )
    return peft.get_peft_model(model, config)
