"""How the weights were drawn: units that start equal, and a draw before the seed.

Units of a layer that start equal get equal gradients and stay equal: a wide layer learns as one
unit. And the Trainer seeds when it is built: a model made before has a head of another seed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import nn

from hf_recipe.baselines.frozen import ADAPTER, is_loaded, output_parts
from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.heads import bare
from hf_recipe.instruments.subject import Subject

SAMPLED = 64
LARGE = 1 << 24  # parameters; a second model of this size is not drawn to compare seeds


@dataclass(frozen=True)
class UnitSymmetry(Measurement):
    """Layers (linear, convolution) that train, by how their units start.

    Attributes:
        layers: with at least two units and two inputs.
        equal: names of those whose units all start equal, and not at zero.
        zero: names of those that start at zero.
        head: of `equal`, those that are the output layer.
    """

    layers: int
    equal: tuple[str, ...]
    zero: tuple[str, ...]
    head: tuple[str, ...]


@dataclass(frozen=True)
class SeededDraw(Measurement):
    """Whether freshly drawn tensors are the ones that ``args.seed`` draws.

    Attributes:
        seed: ``args.seed``.
        by_trainer: whether ``model_init`` was given, so that the Trainer draws after seeding.
        drawn: numbers drawn at random, rather than loaded.
        reproduced: whether drawing again from the seed gives them.
    """

    seed: int
    by_trainer: bool
    drawn: int
    reproduced: bool


def measure_symmetry(subject: Subject) -> Iterator[UnitSymmetry]:
    """Compare the units of every layer with its first."""
    head = {id(p) for p in output_parts(subject.model)[1]}
    count, equal, zero, heads = 0, [], [], []
    for name, module in subject.model.named_modules():
        units = _units(module)
        if units is None or min(units.shape) < 2 or any(mark in name for mark in ADAPTER):
            continue
        count += 1
        if not bool((units == units[:1]).all()):
            continue
        if not bool(units[0].any()):
            zero.append(name)
        else:
            equal.append(name)
            if id(module._parameters["weight"]) in head:
                heads.append(name)
    yield UnitSymmetry(count, tuple(equal[:50]), tuple(zero[:50]), tuple(heads))


def _units(module: nn.Module) -> torch.Tensor | None:
    """(units, inputs [+ bias]) of a layer that trains, or None."""
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)
    weight = module._parameters.get("weight")
    if not isinstance(module, kinds) or weight is None or not weight.requires_grad:
        return None
    if getattr(module, "groups", 1) > 1:  # each unit has inputs of its own
        return None
    rows = weight.detach().T if isinstance(module, Conv1D) else weight.detach().flatten(1)
    some = slice(None, None, max(1, len(rows) // SAMPLED))  # units that are all equal show in any
    rows, bias = rows[some], module._parameters.get("bias")
    return rows if bias is None else torch.cat([rows, bias.detach()[some, None]], dim=1)


def measure_draw(subject: Subject) -> Iterator[SeededDraw]:
    """Draw again from the seed, and compare. Random numbers are drawn: call it quietly."""
    trainer = subject.trainer
    if trainer is None:
        raise Skip("without the Trainer it cannot be seen who built the model")
    model = bare(subject.model)
    fresh = {n: p for n, p in model.named_parameters() if not is_loaded(p) and p.ndim >= 2}
    drawn = sum(p.numel() for p in fresh.values())
    by_trainer = trainer.model_init is not None
    seed = int(subject.args.seed)
    reproduced = False
    if fresh and not by_trainer:
        reproduced = _reproduced(model, fresh, seed)
    yield SeededDraw(seed, by_trainer, drawn, reproduced)


def _reproduced(model: nn.Module, fresh: dict[str, nn.Parameter], seed: int) -> bool:
    if len(fresh) == len([p for p in model.parameters() if p.ndim >= 2]):
        return _rebuilt(model, fresh, seed)
    # Loading draws what is missing and nothing else: the first tensor comes first.
    first = next(iter(fresh.values())).detach().float().cpu()
    torch.manual_seed(seed)
    again = torch.randn(first.shape)
    both = torch.stack([first.reshape(-1), again.reshape(-1)])
    return both.shape[1] > 2 and float(torch.corrcoef(both)[0, 1]) > 0.99


def _rebuilt(model: nn.Module, fresh: dict[str, nn.Parameter], seed: int) -> bool:
    """Whether a second model of this class and config, drawn from the seed, is the same."""
    config: Any = getattr(model, "config", None)
    known = type(model).__module__.startswith("transformers.")
    if not known or sum(p.numel() for p in fresh.values()) > LARGE:
        raise Skip("this model cannot be drawn again from its config to compare seeds")
    torch.manual_seed(seed)
    again = dict(type(model)(copy.deepcopy(config)).named_parameters())
    name, tensor = next(((n, p) for n, p in fresh.items() if n in again), ("", None))
    if tensor is None:
        raise Skip("adapters hold this model's tensors under names of their own")
    return torch.equal(again[name].float(), tensor.detach().float().cpu())


def symmetric_init(
    units: UnitSymmetry,
    *,
    zero_fraction: Annotated[
        float, "of the layers; zero starts of last layers in each block stay below a half; judged"
    ] = 0.5,
) -> Iterator[Fault]:
    """Layers whose units start equal; zero starts of some layers are a method."""
    inner = [name for name in units.equal if name not in units.head]
    names = ", ".join((inner or list(units.equal))[:4])
    if units.equal:
        yield Fault(
            f"all units start equal in {len(units.equal)} of {units.layers} layers: {names}",
            subject=(inner or list(units.equal))[0],
            severity=None if inner else "warning",
            evidence={"seen": f"{len(units.equal)} layers of equal units", "expected": "none"},
        )
    if len(units.zero) >= 2 and len(units.zero) > zero_fraction * units.layers:
        yield Fault(
            f"{len(units.zero)} of {units.layers} layers start at zero, so that no gradient passes "
            f"between them: {', '.join(units.zero[:4])}",
            subject=units.zero[0],
            evidence={"seen": f"{len(units.zero)} layers at zero", "expected": "at most the last"},
        )


def seed_after_model(draw: SeededDraw) -> Iterator[Fault]:
    """Weights that the run's seed does not draw."""
    if draw.by_trainer or not draw.drawn or draw.reproduced:
        return
    yield Fault(
        f"{draw.drawn:,} numbers were drawn at random before the Trainer set seed {draw.seed}, and "
        "that seed does not give them: unless another one was set first, no two runs start alike",
        subject="seed",
        evidence={"seen": "drawn before the seed", "expected": f"drawn from seed {draw.seed}"},
    )


SYMMETRY = Probe(
    "compare units", "static", (UnitSymmetry,), measure_symmetry, needs=("fresh", "unsharded")
)
DRAW = Probe(
    "draw from the seed", "static", (SeededDraw,), measure_draw, needs=("fresh", "unsharded")
)

SYMMETRIC_INIT = Check(
    name="symmetric-init",
    stage="baselines",
    severity="error",
    moments=("static",),
    why="Units that start equal get equal gradients and stay equal: the layer learns as one unit.",
    fix="nn.init.normal_(layer.weight, std=0.02)",
    source="Goodfellow, Bengio and Courville, Deep Learning, 8.4 (2016)",
    unsure="Layers that average on purpose; zero starts of a block's last layer are left alone.",
    judges=(symmetric_init,),
    explains=(
        "loss-not-decreasing",
        "one-batch-not-overfit",
        "input-ignored",
        "parameter-without-gradient",
        "input-without-gradient",
        "vanishing-gradient",
        "dead-unit",
    ),
)
SEED_AFTER_MODEL = Check(
    name="seed-after-model",
    stage="baselines",
    severity="note",
    moments=("static",),
    why="TrainingArguments.seed acts when the Trainer is built: a head drawn before is another one "
    "in every run.",
    fix="transformers.set_seed(args.seed)  # before the model is built, or Trainer(model_init=...)",
    source="transformers issues 1160 (2019) and 11965 (2021)",
    unsure="Another seed, or other draws between the seed and the model, cannot be seen.",
    judges=(seed_after_model,),
)
