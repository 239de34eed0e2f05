"""What the config asks for, and the run does: auxiliary losses, dropout rates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from torch import nn

from hf_recipe.baselines.frozen import output_parts
from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.heads import bare
from hf_recipe.instruments.overrides import overrides
from hf_recipe.instruments.subject import Subject

WEIGHTS = {"router_aux_loss_coef": "output_router_logits"}  # weight -> what switches the term on
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
OTHER_RATES = ("classifier", "layerdrop", "path", "head", "summary", "final", "cls")


@dataclass(frozen=True)
class AuxiliaryTerms(Measurement):
    """Loss terms that the config weighs.

    Attributes:
        off: name of the weight -> name of the switch that is off.
        weights: name of the weight -> its value.
        router_trains: whether a router has parameters that train.
        own_loss: whether the loss is computed by the user's own code.
    """

    off: dict[str, str]
    weights: dict[str, float]
    router_trains: bool
    own_loss: bool


@dataclass(frozen=True)
class DropoutRates(Measurement):
    """Dropout rates inside the model, its output layers aside.

    Attributes:
        rates: "where" -> rate: modules of one name together, and rates of the config.
    """

    rates: dict[str, float]


def measure_terms(subject: Subject) -> Iterator[AuxiliaryTerms]:
    """Read weights and switches off the config."""
    if not hasattr(subject.config, "get_text_config"):
        raise Skip("the model has no config")
    config = subject.config.get_text_config()
    weights = {
        name: float(value) for name in WEIGHTS if (value := getattr(config, name, None)) is not None
    }
    off = {
        name: WEIGHTS[name]
        for name, weight in weights.items()
        if weight > 0 and getattr(config, WEIGHTS[name], None) is False
    }
    trainer = subject.trainer
    yield AuxiliaryTerms(
        off=off,
        weights=weights,
        router_trains=any(
            p.requires_grad and _is_router(name) for name, p in subject.model.named_parameters()
        ),
        own_loss=trainer is not None
        and (overrides(trainer, "compute_loss") or trainer.compute_loss_func is not None),
    )


def _is_router(name: str) -> bool:
    parts = name.split(".")
    return any("router" in part for part in parts) or parts[-2:] == ["gate", "weight"]


def measure_dropout(subject: Subject) -> Iterator[DropoutRates]:
    """Collect the rates of dropout modules and of the config."""
    model = bare(subject.model)
    head = tuple(part for part in output_parts(model)[0].split(", ") if part)
    base = getattr(model, "base_model", model)
    inside = {id(module) for module in (base if isinstance(base, nn.Module) else model).modules()}
    rates: dict[str, float] = {}
    for name, module in model.named_modules():
        # what stands after the base model drops before an output, as some families do by 0.8
        if isinstance(module, DROPOUTS) and id(module) in inside and not name.startswith(head):
            last = ".".join(part for part in name.split(".") if not part.isdigit())
            if not any(word in last for word in OTHER_RATES):
                rates[last] = max(rates.get(last, 0.0), float(module.p))
    config: Any = subject.config
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    for name, value in values.items():
        wanted = ("dropout" in name or "pdrop" in name) and isinstance(value, float)
        if wanted and not any(word in name for word in OTHER_RATES):
            rates[f"config.{name}"] = value
    yield DropoutRates(rates)


def auxiliary_off(terms: AuxiliaryTerms) -> Iterator[Fault]:
    """Terms with a weight that are never computed, while what they steer trains."""
    if not terms.router_trains:
        return
    for name, switch in terms.off.items():
        yield Fault(
            f"config.{name}={terms.weights[name]:g} weighs a loss that is never computed: "
            f"config.{switch} is False, and the router trains without it",
            subject=name,
            severity="note" if terms.own_loss else None,
            fix=f"model.config.{switch} = True",
            evidence={"seen": f"{switch}=False", "expected": f"{switch}=True"},
        )


def dropout_extreme(
    dropout: DropoutRates,
    *,
    high: Annotated[
        float, "the highest rate in common use inside a network: Srivastava et al. 2014"
    ] = 0.5,
    drowning: Annotated[
        float, "at 0.8 noise has four times the signal's power at every such layer: p / (1 - p)"
    ] = 0.8,
) -> Iterator[Fault]:
    """Rates at or above `high`; a warning from `drowning` on."""
    found = {where: rate for where, rate in dropout.rates.items() if rate >= high}
    if not found:
        return
    worst = max(found.values())
    names = ", ".join(f"{where} {rate:g}" for where, rate in list(found.items())[:4])
    ratio = f"{worst / (1 - worst):.1f} times" if worst < 1 else "nothing but"
    yield Fault(
        f"dropout inside the model is as high as {worst:g} ({names}): the noise has {ratio} the "
        "signal's power",
        subject="dropout",
        severity="warning" if worst >= drowning else None,
        fix=_lower(found),
        evidence={"seen": f"{worst:g}", "expected": f"below {high:g}"},
    )


def _lower(found: dict[str, float]) -> str | None:
    """The config's own fields, where it has some; modules read them when they are built."""
    fields = [where.removeprefix("config.") for where in found if where.startswith("config.")]
    return "; ".join(f"config.{name} = 0.1" for name in fields[:3]) or None


TERMS = Probe("read auxiliary losses", "static", (AuxiliaryTerms,), measure_terms)
RATES = Probe("read dropout rates", "static", (DropoutRates,), measure_dropout)

AUXILIARY_LOSS_OFF = Check(
    name="auxiliary-loss-off",
    stage="baselines",
    severity="warning",
    moments=("static",),
    why="Without its balancing loss a router sends everything to few experts, and the others stop "
    "learning.",
    fix="model.config.output_router_logits = True",
    source="Fedus et al., Switch Transformers (2021); transformers, MixtralConfig (2023)",
    unsure="Routers trained without balance on purpose, for a short fine-tune.",
    judges=(auxiliary_off,),
)
DROPOUT_EXTREME = Check(
    name="dropout-extreme",
    stage="baselines",
    severity="note",
    moments=("static",),
    why="The recipe overfits first and regularizes later: a rate this high drowns the signal.",
    fix="config.hidden_dropout_prob = 0.1",
    source="Srivastava et al. 2014; Karpathy, A Recipe for Training Neural Networks (2019)",
    unsure="Wide layers before an output, where one half is customary, are left out by name.",
    judges=(dropout_extreme,),
    explains=("input-ignored", "loss-not-decreasing", "one-batch-not-overfit"),
)
